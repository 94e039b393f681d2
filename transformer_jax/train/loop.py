"""The training loop: batches in, a trained state and its history out.

Everything mathematical is in the step (`train.step`); this file only feeds it, watches it and
saves it. Devices never wait for the host: the numbers of a step are read while the next one runs.
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

Row = dict[str, float]


class Batches(Protocol):
    """An endless iterator of batches that knows where it stands, such as Grain's.

    The state has to be JSON. It is needed for checkpoints only.
    """

    def __next__(self) -> PyTree: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class _Dispatched(NamedTuple):
    """A step that was sent to the devices and whose numbers nobody has read."""

    step: int  # counted from 1: the number of updates when it is done
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
    policy: anomalies.AnomalyPolicy = anomalies.STOP,
    replay_step: int | None = None,
    log_every: int = 10,
    writer: Any = None,
    on_log: Callable[[Row], None] | None = None,
    quiet: bool = False,
    tokens_per_batch: int | None = None,
    metadata: Any = None,
    allow_config_mismatch: bool = False,
    profile: tuple[str | Path, int] | None = None,
) -> tuple[TrainState, list[Row]]:
    """Trains until the state has seen `num_steps` updates, and resumes where a run was cut off.

    If `checkpoint_dir` holds a checkpoint, the state, the key and the position in the data come
    from the last one that is whole, and the run goes on bit for bit as if it had never stopped.
    With a `checkpoint_dir`, SIGTERM and, of a process that is alone, SIGINT save what there is and
    leave (`train.preemption`); and no other run may use it meanwhile.

    Args:
      state: from `train.step.init_state`. It is donated: use the returned state from then on.
      train_step: from `train.step.make_train_step`, not jitted; it is jitted here, once.
      batches: an iterator of batches of NumPy arrays. With several hosts, each yields its own rows.
      rng: the key of the whole run, None for no randomness. The step folds its number in.
      num_steps: updates in total, those before a resumption included.
      mesh: places parameters by `sharding.RULES` and cuts batches over the mesh.
      eval_fn: `eval_fn(params) -> {name: number}`, called every `eval_every` updates and at the
        end (0: at the end only). Its numbers appear as "eval_<name>".
      checkpoint_dir: where to save, every `save_every` updates and at the end (0: at the end only).
      keep: how many of the last checkpoints stay, None for all; averaging wants several.
      keep_best: a number of `eval_fn` and "min" or "max": the best checkpoint by it stays too
        (`checkpoint.best_step`). A step that is saved between two evaluations has the last's.
      policy: what to do about losses that are not finite, or spike.
      replay_step: do this step again, from the last checkpoint before it and the same batches: the
        history is its row, `checkpoint_dir` has its batch, and is otherwise left as it is.
      log_every: a row of history every so many updates, and for the last.
      writer: a `tensorboardX.SummaryWriter`, or anything with `add_scalar(tag, value, step)`.
      on_log: called with every row.
      quiet: no progress line.
      tokens_per_batch: of all hosts, for tokens per second; by default the size of the batch's
        "tokens", if it has them.
      metadata: what makes the run what it is; saved with every checkpoint, for
        `checkpoint.load_metadata`.
      profile: (folder, steps): a trace of so many steps, from the third of this call on, for
        TensorBoard or Perfetto; operations have the names of the modules that they are of.
      allow_config_mismatch: resume although `metadata`, if given, is not what was saved.

    Returns:
      The state after `num_steps` updates, and the history of this call: rows of "step", the step's
      metrics ("loss", "grad_norm", ...), "seconds" since the call, "compilations" since then (of
      evaluation too), and, averaged since the last row without compilation, evaluation and saving,
      "seconds_per_step", "data_wait_fraction" (of a step, in which devices may have waited for a batch, at
      most) and, where known, "tokens_per_second". Rows of evaluation have "step", "seconds" and the
      "eval_" numbers.

    Raises:
      Interrupted: the run was asked to end, and is saved; a SystemExit.
      NonFiniteLossError: names the step; nothing is saved over the last good checkpoint, and the
        batch is written beside it.
      SpikingLossError: likewise, where `policy` says so.
      ValueError: a count or `policy` is out of range, the batches end early or cannot say where
        they are, or the checkpoint does not fit the state or was saved with other `metadata`; or a
        step needs more memory than there is.
      SaveError: a checkpoint could not be written; raised at the step after.
      RuntimeError: another run holds `checkpoint_dir`.
    """
    for name, value, least in (
        ("num_steps", num_steps, 0),
        ("eval_every", eval_every, 0),
        ("save_every", save_every, 0),
        ("log_every", log_every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    watch = anomalies.AnomalyDetector(policy)
    wants_folder = [name for name, wanted in (
        ("replay_step", replay_step is not None),
        ("the policy to roll back", "rollback" in (policy.not_finite, policy.on_spike))) if wanted]
    if wants_folder and checkpoint_dir is None:
        raise ValueError(f"{wants_folder[0]} needs a checkpoint_dir")
    if replay_step is not None and not 0 < replay_step <= num_steps:
        raise ValueError(f"replay_step is {replay_step}, outside 1 to {num_steps} steps")
    if replay_step is not None:
        num_steps, log_every, quiet, eval_fn, save_every = replay_step, replay_step, True, None, 0
    if checkpoint_dir is not None and not hasattr(batches, "get_state"):
        raise ValueError(
            f"batches is a {type(batches).__name__} without get_state, so a checkpoint could not "
            "resume; pass a Grain iterator, or checkpoint_dir=None"
        )

    saves_here = checkpoint_dir is not None and replay_step is None
    with lock.hold(checkpoint_dir or "", saves_here and jax.process_index() == 0):
        began = time.perf_counter()
        state = _place(state, mesh)
        if checkpoint_dir is not None:
            state, rng = _resume(state, rng, batches, watch, checkpoint_dir, metadata,
                                 allow_config_mismatch, replay_step)
        start = int(state.step)
        if start > num_steps:
            raise ValueError(
                f"the state has seen {start} updates, more than num_steps = {num_steps}; train for "
                "longer, or choose another checkpoint_dir"
            )
        if start and not quiet:
            print(f"starting at step {start} of {num_steps}", flush=True)

        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)
        step_fn = CompiledStep(
            anomalies.skip_bad_updates(train_step, policy) if policy.skips else train_step, state, mesh)
        shares = sharding.process_data_shard(mesh).count
        history: list[Row] = []
        saving: checkpointing.PendingSave | None = None
        clock = StepTimer()
        waiting: _Dispatched | None = None
        evaluated: Row = {}

        with (
            contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
            progress(num_steps, start, quiet or jax.process_index() > 0) as report,
            preemption.catch_signals(saves_here) as asked,
            profiling.CompilationCounter() as compilations,
            contextlib.ExitStack() as tracing,
        ):

            def log(row: Row, kind: str) -> None:
                row = {**row, "seconds": time.perf_counter() - began}
                history.append(row)
                left = clock.mean * (num_steps - row["step"]) if clock.mean else None
                report(int(row["step"]), row, left)
                if writer is not None:
                    for name, value in row.items():
                        if name not in ("step", "seconds"):
                            tag = f"{kind}/{name.removeprefix('eval_')}"
                            writer.add_scalar(tag, value, int(row["step"]))
                if on_log is not None:
                    on_log(row)

            def read(sent: _Dispatched) -> bool:
                """Waits for a step, judges its numbers, and logs them if it is their turn. Whether
                the run has to go back to its last checkpoint."""
                metrics = {name: float(x) for name, x in jax.device_get(sent.metrics).items()}
                clock.tick()
                if (found := watch.judge(sent.step, metrics)) is not None:
                    _act(found, sent, checkpoint_dir)
                if sent.step == replay_step:
                    print(anomalies.write_batch(checkpoint_dir, replay_step, sent.batch, "replayed"))
                if not found and sent.step % log_every and sent.step != num_steps:
                    return False
                row = {"step": sent.step, "loss": metrics.pop("loss"), **metrics}
                row["compilations"] = compilations.count
                if lap := clock.lap():
                    seconds, row["data_wait_fraction"] = lap
                    row["seconds_per_step"] = seconds
                    if tokens := tokens_per_batch or _count_tokens(sent.batch) * shares:
                        row["tokens_per_second"] = tokens / seconds
                log(row, "train")
                return found is not None and found.action == "rollback"

            step, go_back = start, False
            try:
                while step < num_steps:
                    step += 1
                    fetching = time.perf_counter()
                    batch = _next(batches, step, num_steps)
                    placed = batch if mesh is None else sharding.shard_batch(batch, mesh)
                    # No step under way, or the last one done: devices had nothing to do meanwhile.
                    if (clock.runs if waiting is None else waiting.metrics["loss"].is_ready()):
                        clock.waited += time.perf_counter() - fetching
                    if profile is not None and step == min(start + 3, num_steps):
                        jax.profiler.start_trace(profile[0])
                        tracing.callback(jax.profiler.stop_trace)
                    limit = (np.float32(watch.limit(step)),) if policy.skips else ()
                    state, metrics = step_fn(state, placed, rng, *limit)
                    if profile is not None and step == start + 2 + profile[1]:
                        jax.block_until_ready(metrics)
                        tracing.close()
                        clock.restart()
                    if waiting is not None:
                        go_back = read(waiting)
                    if saving is not None:
                        saving.check()
                    waiting = _Dispatched(step, batch, metrics)
                    last = step == num_steps
                    leaves = None if last else asked(step)
                    evaluates = (eval_fn is not None and not leaves
                                 and _due(step, eval_every, last))
                    saves = saves_here and _due(step, save_every, last or bool(leaves))
                    if not go_back and (evaluates or saves or last):
                        go_back = read(waiting)
                        waiting = None
                    if go_back:
                        if saving is not None:
                            saving.result()
                        state = _place(_last_good(checkpoint_dir, like, waiting), mesh)
                        step, waiting, go_back = int(state.step), None, False
                        watch.forget(step)
                        log({"step": step, "rolled_back": 1.0}, "train")
                        clock.restart()
                        continue
                    if not (evaluates or saves or last):
                        continue
                    if evaluates:
                        evaluated = {name: float(x) for name, x in eval_fn(state.params).items()}
                        log({"step": step, **{f"eval_{name}": x
                                              for name, x in evaluated.items()}}, "eval")
                    if saves:
                        if saving is not None:
                            saving.result()
                        saving = checkpointing.save(
                            checkpoint_dir,
                            step,
                            state,
                            rng=rng,
                            data_state={"batches": batches.get_state(),
                                        "health": watch.get_state()},
                            metadata=metadata,
                            keep=keep,
                            metrics=evaluated,
                            keep_best=keep_best,
                            wait=False,
                        )
                    if leaves:
                        saving.result()
                        print(f"{leaves} at step {step} of {num_steps}: saved in "
                              f"{checkpoint_dir}; the same command goes on from there",
                              flush=True)
                        raise preemption.Preempted(leaves, step)
                    clock.restart()
            finally:
                if saving is not None:
                    saving.result()
        return state, history


def _resume(state: TrainState, rng, batches, watch, checkpoint_dir, metadata,
            allow_config_mismatch: bool, replay_step: int | None):
    """(state, key) of the last whole checkpoint, if there is one, with the batches and the watch
    moved to its place; and a folder in which every later step can be saved. To replay_step a step, of
    the last before it, and the folder as it is."""
    step = None
    if replay_step is not None:
        step = max((n for n in checkpoint_dirs.steps(Path(checkpoint_dir)) if n < replay_step), default=None)
    if step is not None or (replay_step is None and checkpointing.latest_step(checkpoint_dir) is not None):
        found = checkpointing.restore(checkpoint_dir, state, step)
        if not (allow_config_mismatch or metadata is None or found.metadata is None):
            _check_same(found.metadata, checkpointing.as_json(metadata, "metadata"), checkpoint_dir)
        state, rng = found.state, found.rng
        batches.set_state(found.data_state["batches"])
        watch.set_state(found.data_state["health"])
    if jax.process_index() == 0 and replay_step is None:
        checkpoint_dirs.quarantine_incomplete(checkpoint_dir, after=int(state.step))
    return state, rng


def _last_good(checkpoint_dir, like: TrainState, sent: _Dispatched | None) -> TrainState:
    """What a run goes back to."""
    if checkpointing.latest_step(checkpoint_dir) is None:
        raise anomalies.BadStepError(
            f"there is nothing to go back to: no step is saved in {checkpoint_dir} yet; save more "
            "often (save_every), or skip bad steps", sent.step if sent else 0, None)
    return checkpointing.restore(checkpoint_dir, like).state


def _act(bad: anomalies.Anomaly, sent: _Dispatched, checkpoint_dir: str | Path | None) -> None:
    """Writes the batch of a bad step, and ends the run or says what is done about it."""
    where = anomalies.write_batch(checkpoint_dir, sent.step, sent.batch)
    if bad.action == "stop":
        raise bad.error(f"{bad.what}; {where}; nothing was saved since. Lower the learning rate, "
                        "or look at the batch", sent.step, sent.batch)
    print(f"{bad.what}: {bad.action}; {where}", flush=True)


def _check_same(saved: Any, ours: Any, checkpoint_dir: str | Path) -> None:
    """Another model, data or rate would make another run of it."""
    then, now = (flatten_paths({"": x}) for x in (saved, ours))
    changed = [name for name in sorted(then.keys() | now.keys())
               if then.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name.lstrip('/')} was {then.get(name)} and is {now.get(name)}"
                         for name in changed[:5])
        more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
        raise ValueError(f"the run in {checkpoint_dir} was another: {told}{more}; give the same "
                         "settings, another folder, or allow_config_mismatch")


def _place(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The state where its steps will leave it, lest the second step compile anew.

    Without a mesh, leaves that came from a checkpoint are committed to their device and new ones
    are not, while everything that a step returns is, if anything that it took was.
    """
    if mesh is not None:
        return jax.device_put(state, sharding.param_shardings(state, mesh))
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    devices = {device for x in arrays for device in x.devices()}
    return jax.device_put(state, *devices) if len(devices) == 1 else state


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _next(batches: Batches, step: int, num_steps: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended after step {step - 1} of {num_steps}; repeat the data, or train "
            f"for {step - 1} steps"
        ) from None


def _count_tokens(batch: PyTree) -> int:
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    return 0 if tokens is None else int(np.size(tokens))
