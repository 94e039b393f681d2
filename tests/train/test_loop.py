"""`fit`: history, logs, bit-exact resumption, and non-finite losses."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from tensorboardX import SummaryWriter

from transformer_jax import sharding, storage
from transformer_jax.train import anomalies, checkpoint_files, checkpointing, optimizers, step
from transformer_jax.train.anomalies import DEFAULT_POLICY, NonFiniteLossError
from transformer_jax.train.callbacks import Logging, Profiler, Progress, TensorBoard
from transformer_jax.train.checkpoint_files import DirectoryInUseError, directory_lock
from transformer_jax.train.checkpointing import Checkpointer
from transformer_jax.train.loop import Evaluation, fit


@functools.cache  # one step function, so that all runs share its compiled programs
def make_step(loss=toy.loss):
    schedule = optimizers.make_schedule("linear", 0.05, 20, 5)
    optimizer = optimizers.make_optimizer(schedule, weight_decay=0.1)
    return optimizer, step.make_train_step(loss, optimizer)


def make(loss=toy.loss):
    optimizer, train_step = make_step(loss)
    return step.init_state(toy.parameters(), optimizer), train_step


def train(num_steps: int = 20, batches=None, *, loss=toy.loss, seed=3, mesh=None,
          anomalies=DEFAULT_POLICY, evaluation=None, log_every=10, callbacks=(), directory=None,
          **options):
    """Trains with dropout. A test passes `batches` if it uses their position afterwards.

    `options` are those of the `Checkpointer` of `directory`.
    """
    batches = toy.Stream() if batches is None else batches
    rng = None if seed is None else jax.random.key(seed)
    return fit(*make(loss), batches, rng=rng, num_steps=num_steps, mesh=mesh,
               evaluation=evaluation, checkpoint=Checkpointer(directory, **options),
               anomalies=anomalies, callbacks=[Logging(log_every), *callbacks])


def assert_bit_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def uninterrupted():
    """The state after twenty uninterrupted steps."""
    return train()[0]


def test_history_has_the_metrics_of_each_logged_step():
    rows = []
    state, history = train(7, log_every=3, callbacks=[rows.append])
    assert int(state.step) == 7
    assert [row["step"] for row in history] == [3, 6, 7]
    assert rows == history
    for row in history:
        assert {"loss", "first_loss", "second_loss", "error", "grad_norm"} < set(row)
        assert row["seconds"] > 0
        assert row["seconds_per_step"] > 0
        assert "tokens_per_second" not in row
    expected, train_step = make()
    batches, rng = toy.Stream(), jax.random.key(3)
    for _ in range(3):
        expected, metrics = jax.jit(train_step)(expected, next(batches), rng)
    np.testing.assert_allclose(history[0]["loss"], metrics["loss"], rtol=1e-6)


def test_the_data_wait_fraction_of_slow_batches():
    class Slow(toy.Stream):
        def __next__(self):
            time.sleep(0.02)
            return super().__next__()

    def data_wait_fraction(stream, **options):
        _, history = train(12, stream, **options)
        return [row["data_wait_fraction"] for row in history if "data_wait_fraction" in row][-1]

    assert data_wait_fraction(Slow()) > 0.5
    # Also after an evaluation, when no step is in flight.
    assert data_wait_fraction(Slow(), evaluation=Evaluation(lambda params: {}, 1)) > 0.5


def test_compilations_of_new_shapes_are_counted():
    class Growing(toy.Stream):
        made = 0

        def __next__(self):
            self.made += 1
            batch = super().__next__()
            return batch if self.made < 4 else jax.tree.map(
                lambda x: np.concatenate([x] * self.made), batch)

    def count(stream):
        return train(6, stream)[1][-1]["compilations"]

    # Whether the first shape compiles depends on the tests that ran before.
    assert count(toy.Stream()) <= 1
    assert count(Growing()) == 3
    assert count(toy.Stream()) == 0


def test_a_trace_contains_the_named_scopes(tmp_path, uninterrupted):
    @jax.jit
    def loss(params, batch, rng):
        with jax.named_scope("toy_loss_scope"):
            return toy.loss(params, batch, rng)

    train(6, loss=loss, seed=None, callbacks=[Profiler(tmp_path, 2)])
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert b"toy_loss_scope" in trace.read_bytes()
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


def test_a_state_with_committed_and_uncommitted_arrays_is_compiled_once(caplog):
    """Parameters from a checkpoint are committed to a device, a new optimizer state is not."""
    optimizer, train_step = make_step()
    committed = jax.device_put(toy.parameters(), jax.devices()[0])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        fit(step.init_state(committed, optimizer), train_step, toy.Stream(), rng=jax.random.key(3),
            num_steps=3, callbacks=())
    found = [r.message for r in caplog.records if "Finished XLA compilation of jit(train_step)"
             in r.message]
    assert len(found) == 1


def test_tokens_per_second():
    def loss(params, batch, rng):
        return toy.loss(params, batch["toy"], rng)

    class Tokens(toy.Stream):
        def __next__(self):
            return {"tokens": np.zeros((32, 10), np.int32), "toy": super().__next__()}

    for tokens, expected in ((None, 320), (1000, 1000)):
        _, history = fit(*make(loss=loss), Tokens(), rng=None, num_steps=4,
                         callbacks=[Logging(tokens_per_batch=tokens)])
        row = history[-1]
        np.testing.assert_allclose(row["tokens_per_second"] * row["seconds_per_step"], expected)


@pytest.mark.parametrize(("every", "steps"), [(0, [5]), (2, [2, 4, 5])])
def test_evaluation_steps(every, steps):
    _, history = train(5, evaluation=Evaluation(
        lambda params: {"norm": float(abs(params["classifier"]["bias"]).sum())}, every))
    assert [row["step"] for row in history if "eval_norm" in row] == steps
    assert history[-1]["eval_norm"] > 0


def test_a_mesh_gives_the_same_result(uninterrupted):
    for data, fsdp in ((8, 1), (2, 4)):
        mesh = sharding.make_mesh(data, fsdp)
        state, _ = train(mesh=mesh)
        kernel = state.params["encoder"]["layer_0"]["mlp"]["wi"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (16 // fsdp, 16)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                     state, uninterrupted)


def test_lines_without_a_terminal(capsys):
    train(6, log_every=3, callbacks=[Progress()],
          evaluation=Evaluation(lambda params: {"loss": 1.5}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 3/6  loss ")
    assert "s/step" in lines[0]
    assert lines[0].endswith(" left")
    assert "eval loss 1.5" in lines[2]


def test_tensorboard_events(tmp_path):
    evaluation = Evaluation(lambda params: {"loss": 1.0})
    with SummaryWriter(str(tmp_path / "b")) as writer:
        for target in (tmp_path / "a", writer):
            train(4, log_every=2, callbacks=[TensorBoard(target)], evaluation=evaluation)
    for name in ("a", "b"):
        events = b"".join(path.read_bytes() for path in (tmp_path / name).iterdir())
        for tag in (b"train/loss", b"train/grad_norm", b"train/seconds_per_step", b"eval/loss"):
            assert tag in events


# Resumption --------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_run(uninterrupted, tmp_path):
    train(10, directory=tmp_path, metadata={"name": "half"})
    batches = toy.Stream()
    state, history = train(20, batches, directory=tmp_path, seed=99)
    assert_bit_equal(state, uninterrupted)
    assert batches.position == 20
    assert [row["step"] for row in history] == [20]
    assert checkpointing.load_metadata(tmp_path, step=10) == {"name": "half"}


def test_a_finished_run_is_not_changed(uninterrupted, tmp_path):
    train(20, directory=tmp_path)
    state, history = train(20, directory=tmp_path)
    assert_bit_equal(state, uninterrupted)
    assert history == []
    with pytest.raises(ValueError, match="has received 20 updates, more than num_steps = 10"):
        train(10, directory=tmp_path)


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")
import test_loop, toy

class Killing(toy.Stream):
    def __next__(self):
        if self.position == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()

test_loop.train(20, Killing(), directory={directory!r}, save_every=5)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    script = CHILD.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False)
    assert process.returncode == -signal.SIGKILL
    assert checkpointing.latest_step(tmp_path) in (5, 10)  # 5 if step 10 was incomplete
    batches = toy.Stream()
    state, _ = train(20, batches, directory=tmp_path, save_every=5)
    assert_bit_equal(state, uninterrupted)
    reference = toy.Stream()
    for _ in range(20):
        next(reference)
    assert_bit_equal(next(batches), next(reference))


class Signaling(toy.Stream):
    """Sends a signal to the process when batch 13 is requested."""

    number = signal.SIGTERM

    def __next__(self):
        if self.position == 12:
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_preempted_run_saves_and_resumes_bit_for_bit(uninterrupted, tmp_path, name, capfd):
    before = signal.getsignal(signal.Signals[name])
    stream = Signaling()
    stream.number = signal.Signals[name]
    with pytest.raises(anomalies.Preempted) as error:
        train(20, stream, directory=tmp_path, save_every=5)
    assert (error.value.code, error.value.step, error.value.signal_name) == (75, 13, name)
    assert f"{name} at step 13 of 20: saved a checkpoint in" in capfd.readouterr().out
    assert checkpointing.latest_step(tmp_path) == 13
    assert signal.getsignal(signal.Signals[name]) == before
    state, _ = train(20, directory=tmp_path, save_every=5)
    assert_bit_equal(state, uninterrupted)


@pytest.fixture
def keyboard():
    """SIGINT raises KeyboardInterrupt, as in a shell; a pytest worker may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_without_checkpoints_signals_are_not_caught(keyboard):
    stream = Signaling()
    stream.number = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        train(20, stream)


