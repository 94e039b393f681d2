"""Anomalous steps are skipped, rolled back, recorded or stop the run; replay of a step."""

import math

import jax
import numpy as np
import pytest
import toy
from test_loop import Poisoned, assert_bit_equal, make, train

from transformer_jax.train import anomalies, checkpoint_files, checkpointing
from transformer_jax.train.anomalies import AnomalyDetector, AnomalyPolicy
from transformer_jax.train.checkpointing import Checkpointer
from transformer_jax.train.loop import Evaluation, replay_step

SKIP, ROLLBACK = AnomalyPolicy(not_finite="skip"), AnomalyPolicy(not_finite="rollback")


class Spiky(toy.Stream):
    """Batches 15 and 16 have targets a hundred times as large."""

    def __next__(self):
        batch = super().__next__()
        if self.position in (15, 16):
            batch["y"] = batch["y"] * 100
        return batch


def test_the_spike_threshold_depends_on_the_losses_up_to_two_steps_before():
    detector = AnomalyDetector(AnomalyPolicy(spike=2.0, window=10))
    losses = [1 + (7 * n % 12) / 50 for n in range(12)]  # all different, none a spike
    for n, loss in enumerate(losses, 1):
        assert detector.update(n, {"loss": loss, "grad_norm": 1.0}) is None
    last = losses[1:11]  # steps 2 to 11: the last ten up to step 13 - 2
    assert detector.spike_threshold(13) == pytest.approx(np.mean(last) + 2 * np.std(last))
    assert detector.spike_threshold(5) == math.inf  # too few losses
    anomaly = detector.update(13, {"loss": 5.0})
    assert anomaly.action == "record"
    assert "loss is 5 at step 13, above the spike threshold 1." in anomaly.message
    # A spike does not change the threshold.
    assert detector.spike_threshold(15) == detector.spike_threshold(14)
    restored = AnomalyDetector(detector.policy)
    restored.set_state(detector.get_state())
    assert restored.spike_threshold(14) == detector.spike_threshold(14)


def test_the_keys_of_the_stored_state():
    """Checkpoints of earlier versions have these keys."""
    detector = AnomalyDetector(AnomalyPolicy())
    detector.update(1, {"loss": 2.0})
    assert detector.get_state() == {"good": [[1, 2.0]], "in_a_row": 0, "rolled_back": 0}


def test_a_skipped_step_changes_only_the_step_counter():
    state, history = train(20, Poisoned(), anomalies=SKIP, log_every=1)
    assert int(state.step) == 20
    assert [row["step"] for row in history if row["skipped"]] == [7]
    expected, train_step = make()
    stream, rng = Poisoned(), jax.random.key(3)
    for n in range(1, 21):
        after, _ = jax.jit(train_step)(expected, next(stream), rng)
        expected = expected._replace(step=after.step) if n == 7 else after
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_skips_steps_resumes_bit_for_bit(tmp_path):
    policy = AnomalyPolicy(not_finite="skip", on_spike="skip", spike=3.0)
    options = {"anomalies": policy, "save_every": 4, "log_every": 1}
    expected, history = train(20, Spiky(), directory=tmp_path / "uninterrupted", **options)
    assert {15, 16} <= {row["step"] for row in history if row["skipped"]}
    train(15, Spiky(), directory=tmp_path / "resumed", **options)
    state, _ = train(20, Spiky(), directory=tmp_path / "resumed", **options)
    assert_bit_equal(state, expected)


def test_a_rollback_continues_after_the_anomalous_batch(tmp_path, capsys):
    stream = Poisoned()
    state, history = train(20, stream, anomalies=ROLLBACK, directory=tmp_path,
                           save_every=5, log_every=1)
    assert int(state.step) == 20 and stream.position == 23  # batches 6 to 8 are dropped
    assert [row["step"] for row in history if "rolled_back" in row] == [5]
    assert "at step 7: rollback; the batch is saved in" in capsys.readouterr().out
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    with np.load(tmp_path / "bad_batch_step7.npz") as batch:
        assert np.isinf(batch["y"]).any()


def test_repeated_anomalies_stop_the_run(tmp_path):
    class Ruined(toy.Stream):
        def __next__(self):
            return super().__next__() | {"y": np.full((toy.ROWS, 2), np.inf, np.float32)}

    with pytest.raises(anomalies.NonFiniteLossError, match=r"at step 4 \(4 consecutive anomalous"):
        train(20, Ruined(), anomalies=SKIP._replace(patience=3))
    with pytest.raises(anomalies.BadStepError, match=r"cannot roll back from step 1, because .* "
                                                     "contains no checkpoint") as error:
        train(20, Ruined(), anomalies=ROLLBACK, directory=tmp_path, save_every=5)
    assert error.value.step == 1
    with pytest.raises(anomalies.LossSpikeError, match=r"loss is .* at step 15, above"):
        train(20, Spiky(), anomalies=AnomalyPolicy(spike=4.0, on_spike="stop"))


