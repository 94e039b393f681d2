"""Checkpoints: a directory with one subdirectory per saved step, written by Orbax.

A step holds separate items, so that each can be read without the others:

  params      the parameters                      (fine-tuning and generation need only these)
  opt_state   the optimizer state                 (absent if the optimizer has none)
  step        the number of updates so far
  rng         the random key of the run
  data        where the data iterator stands
  metadata    what the caller wants to find again: the model's configuration, the command

and digests.json, a list of its files (`train.digests`).

Arrays are always restored onto abstract arrays that carry the target sharding, so a checkpoint
from eight devices opens on one, and the other way round. Everything else is JSON; nothing is ever
pickled. A step appears under its name only when all of it is on disk, and counts when its files are
listed: a process killed while saving leaves nothing that is taken for a checkpoint. A file that is
not what was written is found, and the step before it is used.
"""

import difflib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer_jax import storage
from transformer_jax.train.checkpoint_dirs import (
    SaveError,
    check_disk_space,
    checkpoint_path,
    latest_complete_step,
    steps,
)
from transformer_jax.train.step import TrainState
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

_JSON_ITEMS = ("step", "rng", "data", "metadata")


class Checkpoint(NamedTuple):
    """What `restore` returns."""

    state: TrainState
    rng: jax.Array | None
    data_state: Any
    metadata: Any