def test_a_second_signal_has_its_usual_effect(keyboard):
    with pytest.raises(KeyboardInterrupt), anomalies.catch_signals() as should_stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop(1) == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_resumes_on_other_devices(uninterrupted, tmp_path):
    train(10, directory=tmp_path, mesh=sharding.make_mesh(1, 8))
    state, _ = train(20, directory=tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, uninterrupted
    )


def test_a_run_resumes_from_the_step_before_a_corrupted_one(uninterrupted, tmp_path, capfd):
    train(15, directory=tmp_path, save_every=5)
    (tmp_path / "15" / "params" / "_METADATA").write_text("{}")
    state, _ = train(20, directory=tmp_path, save_every=5)
    assert_bit_equal(state, uninterrupted)
    assert "15 is corrupted: params/_METADATA is corrupted: its SHA" in capfd.readouterr().err
    assert checkpointing.latest_step(tmp_path) == 20
    assert (tmp_path / "15").is_dir() and (tmp_path / "15.damaged").is_dir()


def test_resuming_with_another_config_is_an_error(uninterrupted, tmp_path):
    train(10, directory=tmp_path, metadata={"model": {"width": 16}, "seed": np.int64(1)})
    train(10, directory=tmp_path, metadata={"model": {"width": 16}, "seed": np.int64(1)})
    with pytest.raises(ValueError, match="has another config: model/width was 16 and is 32; "
                                         "seed was 1 and is None; use the same settings"):
        train(20, directory=tmp_path, metadata={"model": {"width": 32}})
    state, _ = train(20, directory=tmp_path, metadata={"model": {"width": 32}},
                     allow_config_mismatch=True)
    assert_bit_equal(state, uninterrupted)


