"""The training loop: runs a train step on batches, and logs, evaluates and saves checkpoints.

The gradient and the update are computed by the train step (`train.step`). The metrics of a step are
read while the next step runs, so that the devices do not wait for the host.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.train import (
    anomalies,
    checkpoint_dirs,
    checkpoint_items,
    checkpointing,
    lock,
    preemption,
    profiling,
)
from transformer_jax.train.compiled_step import CompiledStep
from transformer_jax.train.progress import progress
from transformer_jax.train.step import TrainState
from transformer_jax.train.step_timer import StepTimer
from transformer_jax.tree import PyTree, flatten_paths

HistoryRow = dict[str, float]


class Batches(Protocol):
    """A checkpointable, endless iterator of batches, such as Grain's.

    `get_state`, which returns JSON values, and `set_state` are needed for checkpoints only.
    """

    def __next__(self) -> PyTree: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class InFlightStep(NamedTuple):
    """A step that was dispatched to the devices, and whose metrics have not been read yet."""

    step: int  # counted from 1: the number of updates after this step
    batch: PyTree
    metrics: dict[str, jax.Array]


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    *,
    rng: jax.Array | None,
    num_steps: int,
    mesh: Mesh | None = None,
    eval_fn: Callable[[PyTree], dict[str, float]] | None = None,
    eval_every: int = 0,
    checkpoint_dir: str | Path | None = None,
    save_every: int = 0,
    keep: int | None = 3,
    keep_best: tuple[str, str] | None = None,
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY,
    replay_step: int | None = None,
    log_every: int = 10,
    writer: Any = None,
    on_log: Callable[[HistoryRow], None] | None = None,
    quiet: bool = False,
    tokens_per_batch: int | None = None,
    metadata: Any = None,
    allow_config_mismatch: bool = False,
    profile: tuple[str | Path, int] | None = None,
) -> tuple[TrainState, list[HistoryRow]]:
    """Trains until the state has received `num_steps` updates, and resumes interrupted runs.

    If `checkpoint_dir` contains a checkpoint, the state, the random key and the position in the
    data are restored from the last one that is not corrupted, and the result equals that of an
    uninterrupted run bit for bit. `checkpoint_dir` is locked against other runs. On SIGTERM (in a
    single process also on SIGINT), a checkpoint is saved and the run stops (`train.preemption`).

    Args:
        state: from `train.step.init_state`. It is donated: use the returned state afterwards.
        train_step: from `train.step.make_train_step`, not jitted; it is jitted here, once.
        batches: an iterator of batches of NumPy arrays [B, ...]. With several processes, each
            process passes the rows of its data shard (`sharding.process_data_shard`).
        rng: the random key of the run; each step folds its number into it. None: no randomness.
        num_steps: total number of updates, including those made before the run was resumed.
        mesh: shards the parameters by `sharding.RULES` and the batches over the mesh.
        eval_fn: `eval_fn(params) -> {name: number}`, called every `eval_every` updates and at the
            end (0: at the end only). Its metrics are logged as "eval_<name>".
        checkpoint_dir: for checkpoints every `save_every` updates (0: none) and after the last one.
        keep: number of most recent checkpoints to keep; None keeps all.
        keep_best: (metric of `eval_fn`, "min" or "max"): also keep the checkpoint with the best
            value in the last evaluation before it was saved (see `checkpointing.best_step`).
        anomaly_policy: what to do about non-finite losses and loss spikes.
        replay_step: repeat this step, for debugging: train on the same batches from the last
            checkpoint before it up to this step, without evaluating and without saving checkpoints.
            The history has only the row of this step, whose batch is saved in `checkpoint_dir`.
        log_every: a row is added to the history every `log_every` updates and after the last one.
        writer: a `tensorboardX.SummaryWriter`, or an object with `add_scalar(tag, value, step)`.
        on_log: called with each row of the history.
        quiet: whether to disable the progress display.
        tokens_per_batch: number of tokens in a global batch, for "tokens_per_second". By default,
            the size of the batch entry "tokens", if there is one, times the number of data shards.
        metadata: the config of the run, as JSON values; saved with each checkpoint
            (`checkpointing.load_metadata`). When the run resumes, it must equal the saved one.
        allow_config_mismatch: resume even if `metadata` differs from the saved metadata.
        profile: (folder, number of steps): write a profiler trace of these steps, starting with the
            third of this call, for TensorBoard or Perfetto; operations are named after modules.

    Returns:
        The state after `num_steps` updates, and the history of this call. Training rows have
        "step", the metrics of the step ("loss", "grad_norm", ...), the "seconds" and the number of
        "compilations" since the start of the call, and averages since the previous row, without the
        time of compilation, evaluation and saving: "seconds_per_step", "data_wait_fraction" (an
        upper bound of the fraction of the time in which the devices waited for a batch) and, if the
        number of tokens is known, "tokens_per_second". Evaluation rows have "step", "seconds" and
        the metrics of `eval_fn`.

    Raises:
        Preempted: a signal was received, and a checkpoint was saved. A subclass of SystemExit.
        NonFiniteLossError: a loss or gradient norm is not finite, and the policy is to stop. The
            batch is saved in `checkpoint_dir`, and no checkpoint was saved after this step.
        LossSpikeError: the same for a loss spike.
        BadStepError: a rollback is impossible, because no checkpoint was saved yet.
        ValueError: an argument is out of range; `batches` ends early or, with `checkpoint_dir`, has
            no `get_state`; the checkpoint does not match the state or was saved with other
            `metadata`; or a step needs more memory than is free.
        SaveError: a checkpoint could not be saved; raised during one of the following steps.
        DirectoryInUseError: another run uses `checkpoint_dir`.

    Example:
        >>> import itertools, jax.numpy as jnp, optax
        >>> from transformer_jax.train.step import init_state, make_train_step
        >>> def loss_fn(params, batch, rng):
        ...     return ((params["w"] - batch["x"]) ** 2).sum(), batch["x"].size, {}
        >>> optimizer = optax.sgd(0.1)
        >>> state, history = fit(
        ...     init_state({"w": jnp.zeros(())}, optimizer), make_train_step(loss_fn, optimizer),
        ...     itertools.repeat({"x": np.ones(8)}), rng=None, num_steps=20, quiet=True)
        >>> int(state.step), [row["step"] for row in history]
        (20, [10, 20])
    """
    for name, value, minimum in (("num_steps", num_steps, 0), ("eval_every", eval_every, 0),
                                 ("save_every", save_every, 0), ("log_every", log_every, 1)):
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    detector = anomalies.AnomalyDetector(anomaly_policy)
    checkpoint_options = [name for name, is_used in (
        ("replay_step", replay_step is not None),
        ("the rollback action of anomaly_policy",
         "rollback" in (anomaly_policy.not_finite, anomaly_policy.on_spike))) if is_used]
    if checkpoint_options and checkpoint_dir is None:
        raise ValueError(f"{checkpoint_options[0]} needs checkpoints; pass a checkpoint_dir")
    if replay_step is not None and not 0 < replay_step <= num_steps:
        raise ValueError(f"replay_step is {replay_step}; it must be from 1 to {num_steps}")
    if replay_step is not None:
        num_steps, log_every, quiet, eval_fn, save_every = replay_step, replay_step, True, None, 0
    if checkpoint_dir is not None and not hasattr(batches, "get_state"):
        raise ValueError(
            f"batches is a {type(batches).__name__} without get_state, so a run could not resume "
            "from a checkpoint; pass a Grain iterator, or checkpoint_dir=None")

    saves_checkpoints = checkpoint_dir is not None and replay_step is None
    with lock.directory_lock(checkpoint_dir or "",
                             saves_checkpoints and jax.process_index() == 0):
        start_time = time.perf_counter()
        state = _place(state, mesh)
        if checkpoint_dir is not None:
            state, rng = _resume(state, rng, batches, detector, checkpoint_dir, metadata,
                                 allow_config_mismatch, replay_step)
        start = int(state.step)
        if start > num_steps:
            raise ValueError(f"the state has received {start} updates, more than num_steps = "
                             f"{num_steps}; increase num_steps, or choose another checkpoint_dir")
        if start and not quiet:
            print(f"starting at step {start} of {num_steps}", flush=True)

        abstract_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)
        step_fn = CompiledStep(
            anomalies.skip_bad_updates(train_step, anomaly_policy) if anomaly_policy.skips
            else train_step, state, mesh)
        num_data_shards = sharding.process_data_shard(mesh).count
        history: list[HistoryRow] = []
        pending_save: checkpointing.PendingSave | None = None
        timer = StepTimer()
        in_flight: InFlightStep | None = None
        eval_metrics: HistoryRow = {}

        with (
            contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
            progress(num_steps, start, quiet or jax.process_index() > 0) as report,
            preemption.catch_signals(saves_checkpoints) as should_stop,
            profiling.CompilationCounter() as compilations,
            contextlib.ExitStack() as trace,
        ):

            def log(row: HistoryRow, kind: str) -> None:
                row = {**row, "seconds": time.perf_counter() - start_time}
                history.append(row)
                seconds_left = (timer.mean_seconds * (num_steps - row["step"])
                                if timer.mean_seconds else None)
                report(int(row["step"]), row, seconds_left)
                if writer is not None:
                    for name, value in row.items():
                        if name not in ("step", "seconds"):
                            tag = f"{kind}/{name.removeprefix('eval_')}"
                            writer.add_scalar(tag, value, int(row["step"]))
                if on_log is not None:
                    on_log(row)

            def finish_step(done: InFlightStep) -> bool:
                """Waits for the metrics of a step, checks them, and logs them if a row is due.

                Returns whether to roll back to the last checkpoint.
                """
                metrics = {name: float(x) for name, x in jax.device_get(done.metrics).items()}
                timer.step_done()
                if (anomaly := detector.update(done.step, metrics)) is not None:
                    handle_bad_step(anomaly, done, checkpoint_dir)
                if done.step == replay_step:
                    print(anomalies.save_batch(checkpoint_dir, replay_step, done.batch, "replayed"))
                if not anomaly and done.step % log_every and done.step != num_steps:
                    return False
                row = {"step": done.step, "loss": metrics.pop("loss"), **metrics}
                row["compilations"] = compilations.count
                if interval := timer.end_interval():
                    seconds, row["data_wait_fraction"] = interval
                    row["seconds_per_step"] = seconds
                    if tokens := tokens_per_batch or _count_tokens(done.batch) * num_data_shards:
                        row["tokens_per_second"] = tokens / seconds
                log(row, "train")
                return anomaly is not None and anomaly.action == "rollback"

            step, roll_back = start, False
            try:
                while step < num_steps:
                    step += 1
                    fetch_start = time.perf_counter()
                    batch = _next_batch(batches, step, num_steps)
                    placed = batch if mesh is None else sharding.shard_batch(batch, mesh)
                    # The devices are idle if no step is in flight, or if that step has finished.
                    if (timer.is_running if in_flight is None
                            else in_flight.metrics["loss"].is_ready()):
                        timer.data_wait_seconds += time.perf_counter() - fetch_start
                    if profile is not None and step == min(start + 3, num_steps):
                        jax.profiler.start_trace(profile[0])
                        trace.callback(jax.profiler.stop_trace)
                    threshold = ((np.float32(detector.spike_threshold(step)),)
                                 if anomaly_policy.skips else ())
                    state, metrics = step_fn(state, placed, rng, *threshold)
                    if profile is not None and step == start + 2 + profile[1]:
                        jax.block_until_ready(metrics)
                        trace.close()
                        timer.skip_elapsed()
                    if in_flight is not None:
                        roll_back = finish_step(in_flight)
                    if pending_save is not None:
                        pending_save.check()
                    in_flight = InFlightStep(step, batch, metrics)
                    is_last = step == num_steps
                    preempted_by = None if is_last else should_stop(step)
                    should_eval = (eval_fn is not None and not preempted_by
                                   and _is_due(step, eval_every, is_last))
                    should_save = saves_checkpoints and _is_due(step, save_every,
                                                                is_last or bool(preempted_by))
                    if not roll_back and (should_eval or should_save or is_last):
                        roll_back = finish_step(in_flight)
                        in_flight = None
                    if roll_back:
                        if pending_save is not None:
                            pending_save.result()
                        state = _place(_restore_last(checkpoint_dir, abstract_state, in_flight),
                                       mesh)
                        step, in_flight, roll_back = int(state.step), None, False
                        detector.rewind(step)
                        log({"step": step, "rolled_back": 1.0}, "train")
                        timer.skip_elapsed()
                        continue
                    if not (should_eval or should_save or is_last):
                        continue
                    if should_eval:
                        eval_metrics = {k: float(x) for k, x in eval_fn(state.params).items()}
                        log({"step": step, **{f"eval_{k}": x for k, x in eval_metrics.items()}},
                            "eval")
                    if should_save:
                        if pending_save is not None:
                            pending_save.result()
                        pending_save = checkpointing.save(
                            checkpoint_dir, step, state, rng=rng, metadata=metadata, keep=keep,
                            data_state={"batches": batches.get_state(),
                                        "health": detector.get_state()},  # stored key names
                            metrics=eval_metrics, keep_best=keep_best, wait=False)
                    if preempted_by:
                        pending_save.result()
                        print(f"{preempted_by} at step {step} of {num_steps}: saved a checkpoint "
                              f"in {checkpoint_dir}; run the same command again to resume",
                              flush=True)
                        raise preemption.Preempted(preempted_by, step)
                    timer.skip_elapsed()
            finally:
                if pending_save is not None:
                    pending_save.result()
        return state, history


def _resume(state: TrainState, rng, batches, detector, checkpoint_dir, metadata,
            allow_config_mismatch: bool, replay_step: int | None):
    """Restores the last checkpoint that is not corrupted, if there is one.

    Also restores `batches` and `detector`, and renames incomplete checkpoints. For `replay_step`,
    restores the last checkpoint before it and leaves the directory unchanged. Returns (state, rng).
    """
    step = None
    if replay_step is not None:
        step = max((n for n in checkpoint_dirs.saved_steps(Path(checkpoint_dir))
                    if n < replay_step), default=None)
    if step is not None or (replay_step is None
                            and checkpointing.latest_step(checkpoint_dir) is not None):
        found = checkpointing.restore(checkpoint_dir, state, step)
        if not (allow_config_mismatch or metadata is None or found.metadata is None):
            _check_metadata(found.metadata, checkpoint_items.to_json(metadata, "metadata"),
                            checkpoint_dir)
        state, rng = found.state, found.rng
        batches.set_state(found.data_state["batches"])
        detector.set_state(found.data_state["health"])
    if jax.process_index() == 0 and replay_step is None:
        checkpoint_dirs.quarantine_incomplete(checkpoint_dir, after=int(state.step))
    return state, rng


def _restore_last(checkpoint_dir, abstract_state: TrainState,
                  in_flight: InFlightStep | None) -> TrainState:
    """Restores the state of the last checkpoint, for a rollback."""
    if checkpointing.latest_step(checkpoint_dir) is None:
        raise anomalies.BadStepError(
            f"cannot roll back, because {checkpoint_dir} contains no checkpoint yet; save more "
            "often (save_every), or skip bad steps", in_flight.step if in_flight else 0, None)
    return checkpointing.restore(checkpoint_dir, abstract_state).state


def handle_bad_step(anomaly: anomalies.Anomaly, bad_step: InFlightStep,
                    checkpoint_dir: str | Path | None) -> None:
    """Saves the batch of an anomalous step, then raises its error or prints the action taken."""
    location = anomalies.save_batch(checkpoint_dir, bad_step.step, bad_step.batch)
    if anomaly.action == "stop":
        raise anomaly.error_type(
            f"{anomaly.message}; {location}; no checkpoint was saved after this step. Lower the "
            "learning rate, or inspect the batch", bad_step.step, bad_step.batch)
    print(f"{anomaly.message}: {anomaly.action}; {location}", flush=True)


def _check_metadata(saved: Any, current: Any, checkpoint_dir: str | Path) -> None:
    """Raises ValueError if a run would resume with another model, data set or setting."""
    then, now = (flatten_paths({"": x}) for x in (saved, current))
    changed = [name for name in sorted(then.keys() | now.keys())
               if then.get(name) != now.get(name)]
    if changed:
        changes = "; ".join(f"{name.lstrip('/')} was {then.get(name)} and is {now.get(name)}"
                            for name in changed[:5])
        more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
        raise ValueError(f"the run in {checkpoint_dir} has another config: {changes}{more}; use "
                         "the same settings, another checkpoint_dir, or allow_config_mismatch")


def _place(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Places a state like the output of a train step, so that the second step is not recompiled.

    Without a mesh, arrays from a checkpoint are committed to their device and new arrays are not,
    but all outputs of a step are committed if one of its inputs is.
    """
    if mesh is not None:
        return jax.device_put(state, sharding.param_shardings(state, mesh))
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    devices = {device for x in arrays for device in x.devices()}
    return jax.device_put(state, *devices) if len(devices) == 1 else state


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and step % every == 0)


def _next_batch(batches: Batches, step: int, num_steps: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"the batches ended after step {step - 1} of {num_steps}; repeat the "
                         f"data, or reduce num_steps to {step - 1}") from None


def _count_tokens(batch: PyTree) -> int:
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    return 0 if tokens is None else int(np.size(tokens))
