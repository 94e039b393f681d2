"""Checkpoints of a training run, written by Orbax: one subdirectory per saved step.

A checkpoint consists of separate items, so that each can be loaded without the others:

    params     the parameters (all that fine-tuning and generation need)
    opt_state  the optimizer state (absent if the optimizer has none)
    step       the number of updates
    rng        the random key of the run
    data       the states of the data iterator, the anomaly detector and the callbacks
    metadata   JSON values from the caller, such as the model config and the command line

and digests.json, a manifest of its files with their SHA-256 (`transformer_jax.storage`).

Arrays are restored with the shardings of a given abstract state, so a checkpoint saved on eight
devices can be restored on one, and vice versa. All other items are JSON; nothing is pickled.
Orbax gives a checkpoint its final name only after all of its files are on disk, and the manifest is
written last. A checkpoint without a manifest counts as incomplete, unless no checkpoint of the
directory has one (`checkpoint_files.saved_steps`). Restoring verifies the files against the
manifest and falls back to the previous step if one is corrupted.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from transformer_jax.train import checkpoint_files as files
from transformer_jax.train.anomalies import BadStepError
from transformer_jax.train.step import TrainState
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths


class Checkpoint(NamedTuple):
    """A restored checkpoint. The fields other than `state` are None if they were not saved."""

    state: TrainState
    rng: jax.Array | None
    data_state: Any
    metadata: Any


def save(
    directory: str | Path, step: int, state: TrainState, *, rng: jax.Array | None = None,
    data_state: Any = None, metadata: Any = None, keep: int | None = 3,
    metrics: Mapping[str, float] | None = None, keep_best: tuple[str, str] | None = None,
    wait: bool = True,
) -> files.PendingSave:
    """Saves a checkpoint, then deletes old checkpoints (see `keep` and `keep_best`).

    `step` is `state.step` and names the subdirectory. The arrays of `state` are copied to the host
    before this function returns, so they may be donated afterwards. `data_state` and `metadata` are
    JSON values; with several processes, the `data_state` of the first one is saved, so the
    iterators of all must be at the same position, as Grain's sharded iterators are. `keep` is the
    number of most recent checkpoints to keep, None for all, and `keep_best`, (name in `metrics`,
    "min" or "max"), keeps the best one as well. Without `wait`, the files are written in the
    background: call `result()` of the returned object before the next save and at the end.

    Raises:
        ValueError: the step is saved already, or an argument is out of range or not JSON.
        SaveError: the directory is not writable or has too little free space.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax
        >>> from transformer_jax.train.step import init_state
        >>> state = init_state({"w": jnp.ones(3)}, optax.adam(1e-3))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, 0, state, metadata={"seed": 1})
        ...     latest_step(directory), restore(directory, like=state).metadata
        (0, {'seed': 1})
    """
    metrics = dict(metrics or {})
    _check_retention(keep, keep_best, metrics)
    root = Path(directory).absolute()
    if step in files.saved_steps(root):
        raise ValueError(f"{root} already has a checkpoint of step {step}; choose another "
                         "directory or step")
    items = files.make_items(state, rng, data_state, metadata)
    files.check_disk_space(root, step, jax.tree.leaves([state.params, state.opt_state]))
    try:
        checkpointer = ocp.training.Checkpointer(
            root,
            context=files.orbax_context(),
            # The caller decides when to save, so every call saves.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_preservation_policy(keep, keep_best))
        response = checkpointer.save_checkpointables_async(step, items, metrics=metrics or None)
    except OSError as error:
        raise files.SaveError(
            f"step {step} cannot be saved in {root}: {files.first_line(error)}; choose another "
            "directory, or make this one writable") from error
    pending = files.PendingSave(root, step, checkpointer, response)
    if wait:
        pending.result()
    return pending


def check_best(best: str, name: str = "best") -> None:
    """Raises ValueError if `best`, the value of the option `name`, is not "min" or "max"."""
    if best not in ("min", "max"):
        raise ValueError(f"{name} is {best!r}; it must be 'min' or 'max'")


def _check_retention(
    keep: int | None, best: tuple[str, str] | None, metrics: Mapping[str, float]
) -> None:
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1, or None to keep all checkpoints")
    if best and (best[1] not in ("min", "max") or (metrics and best[0] not in metrics)):
        raise ValueError(f"keep_best is {best}; it must be the name of a metric "
                         f"({', '.join(metrics) or 'of the evaluation'}) and min or max")


def _preservation_policy(keep: int | None, best: tuple[str, str] | None):
    policies = ocp.training.preservation_policies
    if keep is None:
        return policies.PreserveAll()
    if best is None:
        return policies.LatestN(keep)
    return policies.AnyPreservationPolicy([policies.LatestN(keep), policies.BestN(
        get_metric_fn=lambda metrics: _rank(metrics[best[0]], best[1]), n=1,
        keep_checkpoints_without_metrics=False)])


def _rank(value: float, best: str) -> float:
    """Returns a number that is greater for better values; NaN is worst."""
    return -math.inf if math.isnan(value) else value if best == "max" else -value


def best_step(directory: str | Path, metric: str, best: str = "min") -> int | None:
    """Returns the step with the best value of an evaluation metric, or None if no step has it.

    `best` is "min" or "max". Of equal values, the last step is returned.
    """
    check_best(best)
    root = Path(directory).absolute()
    complete = files.saved_steps(root)
    if not complete:
        return None
    with ocp.training.Checkpointer(root, context=files.orbax_context()) as checkpointer:
        found = [(_rank(saved.metrics[metric], best), saved.step)
                 for saved in checkpointer.checkpoints
                 if saved.metrics and metric in saved.metrics and saved.step in complete]
    return max(found)[1] if found else None


def latest_step(directory: str | Path) -> int | None:
    """Returns the last step with a complete checkpoint, or None; the directory may not exist."""
    return max(files.saved_steps(Path(directory)), default=None)


def restore(directory: str | Path, like: TrainState, step: int | None = None) -> Checkpoint:
    """Restores a state with the random key, the data state and the metadata of its run.

    The restored arrays have the dtypes and shardings of `like`, a state, real or abstract
    (`jax.eval_shape`); a leaf without a sharding is restored onto the first device. By default the
    latest step that is not corrupted is restored; corrupted ones are reported on standard error.

    Raises:
        FileNotFoundError: the directory, or a checkpoint of `step`, does not exist.
        ValueError: the checkpoint has other parameters, shapes or optimizer state than `like`, or
            `step` is corrupted; without `step`, every checkpoint is.
    """
    path = files.verified_checkpoint_path(directory, step)
    loaded = files.load_items(path, {"params": like.params, "opt_state": like.opt_state})
    number = jax.device_put(np.asarray(loaded["step"], np.int32),
                            files.target_sharding(like.step))
    return Checkpoint(
        TrainState(number, loaded["params"], loaded["opt_state"]),
        files.rng_from_json(loaded.get("rng")), loaded.get("data"),
        loaded.get("metadata"))


def load_params(
    directory: str | Path, like: PyTree | None = None, step: int | None = None
) -> PyTree:
    """Loads only the parameters, for fine-tuning and generation; arguments and errors of `restore`.

    `like` is a tree of parameters, real or abstract. By default the parameters are loaded with
    their saved dtypes, as nested dicts on the first device.
    """
    path = files.verified_checkpoint_path(directory, step)
    if like is None:  # the saved shardings may have devices that this machine does not have
        like = unflatten_paths({
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in files.saved_arrays(path, "params").items()})
    return files.load_items(path, {"params": like})["params"]


def average_params(directory: str | Path, last: int, like: PyTree | None = None) -> PyTree:
    """Averages the parameters of the last checkpoints, as `load_params` loads them, leaf by leaf.

    With a high learning rate near the end of training, parameters oscillate around a minimum, and
    their mean is closer to it (Vaswani et al. 2017, section 6.1: the last 5 checkpoints, written
    at 10-minute intervals). It is computed in the dtypes of `like`, by default the saved ones.

    Raises:
        FileNotFoundError: the directory has fewer than `last` checkpoints.
        ValueError: `last` is below 1, or as in `restore`.
    """
    if last < 1:
        raise ValueError(f"last is {last}; it must be at least 1 checkpoint")
    saved = files.saved_steps(Path(directory).absolute())
    if len(saved) < last:
        raise FileNotFoundError(f"{directory} has {len(saved)} checkpoints, not {last}; average "
                                "fewer, or save with a larger keep")
    total = load_params(directory, like, saved[-1])
    for step in saved[len(saved) - last : -1]:
        total = jax.tree.map(jax.numpy.add, total, load_params(directory, like, step))
    return jax.tree.map(lambda x: (x / last).astype(x.dtype), total)


def load_metadata(directory: str | Path, step: int | None = None) -> Any:
    """Loads the metadata of a checkpoint, by default the latest one; None if none was saved."""
    return files.load_items(files.checkpoint_path(directory, step), {}).get("metadata")


# The checkpoints of `loop.fit` --------------------------------------------------------------------


class Stateful(Protocol):
    """An object whose state is stored with a checkpoint, as JSON values."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Checkpointer:
    """The checkpoint directory of a run of `loop.fit`: lock, resumption, saves and retention.

    Args:
        directory: the directory, which is locked against other runs; None saves no checkpoints.
        save_every: number of updates between checkpoints; 0 saves at the end of the run only.
        keep: number of most recent checkpoints to keep; None keeps all.
        keep_best: (metric of the evaluation, "min" or "max"): also keep the checkpoint with the
            best value, of those that were saved after an evaluation (`best_step`).
        metadata: the config of the run, as JSON values; saved with each checkpoint
            (`load_metadata`). When the run resumes, it must equal the saved one.
        allow_config_mismatch: resume even if `metadata` differs from the saved metadata.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self, directory: str | Path | None, *, save_every: int = 0, keep: int | None = 3,
        keep_best: tuple[str, str] | None = None, metadata: Any = None,
        allow_config_mismatch: bool = False,
    ):
        if save_every < 0:
            raise ValueError(f"save_every is {save_every}; it must be at least 0")
        _check_retention(keep, keep_best, {})
        self.directory, self.every = directory, save_every
        self.metadata, self.allow_config_mismatch = metadata, allow_config_mismatch
        self._retention = {"keep": keep, "keep_best": keep_best}
        self._pending: files.PendingSave | None = None

    @property
    def is_active(self) -> bool:
        """Whether checkpoints are saved."""
        return self.directory is not None

    def lock(self) -> contextlib.AbstractContextManager:
        """Returns a context manager that locks the directory against other runs."""
        return (files.directory_lock(self.directory) if self.is_active and jax.process_index() == 0
                else contextlib.nullcontext())

    def restore(
        self, state: TrainState, rng: jax.Array | None, stateful: Mapping[str, Stateful],
        before: int | None = None,
    ) -> tuple[TrainState, jax.Array | None]:
        """Restores the last checkpoint that is not corrupted, if any; returns the state and key.

        The objects in `stateful`, by the names of their states in the checkpoint, are restored too.
        Later checkpoints, which are corrupted or incomplete, are renamed. With `before`, the last
        checkpoint before this step is restored, and the directory is unchanged.
        """
        if not self.is_active:
            return state, rng
        saved = [step for step in files.saved_steps(Path(self.directory))
                 if before is None or step < before]
        if saved:
            found = restore(self.directory, state, None if before is None else saved[-1])
            self._check_metadata(found.metadata)
            state, rng = found.state, found.rng
            for name, item in stateful.items():
                if name in (found.data_state or {}):
                    item.set_state(found.data_state[name])
        if before is None and jax.process_index() == 0:
            files.quarantine_incomplete(self.directory, after=int(state.step))
        return state, rng

    def _check_metadata(self, saved: Any) -> None:
        """Raises ValueError if a run would resume with another model, data set or setting."""
        if self.allow_config_mismatch or self.metadata is None or saved is None:
            return
        current = files.to_json(self.metadata, "metadata")
        then, now = (flatten_paths({"": x}) for x in (saved, current))
        changed = [name for name in sorted(then.keys() | now.keys())
                   if then.get(name) != now.get(name)]
        if changed:
            changes = "; ".join(f"{name.lstrip('/')} was {then.get(name)} and is {now.get(name)}"
                                for name in changed[:5])
            more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
            raise ValueError(f"the run in {self.directory} has another config: {changes}{more}; "
                             "use the same settings, another directory, or allow_config_mismatch")

    def save(
        self, state: TrainState, rng: jax.Array | None, stateful: Mapping[str, Stateful],
        metrics: Mapping[str, float],
    ) -> None:
        """Starts to save a checkpoint, after the previous one is complete.

        `metrics` are those of an evaluation of `state`. States of `stateful` that are None are not
        saved.
        """
        if not self.is_active:
            return
        self.wait()
        states = {name: item.get_state() for name, item in stateful.items()}
        self._pending = save(
            self.directory, int(state.step), state, rng=rng, metadata=self.metadata,
            data_state={name: value for name, value in states.items() if value is not None},
            metrics=metrics, wait=False, **self._retention)

    def roll_back(self, like: TrainState, bad_step: int) -> TrainState:
        """Returns the state of the last checkpoint; BadStepError if there is none."""
        self.wait()
        if latest_step(self.directory) is None:
            raise BadStepError(
                f"cannot roll back from step {bad_step}, because {self.directory} contains no "
                "checkpoint yet; save more often (save_every), or skip bad steps", bad_step, None)
        return restore(self.directory, like).state

    def check(self) -> None:
        """Raises `SaveError` if the last save has failed, without waiting for it."""
        if self._pending is not None:
            self._pending.check()

    def wait(self) -> None:
        """Waits until the last save is complete, and raises `SaveError` if it has failed."""
        if self._pending is not None:
            self._pending.result()
