"""Bad steps are skipped, undone, recorded or stop the run; a step is done again; memory is had."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_loop import Poisoned, assert_bit_equal, make, train

from transformer_jax.train import profiling
from transformer_jax.train import anomalies, checkpointing, compiled_step, profiling
from transformer_jax.train.anomalies import AnomalyDetector, AnomalyPolicy

SKIP, BACK = AnomalyPolicy(not_finite="skip"), AnomalyPolicy(not_finite="rollback")


class Spiky(toy.Stream):
    """Batches 15 and 16 have targets a hundred times as large."""

    def __next__(self):
        batch = super().__next__()
        if self.position in (15, 16):
            batch["y"] = batch["y"] * 100
        return batch


def test_a_spike_is_judged_by_the_losses_up_to_two_steps_before():
    watch = AnomalyDetector(AnomalyPolicy(spike=2.0, window=10))
    losses = [1 + (7 * n % 12) / 50 for n in range(12)]  # all unlike, none a spike
    for n, loss in enumerate(losses, 1):
        assert watch.judge(n, {"loss": loss, "grad_norm": 1.0}) is None
    last = losses[1:11]  # steps 2 to 11: ten before step 13, less one
    assert watch.limit(13) == pytest.approx(np.mean(last) + 2 * np.std(last))
    assert watch.limit(5) == math.inf  # too few to say
    bad = watch.judge(13, {"loss": 5.0})
    assert bad.action == "record" and "loss is 5 at step 13, above 1." in bad.what
    assert watch.limit(15) == watch.limit(14)  # a spike counts for no other
    again = AnomalyDetector(watch.policy)
    again.set_state(watch.get_state())
    assert again.limit(14) == watch.limit(14)


def test_a_skipped_step_changes_nothing_but_the_count():
    state, history = train(20, Poisoned(), policy=SKIP, log_every=1)
    assert int(state.step) == 20
    assert [row["step"] for row in history if row["skipped"]] == [7]
    by_hand, train_step = make()
    stream, rng = Poisoned(), jax.random.key(3)
    for n in range(1, 21):
        after, _ = jax.jit(train_step)(by_hand, next(stream), rng)
        by_hand = by_hand._replace(step=after.step) if n == 7 else after
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(by_hand)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_run_that_skips_resumes_to_the_bit(tmp_path):
    policy = AnomalyPolicy(not_finite="skip", on_spike="skip", spike=3.0)
    options = {"policy": policy, "save_every": 4, "log_every": 1}
    whole, history = train(20, Spiky(), checkpoint_dir=tmp_path / "whole", **options)
    assert {15, 16} <= {row["step"] for row in history if row["skipped"]}
    train(15, Spiky(), checkpoint_dir=tmp_path / "parts", **options)
    assert_bit_equal(train(20, Spiky(), checkpoint_dir=tmp_path / "parts", **options)[0], whole)


def test_rolling_back_goes_on_behind_the_bad_batch(tmp_path, capsys):
    stream = Poisoned()
    state, history = train(20, stream, policy=BACK, checkpoint_dir=tmp_path, save_every=5,
                           log_every=1)
    assert int(state.step) == 20 and stream.position == 23  # batches 6, 7 and 8 count for nothing
    assert [row["step"] for row in history if "rolled_back" in row] == [5]
    assert "at step 7: roll back; its batch is in" in capsys.readouterr().out
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    with np.load(tmp_path / "bad_batch_step7.npz") as batch:
        assert np.isinf(batch["y"]).any()


def test_what_cannot_be_mended_stops(tmp_path):
    class Ruined(toy.Stream):
        def __next__(self):
            return super().__next__() | {"y": np.full((toy.ROWS, 2), np.inf, np.float32)}

    with pytest.raises(anomalies.NonFiniteLossError, match=r"at step 4 \(bad step 4 in a row"):
        train(20, Ruined(), policy=SKIP._replace(patience=3))
    with pytest.raises(anomalies.BadStepError, match="nothing to go back to: no step is saved in"):
        train(20, Ruined(), policy=BACK, checkpoint_dir=tmp_path, save_every=5)
    with pytest.raises(anomalies.SpikingLossError, match=r"loss is .* at step 15, above"):
        train(20, Spiky(), policy=AnomalyPolicy(spike=4.0, on_spike="stop"))


@pytest.mark.parametrize(("options", "message"), [
    ({"policy": AnomalyPolicy(not_finite="record")}, "not_finite is 'record'; choose from stop, skip"),
    ({"policy": AnomalyPolicy(on_spike="panic")}, "on_spike is 'panic'; choose from stop"),
    ({"policy": AnomalyPolicy(spike=-1.0)}, "spike is -1.0; give standard deviations above 0"),
    ({"policy": AnomalyPolicy(window=3)}, "window is 3 and patience 5; give at least 10 and 1"),
    ({"policy": BACK}, "the policy to roll back needs a checkpoint_dir"),
    ({"replay": 3}, "replay needs a checkpoint_dir"),
])
def test_a_policy_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        train(20, **options)


def test_a_step_is_done_again(tmp_path):
    """From the checkpoint before it; the row is the same to the bit, the folder what it was."""
    _, history = train(20, checkpoint_dir=tmp_path, save_every=4, keep=None, log_every=1)
    saved = sorted(path.name for path in tmp_path.iterdir())
    for number in (3, 14, 16):
        state, again = train(20, checkpoint_dir=tmp_path, save_every=4, replay_step=number)
        assert int(state.step) == number and [row["step"] for row in again] == [number]
        for name in ("loss", "grad_norm", "error"):
            assert again[0][name] == history[number - 1][name]
        stream = toy.Stream()
        batch = [next(stream) for _ in range(number)][-1]
        with np.load(tmp_path / f"replayed_batch_step{number}.npz") as written:
            np.testing.assert_array_equal(written["x"], batch["x"])
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npz")
    assert left == saved
    with pytest.raises(ValueError, match="replay is 21, outside 1 to 20 steps"):
        train(20, checkpoint_dir=tmp_path, replay_step=21)


def test_the_best_checkpoint_stays(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    train(20, checkpoint_dir=tmp_path, save_every=4, eval_every=4, keep=1,
          eval_fn=lambda params: {"loss": next(scores)}, keep_best=("loss", "min"))
    assert checkpointing.steps(tmp_path) == [8, 20]
    assert checkpointing.best_step(tmp_path, "loss") == 8
    assert checkpointing.best_step(tmp_path, "loss", "max") == 20
    assert checkpointing.best_step(tmp_path, "accuracy") is None
    assert checkpointing.latest_step(tmp_path) == 20
    with pytest.raises(ValueError, match=r"keep_best is .*; give one of loss metrics, and min or"):
        checkpointing.save(tmp_path, 21, make()[0], metrics={"loss": 1.0},
                        keep_best=("accuracy", "max"))


def test_a_step_that_memory_cannot_hold(monkeypatch):
    monkeypatch.setattr(profiling, "free_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"a step needs 0.00 GiB beside the 0.00 of parameters, "
                                         r"optimizer state and batch, and 0.00 are free; use"):
        train(3)
    program = SimpleNamespace(temp_size_in_bytes=60, output_size_in_bytes=50,
                              alias_size_in_bytes=10, argument_size_in_bytes=0)
    compiled_step.check_memory(program, 100)
    with pytest.raises(ValueError):
        compiled_step.check_memory(program, 99)
    compiled_step.check_memory(None, 1)
    compiled_step.check_memory(program, None)


def test_each_shape_is_compiled_once():
    def count(state, batch, rng):
        return state + batch["x"].sum(), {"loss": jnp.float32(0)}

    run = compiled_step.CompiledStep(count, jnp.float32(0), None)
    state = jnp.float32(0)
    with profiling.CompilationCounter() as found:
        for length in (3, 5, 3, 5, 3):
            state, _ = run(state, {"x": np.ones(length, np.float32)}, None)
        assert float(state) == 19
        assert found.count <= 3  # and one for `float`