def test_two_runs_cannot_use_the_same_directory(tmp_path):
    message = rf"in use by another run \(process {os.getpid()} on .*\); wait until it ends"
    with directory_lock(tmp_path), pytest.raises(DirectoryInUseError, match=message):
        train(5, directory=tmp_path)
    assert not (tmp_path / "lock.owner").exists()
    (tmp_path / "lock.owner").write_text("process 1 on a machine that was switched off\n")
    train(5, directory=tmp_path)


def test_a_failed_save_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    class Slow(toy.Stream):
        def __next__(self):
            time.sleep(1.0 if self.position == 6 else 0)
            return super().__next__()

    train(4, directory=tmp_path)
    monkeypatch.setattr(storage, "write_manifest", fail)
    steps = []
    with pytest.raises(checkpoint_files.SaveError, match=r"step 5 could not be saved in .*: disk "
                                                      r"full; the last complete checkpoint is step "
                                                      r"4\. Fix the problem"):
        train(100, Slow(), directory=tmp_path, save_every=5, log_every=1,
              callbacks=[lambda row: steps.append(row["step"])])
    assert max(steps) < 10  # the step of the next save


# Errors ------------------------------------------------------------------------------------------


class Poisoned(toy.Stream):
    """Batch 7 has an infinite target."""

    def __next__(self):
        batch = super().__next__()
        if self.position == 7:
            batch["y"][0] = np.inf
        return batch


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_non_finite_loss_stops_the_run(tmp_path, log_every):
    with pytest.raises(NonFiniteLossError, match="at step 7; the batch is saved in") as error:
        train(20, Poisoned(), directory=tmp_path, save_every=5, log_every=log_every)
    assert error.value.step == 7
    assert "\n" not in str(error.value)
    assert checkpointing.latest_step(tmp_path) == 5
    for leaf in jax.tree.leaves(checkpointing.load_params(tmp_path)):
        assert np.isfinite(leaf).all()
    with np.load(tmp_path / "bad_batch_step7.npz") as batch:
        assert np.isinf(batch["y"]).any()
        np.testing.assert_array_equal(batch["x"], error.value.batch["x"])


def test_a_non_finite_loss_on_a_step_with_a_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError):
        train(20, Poisoned(), directory=tmp_path, save_every=7)
    assert checkpointing.latest_step(tmp_path) is None


def test_a_finite_loss_with_a_non_finite_gradient_stops_the_run():
    def loss(params, batch, rng):
        root = (params["classifier"]["bias"] ** 2).sum() ** 0.5  # the gradient at 0 is NaN
        return root, 1.0, {}

    with pytest.raises(NonFiniteLossError, match="grad_norm is nan at step 1; the batch was"):
        train(3, loss=loss, seed=None)


def test_batches_that_end_early():
    batches = iter([toy.batch(), toy.batch()])
    with pytest.raises(ValueError, match="the batches ended after step 2 of 3"):
        train(3, batches)


def test_batches_without_a_state_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="without get_state"):
        train(3, iter([toy.batch()]), directory=tmp_path)


@pytest.mark.parametrize(("message", "options"), [
    ("log_every is 0; it must be at least 1", {"log_every": 0}),
    ("save_every is -1; it must be at least 0", {"save_every": -1}),
    ("eval_every is -1; it must be at least 0", {"evaluation": Evaluation(dict, -1)}),
    ("num_steps is -1; it must be at least 0", {"num_steps": -1}),
])
def test_counts_out_of_range(message, options):
    with pytest.raises(ValueError, match=message):
        train(**{"num_steps": 3} | options)