@pytest.mark.parametrize(("options", "message"), [
    ({"anomalies": AnomalyPolicy(not_finite="record")},
     "not_finite is 'record'; choose from stop, skip"),
    ({"anomalies": AnomalyPolicy(on_spike="panic")}, "on_spike is 'panic'; choose from stop"),
    ({"anomalies": AnomalyPolicy(spike=-1.0)}, "spike is -1.0; it must be a finite number"),
    ({"anomalies": AnomalyPolicy(window=3)},
     "window is 3 and patience is 5; they must be at least 10 and 1"),
    ({"anomalies": ROLLBACK}, "the action rollback needs checkpoints; pass a Checkpointer"),
])
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        train(20, **options)


def test_a_step_is_replayed(tmp_path):
    """From the checkpoint before it: an equal row bit for bit, and unchanged checkpoints."""
    _, history = train(20, directory=tmp_path, save_every=4, keep=None, log_every=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    for number in (3, 14, 16):
        state, row = replay_step(*make(), toy.Stream(), step=number, rng=jax.random.key(3),
                                 checkpoint=Checkpointer(tmp_path))
        assert int(state.step) == number and row["step"] == number
        for name in ("loss", "grad_norm", "error"):
            assert row[name] == history[number - 1][name]
        stream = toy.Stream()
        batch = [next(stream) for _ in range(number)][-1]
        with np.load(tmp_path / f"replayed_batch_step{number}.npz") as saved:
            np.testing.assert_array_equal(saved["x"], batch["x"])
    after = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npz")
    assert after == before
    for number, folder, message in (
            (0, tmp_path, "step is 0; it must be at least 1"),
            (3, None, "replay_step needs checkpoints; pass a Checkpointer")):
        with pytest.raises(ValueError, match=message):
            replay_step(*make(), toy.Stream(), step=number, rng=None,
                        checkpoint=Checkpointer(folder))


def test_a_bad_step_is_replayed_without_an_error(tmp_path, capsys):
    with pytest.raises(anomalies.NonFiniteLossError):
        train(20, Poisoned(), directory=tmp_path, save_every=5)
    state, row = replay_step(*make(), Poisoned(), step=7, rng=jax.random.key(3),
                             checkpoint=Checkpointer(tmp_path))
    assert int(state.step) == 7 and not math.isfinite(row["loss"])
    assert "at step 7" in capsys.readouterr().out


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    train(20, directory=tmp_path, save_every=4, keep=1, keep_best=("loss", "min"),
          evaluation=Evaluation(lambda params: {"loss": next(scores)}, 4))
    assert checkpoint_files.saved_steps(tmp_path) == [8, 20]
    assert checkpointing.best_step(tmp_path, "loss") == 8
    assert checkpointing.best_step(tmp_path, "loss", "max") == 20
    assert checkpointing.best_step(tmp_path, "accuracy") is None
    assert checkpointing.latest_step(tmp_path) == 20
    with pytest.raises(ValueError, match=r"keep_best is .* the name of a metric \(loss\)"):
        checkpointing.save(tmp_path, 21, make()[0], metrics={"loss": 1.0},
                           keep_best=("accuracy", "max"))
    with pytest.raises(ValueError, match="best is 'lowest'; it must be 'min' or 'max'"):
        checkpointing.best_step(tmp_path, "loss", "lowest")


def test_the_best_checkpoint_of_equal_and_undefined_values(tmp_path):
    """Of equal values the last one counts; NaN is never the best."""
    scores = iter([2.0, math.nan, 2.0, 3.0, math.nan])
    train(20, directory=tmp_path, save_every=4, keep=1, keep_best=("loss", "min"),
          evaluation=Evaluation(lambda params: {"loss": next(scores)}, 4))
    assert checkpoint_files.saved_steps(tmp_path) == [12, 20]
    assert checkpointing.best_step(tmp_path, "loss") == 12


def test_a_checkpoint_between_evaluations_is_not_the_best(tmp_path):
    scores = iter([1.0, 3.0, 4.0])
    train(12, directory=tmp_path, save_every=2, keep=1, keep_best=("loss", "min"),
          evaluation=Evaluation(lambda params: {"loss": next(scores)}, 4))
    assert checkpoint_files.saved_steps(tmp_path) == [4, 12]
    assert checkpointing.best_step(tmp_path, "loss") == 4
