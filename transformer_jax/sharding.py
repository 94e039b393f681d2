"""Meshes and where arrays live on them.

Two axes today. "data" copies the parameters and splits the batch. "fsdp" (fully sharded data
parallelism, Rajbhandari et al. 2020, "ZeRO", section 5) splits the batch too, and also splits every
large parameter with its optimizer state: XLA gathers a kernel just before it is used and scatters
its gradient after. So the batch is always cut over both axes, and which of the two is longer only
decides memory against communication, never the numbers.

    with jax.set_mesh(make_mesh(data=2, fsdp=4)) as mesh: ...

Meshes have Auto axes: we place inputs and a few intermediate values, XLA decides the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax.tree import PyTree, first_match, map_paths

BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, P], ...] = (
    (r"(_embed|lm_head)/embedding$", P(None, "fsdp")),  # [V or L, D]
    (r"attention/(query|key|value)/kernel$", P("fsdp", None, None)),  # [D, N, H]
    (r"attention/out/kernel$", P(None, None, "fsdp")),  # [N, H, D]
    (r"mlp/wi/kernel$", P("fsdp", None)),  # [D, F]
    (r"mlp/wo/kernel$", P(None, "fsdp")),  # [F, D]
    (r"kernel$", P("fsdp", None)),  # pooler, heads: [D, anything]
    (r"", P()),  # biases and norms, too small to be worth a gather
)
"""First match wins: a regular expression (searched) on the path, and how the leaf is cut.

How to read it: a spec names, for each dimension, the mesh axis that cuts it. "fsdp" always cuts
D (d_model), the one dimension that every large parameter has and that is nearly always a multiple
of the number of devices (a vocabulary of 50,257 is not); heads and mlp_dim stay whole, which leaves
them to tensor parallelism. Because rules are searched, they fit optimizer state as well: Adam's
"0/mu/decoder/layer_0/mlp/wi/kernel" lies exactly where its kernel does.

Specs line up with the *last* dimensions, so a stacked leading axis of layers stays whole. An axis
that the mesh lacks or that does not divide the dimension is dropped: that leaf is replicated there.
"""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp") over `devices` (all devices of all hosts by default).

    One size may be -1: it takes the devices that the other leaves.

    Raises:
      ValueError: a size below 1, both sizes -1, or a product that is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} = {size}; give at least 1, or -1 for the rest")
    if data == fsdp == -1:
        raise ValueError("mesh axes data and fsdp are both -1; only one can take the rest")
    known = max(data, 1) * max(fsdp, 1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices; "
            f"choose sizes whose product is {len(devices)}, or -1 for one of them"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, BATCH_AXES, (AxisType.Auto,) * 2, devices=devices)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec: None, a name, or a tuple of names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fit(spec: Sequence[Any], shape: Sequence[int], axis_sizes: dict[str, int]) -> P:
    """The spec for this shape: aligned right, without axes that are absent or do not divide."""
    if len(spec) > len(shape):
        return P()
    entries = [None] * (len(shape) - len(spec)) + list(spec)
    fitted = []
    for entry, size in zip(entries, shape):
        names = tuple(name for name in _names(entry) if name in axis_sizes)
        parts = int(np.prod([axis_sizes[name] for name in names]))
        keep = names if names and size % parts == 0 else ()
        fitted.append(None if not keep else keep[0] if len(keep) == 1 else keep)
    return P(*fitted)


def param_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf by `RULES`, for parameters, optimizer state or a whole state.

    Leaves may be abstract (`jax.eval_shape`). Scalars are replicated.
    """
    sizes = dict(mesh.shape)

    def place(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _fit(first_match(RULES, path), np.shape(leaf), sizes))

    return map_paths(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: its first dimension is cut over all of "data" and "fsdp"."""
    return NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape) or None))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays [B, ...] as arrays cut over the mesh.

    With several hosts every host passes its own rows, and B is the sum over hosts.

    Raises:
      ValueError: the global number of rows is not a multiple of the devices that share it.
    """
    sharding = batch_sharding(mesh)
    parts = int(np.prod([mesh.shape[a] for a in BATCH_AXES if a in mesh.shape]))

    def place(path: str, rows: Any) -> jax.Array:
        total = np.shape(rows)[0] * jax.process_count()
        if total % parts:
            raise ValueError(
                f"batch entry {path!r} has {total} rows, which {parts} devices cannot share "
                f"equally; use a batch size that is a multiple of {parts}"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    return map_paths(place, batch)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with one mesh axis (or several, or None) asked for each of its last dimensions.

    Without a mesh set by `jax.set_mesh`, or inside `jax.pmap` and `jax.shard_map` where arrays are
    already local, this is `x` itself: models run unchanged in a bare notebook. Axes that the mesh
    lacks or that do not divide the dimension are dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
        if kind == AxisType.Auto
    }
    spec = _fit(axes, x.shape, automatic)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_batch(x: jax.Array) -> jax.Array:
    """`constrain` for activations [B, ...]: rows cut like the batch, all else whole.

    Parameters are cut along D, and without this XLA would let activations take on that cut, and
    send them, or logits [B, T, V], over the network instead of the smaller parameters.
    """
    return constrain(x, BATCH_AXES, *[None] * (x.ndim - 1))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every leaf whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def init_sharded(init_fn: Callable[[Any], PyTree], rng: Any, mesh: Mesh) -> PyTree:
    """`init_fn(rng)` with every leaf born where `param_shardings` puts it.

    No device ever holds the whole tree, so a model larger than one device can be made. The values
    are those of `init_fn(rng)` without a mesh (JAX's random numbers do not depend on sharding).
    """
    shardings = param_shardings(jax.eval_shape(init_fn, rng), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(init_fn, out_shardings=shardings)(rng)