class PendingSave:
    """A save whose files are still being written. Call `result` before relying on them."""

    def __init__(self, root: Path, step: int, checkpointer: ocp.training.Checkpointer, response):
        self._root, self._step, self._error = root, step, None
        self._thread = threading.Thread(target=self._finish, args=(checkpointer, response))
        self._thread.start()

    def _finish(self, checkpointer, response) -> None:
        try:
            try:
                response.result()
            finally:
                checkpointer.close()
            if jax.process_index() == 0:
                storage.write_manifest(self._root / str(self._step))
        except Exception as error:  # raised where somebody looks
            self._error = error

    def check(self) -> None:
        """Raises what has gone wrong so far, once, without waiting."""
        if self._error is None or self._thread.is_alive():
            return
        error, self._error = self._error, None
        last = latest_step(self._root)
        raise SaveError(
            f"step {self._step} could not be saved in {self._root}: {_line(error)}; "
            + ("no step was saved before" if last is None else f"step {last} is safe")
            + ". Mend that, and the same command goes on from there") from error

    def result(self) -> None:
        """Waits until the checkpoint is complete, and raises what went wrong in the background."""
        self._thread.join()
        self.check()


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def save(
    directory: str | Path,
    step: int,
    state: TrainState,
    *,
    rng: jax.Array | None = None,
    data_state: Any = None,
    metadata: Any = None,
    keep: int | None = 3,
    metrics: Mapping[str, float] | None = None,
    keep_best: tuple[str, str] | None = None,
    wait: bool = True,
) -> PendingSave:
    """Saves a step, then deletes all but the last `keep` steps (None keeps all) and the best.

    Args:
      directory: of the run; it is created.
      step: names the checkpoint; the number of updates, as `state.step`.
      state: the arrays are copied to the host before this returns, so they may be donated after.
      rng: a typed or raw random key.
      data_state: what the data iterator's `get_state()` returned; JSON values only. With several
        hosts the first one's is kept: iterators must be in step, as Grain's sharded ones are.
      metadata: JSON values only.
      metrics: numbers of an evaluation, of which `keep_best` names one, and "min" or "max".
      wait: return when the files are complete. Otherwise files are written in the background and
        the caller calls `result()` on the returned save before saving again, and at the end.

    Raises:
      ValueError: the step is saved already, `keep` is below 1, `keep_best` names no metric, or
        `data_state` or `metadata` holds what JSON cannot.
      SaveError: the folder cannot be written, or has no room.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}; keep at least 1 checkpoint, or None for all")
    metrics = dict(metrics or {})
    if keep_best is not None and (keep_best[1] not in ("min", "max")
                                  or (metrics and keep_best[0] not in metrics)):
        raise ValueError(f"keep_best is {keep_best}; give one of {', '.join(metrics) or 'the'} "
                         "metrics, and min or max")
    root = Path(directory).absolute()
    if step in steps(root):
        raise ValueError(f"{root} already has step {step}; choose another directory or step")
    items = {
        "params": _as_dict(state.params),
        "opt_state": _as_dict(state.opt_state) or None,  # Orbax has no empty trees
        "step": int(state.step),
        "rng": _pack_rng(rng),
        "data": as_json(data_state, "data_state"),
        "metadata": as_json(metadata, "metadata"),
    }
    items = {name: item for name, item in items.items() if item is not None}
    check_disk_space(root, step, jax.tree.leaves([state.params, state.opt_state]))
    try:
        checkpointer = ocp.training.Checkpointer(
            root,
            context=_context(),
            # Saving is the caller's decision, so every call saves.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_kept(keep, keep_best),
        )
        response = checkpointer.save_checkpointables_async(step, items, metrics=metrics or None)
    except OSError as error:
        raise SaveError(f"step {step} cannot be saved in {root}: {_line(error)}; choose another "
                        "folder, or let this one be written") from error
    pending = PendingSave(root, step, checkpointer, response)
    if wait:
        pending.result()
    return pending


def _kept(keep: int | None, best: tuple[str, str] | None):
    policies = ocp.training.preservation_policies
    if keep is None:
        return policies.PreserveAll()
    if best is None:
        return policies.LatestN(keep)
    return policies.AnyPreservationPolicy([policies.LatestN(keep), policies.BestN(
        get_metric_fn=lambda metrics: metrics[best[0]], reverse=best[1] == "min", n=1,
        keep_checkpoints_without_metrics=False)])


def best_step(directory: str | Path, metric: str, best: str = "min") -> int | None:
    """The step whose evaluation was the best by a metric; None if no saved step has it.

    Args:
      best: "min" or "max".
    """
    root = Path(directory).absolute()
    if not steps(root):
        return None
    with ocp.training.Checkpointer(root, context=_context()) as checkpointer:
        found = [(one.metrics[metric], one.step) for one in checkpointer.checkpoints
                 if one.metrics and metric in one.metrics and one.step in steps(root)]
    return {"min": min, "max": max}[best](found)[1] if found else None


def latest_step(directory: str | Path) -> int | None:
    """The last complete step in the directory, or None (also when there is no directory)."""
    return max(steps(Path(directory)), default=None)


def restore(directory: str | Path, like: TrainState, step: int | None = None) -> Checkpoint:
    """The whole state at `step`, with the run's key, data and metadata; by default of the latest
    step whose files are what was written. Damaged ones after it are named on standard error.

    Args:
      like: a state, real or abstract (`jax.eval_shape`). Values come with its dtypes and with the
        shardings of its leaves; a leaf without one goes to the first device.

    Raises:
      FileNotFoundError: no such directory, or no such checkpoint in it.
      ValueError: the checkpoint has other parameters or another optimizer, or other shapes; or it,
        or every one, is damaged.
    """
    path = latest_complete_step(directory, step)
    trees = {"params": like.params, "opt_state": like.opt_state}
    loaded = _load(path, {name: _abstract(item) for name, item in trees.items()})
    restored = {
        name: jax.tree.unflatten(jax.tree.structure(item), _leaves(loaded[name], item))
        for name, item in trees.items()
    }
    number = np.asarray(loaded["step"], np.int32)
    placed = jax.device_put(number, _sharding(like.step))
    return Checkpoint(
        TrainState(placed, **restored),
        _unpack_rng(loaded.get("rng")),
        loaded.get("data"),
        loaded.get("metadata"),
    )


def load_params(
    directory: str | Path, like: PyTree | None = None, step: int | None = None
) -> PyTree:
    """The parameters alone, for fine-tuning and generation.

    Args:
      like: parameters, real or abstract, that set dtypes and shardings; by default the parameters
        come as they were saved, as a nested dict on the first device.

    Raises: as `restore`.
    """
    path = latest_complete_step(directory, step)
    if like is not None:
        loaded = _load(path, {"params": _abstract(like)})["params"]
        return jax.tree.unflatten(jax.tree.structure(like), _leaves(loaded, like))
    # The saved shardings are left out: they name devices that may not be here.
    saved = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
             for name, leaf in _saved_arrays(path, "params").items()}
    return _load(path, {"params": _abstract(unflatten_paths(saved))})["params"]


def average_params(directory: str | Path, last: int, like: PyTree | None = None) -> PyTree:
    """The mean of the parameters at the last steps that are kept, leaf by leaf in float32.

    Near the end of training at a high rate, parameters walk around what they seek; their mean lies
    nearer (Vaswani et al. 2017, section 6.1: the last 5, written every 10 minutes).

    Raises:
      FileNotFoundError: fewer steps are kept; save with a larger `keep`.
      ValueError: `last` is below 1; or as `restore`.
    """
    if last < 1:
        raise ValueError(f"last is {last}; average at least 1 checkpoint")
    saved = steps(Path(directory).absolute())
    if len(saved) < last:
        raise FileNotFoundError(f"{directory} keeps {len(saved)} checkpoints, not {last}; average "
                                "fewer, or save with a larger keep")
    total = load_params(directory, like, saved[-1])
    for step in saved[len(saved) - last : -1]:
        total = jax.tree.map(jax.numpy.add, total, load_params(directory, like, step))
    return jax.tree.map(lambda x: (x / last).astype(x.dtype), total)


def load_metadata(directory: str | Path, step: int | None = None) -> Any:
    """The metadata that was saved, or None. Raises FileNotFoundError as `restore` does."""
    return _load(checkpoint_path(directory, step), {}).get("metadata")


# Trees and numbers as Orbax takes them -----------------------------------------------------------


def _context() -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in _JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    return context


def _as_dict(tree: PyTree) -> dict[str, Any]:
    """Any pytree as nested dicts by path, so that Optax may rename its classes."""
    return unflatten_paths(flatten_paths(tree))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def _abstract(tree: PyTree) -> PyTree:
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))

    return jax.tree.map(abstract, _as_dict(tree))


def _leaves(loaded: PyTree, like: PyTree) -> list[Any]:
    """The loaded leaves in the order of the tree that they go into."""
    values = flatten_paths(loaded)
    return [values[path] for path in flatten_paths(like)]


def _saved_arrays(path: Path, item: str) -> dict[str, Any]:
    """Path -> shape and dtype, without reading an array."""
    with _context():
        found = ocp.checkpointables_metadata(path).metadata
    return flatten_paths(found.get(item) or {})


def _load(path: Path, trees: Mapping[str, PyTree]) -> dict[str, Any]:
    """These trees of arrays onto their abstract leaves, and every JSON item."""
    for item, abstract in trees.items():
        _check(path, item, flatten_paths(abstract), _saved_arrays(path, item))
    wanted = {item: abstract for item, abstract in trees.items() if abstract}
    wanted |= {item: None for item in _JSON_ITEMS if (path / item).is_dir()}
    with _context():
        loaded = ocp.load_checkpointables(path, wanted)
    return {item: {} for item in trees} | dict(loaded)


def _check(path: Path, item: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises one line that names what of the checkpoint does not fit."""
    where = f"checkpoint {path}: {item}"
    for name, leaf in ours.items():
        if name in saved and tuple(saved[name].shape) != tuple(leaf.shape):
            raise ValueError(
                f"{where}/{name} has shape {tuple(saved[name].shape)}, not {tuple(leaf.shape)}; "
                "build the model with the configuration in the checkpoint's metadata"
            )
    cause = "model configuration" if item == "params" else "optimizer and choice of what trains"
    for missing, verb, pool in (
        (ours.keys() - saved.keys(), "lacks", saved),
        (saved.keys() - ours.keys(), "also has", ours),
    ):
        if missing:
            name = min(missing)
            near = difflib.get_close_matches(name, pool, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(
                f"{where} {verb} {len(missing)} arrays such as {name}{hint}; "
                f"use the {cause} that it was saved with"
            )


def as_json(value: Any, name: str) -> Any:
    """The value, if JSON can hold it as it is. NumPy numbers become Python's."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        raise ValueError(
            f"{name} holds a {type(item).__name__}, which JSON cannot; pass numbers, strings, "
            "lists and dicts"
        )

    return json.loads(json.dumps(value, default=plain))


def _pack_rng(rng: jax.Array | None) -> dict[str, Any] | None:
    """A key as JSON. `impl` is None for a raw key, an array of uint32."""
    if rng is None:
        return None
    typed = jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(rng) if typed else rng)
    return {"impl": str(jax.random.key_impl(rng)) if typed else None, "data": data.tolist()}


def _unpack_rng(packed: Mapping[str, Any] | None) -> jax.Array | None:
    if packed is None:
        return None
    data = jax.numpy.asarray(packed["data"], jax.numpy.uint32)
    if packed["impl"] is None:
        return data
    return jax.random.wrap_key_data(data, impl=packed["impl"])
