"""Meshes and where arrays live on them.

Four axes, each with its own bargain:

    data      copies the parameters and splits the batch: the least communication
    fsdp      splits the batch too, and every large parameter with its optimizer state (fully
              sharded data parallelism: Rajbhandari et al. 2020, "ZeRO", section 5). XLA gathers a
              kernel just before it is used and scatters its gradient after
    sequence  splits the tokens of a row, for rows too long for one device. Keys and values are
              gathered before attention, all else is local (context parallelism)
    tensor    splits heads, mlp_dim and vocabulary (Shoeybi et al. 2019, "Megatron-LM", section 3);
              between sublayers it splits tokens instead (Korthikanti et al. 2022, section 4.2.2)

The batch is always cut over data and fsdp. No choice of sizes changes the numbers, only memory
against communication.

    with jax.set_mesh(make_mesh(data=2, fsdp=4)) as mesh: ...

Meshes have Auto axes: we place inputs and a few intermediate values, XLA decides the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax.tree import PyTree, first_match, map_paths

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, P], ...] = (
    (r"(token_embed|lm_head)/embedding(_int8)?$", P("tensor", "fsdp")),  # [V, D]
    (r"_embed/embedding(_int8)?$", P(None, "fsdp")),  # positions [L, D], segments
    (r"attention/(query|key|value)/kernel(_int8)?$", P("fsdp", "tensor", None)),  # [D, N, H]
    (r"attention/(query|key|value)/bias$", P("tensor", None)),  # [N, H]
    (r"attention/out/kernel(_int8)?$", P("tensor", None, "fsdp")),  # [N, H, D]
    (r"mlp/wi/kernel(_int8)?$", P("fsdp", "tensor")),  # [D, F]
    (r"mlp/wi/bias$", P("tensor")),  # [F]
    (r"mlp/wo/kernel(_int8)?$", P("tensor", "fsdp")),  # [F, D]
    (r"kernel(_int8)?$", P("fsdp", None)),  # pooler, heads: [D, anything]
    (r"", P()),  # the rest: too small to be worth a gather
)
"""First match wins: a regular expression (searched) on the path, and how the leaf is cut.

How to read it: a spec names, for each dimension, the mesh axis that cuts it. "fsdp" always cuts
D (d_model), the one dimension that every large parameter has and that is nearly always a multiple
of the number of devices (a vocabulary of 50,257 is not). "tensor" cuts what a sublayer works on in
parallel: the heads, mlp_dim, the vocabulary. Because rules are searched, they fit optimizer state
as well: Adam's "0/mu/decoder/layer_0/mlp/wi/kernel" lies exactly where its kernel does.

Specs line up with the *last* dimensions, so a stacked leading axis of layers stays whole. An axis
that the mesh lacks or that does not divide the dimension is dropped: that leaf is replicated there.
"""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (all devices of all hosts by default).

    One size may be -1: it takes the devices that the others leave. Devices of several TPU slices,
    or hosts of GPUs, which have a fast network inside and a slow one between them, are put so that
    "data" alone, which communicates least, spans slices; GPUs also where it cannot.

    Raises:
      ValueError: a size below 1, two sizes of -1, a product that is not the number of devices, or
        a "data" that several TPU slices cannot share.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, sequence, tensor)))
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} = {size}; give at least 1, or -1 for the rest")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {' and '.join(open_axes)} are -1; only one can take the rest")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % known or (not open_axes and known != len(devices)):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices; choose sizes whose product is "
            f"{len(devices)}, or -1 for one of them"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices and devices[0].platform == "tpu":
        raise ValueError(f"mesh axis data = {shape[0]} does not span {slices} slices of devices; "
                         f"make it a multiple of {slices}")
    if slices == 1 or shape[0] % slices:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec_axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec: None, a name, or a tuple of names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fit(spec: Sequence[Any], shape: Sequence[int], axis_sizes: dict[str, int]) -> P:
    """The spec for this shape: aligned right, without axes that are absent, of size 1, or do not
    divide."""
    if len(spec) > len(shape):
        return P()
    entries = [None] * (len(shape) - len(spec)) + list(spec)
    fitted = []
    for entry, size in zip(entries, shape):
        names = tuple(name for name in spec_axis_names(entry) if axis_sizes.get(name, 1) > 1)
        while size % int(np.prod([axis_sizes[name] for name in names])):
            names = names[:-1]
        fitted.append(None if not names else names[0] if len(names) == 1 else names)
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


def num_batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into; its rows must be a multiple."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape]))


class DataShard(NamedTuple):
    """Which part of every batch a process reads: that with number `index` of `count`."""

    index: int
    count: int


def process_data_shard(mesh: Mesh | None = None) -> DataShard:
    """The share of this process; all of every batch where there is no mesh. Processes whose devices
    hold the same rows, because "sequence" or "tensor" spans them, have the same share.

    Raises:
      ValueError: the rows of some processes overlap in part.
    """
    if mesh is None:
        return DataShard(0, 1)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _share(owners, [mesh.axis_names.index(a) for a in BATCH_AXES if a in mesh.shape],
                  jax.process_index())


def _share(owners: np.ndarray, batch_axes: Sequence[int], process: int) -> DataShard:
    """`data_share` of a process, given which process owns each device of the mesh."""
    blocks = np.moveaxis(owners, batch_axes, range(len(batch_axes)))
    blocks = blocks.reshape(int(np.prod(blocks.shape[: len(batch_axes)])), -1)
    shares = {tuple(np.flatnonzero((blocks == p).any(1)).tolist()) for p in np.unique(owners)}
    if sum(map(len, shares)) != len(blocks):
        raise ValueError(
            f"the processes' devices hold overlapping rows of a batch, in blocks {sorted(shares)} "
            f"of {len(blocks)}; choose mesh sizes of which data * fsdp, or sequence * tensor, is a "
            "multiple of the devices of a process"
        )
    mine = next(s for s in sorted(shares) if (blocks[list(s)] == process).any())
    return DataShard(sorted(shares).index(mine), len(shares))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays [B, ...] as arrays cut over the mesh.

    With several hosts every host passes the rows of its `data_share`, and B is the sum over shares.

    Raises:
      ValueError: the global number of rows is not a multiple of the devices that share it.
    """
    sharding = batch_sharding(mesh)
    parts = num_batch_shards(mesh)
    shares = process_data_shard(mesh).count if jax.process_count() > 1 else 1

    def place(path: str, rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        total = len(rows) * shares
        if total % parts:
            raise ValueError(
                f"batch entry {path!r} has {total} rows, which {parts} devices cannot share "
                f"equally; use a batch size that is a multiple of {parts}"
            )
        shape = (total, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return map_paths(place, batch)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with one mesh axis (or several, or None) asked for each of its last dimensions.

    Without a mesh set by `jax.set_mesh`, or inside `jax.pmap` and `jax.shard_map` where arrays are
    already local, this is `x` itself: models run unchanged in a bare notebook. Axes that the mesh
    lacks or that do not divide the dimension are dropped.
    """
    spec = fit(axes, x.shape)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def fit(axes: Sequence[Any], shape: Sequence[int]) -> P:
    """What `constrain` asks for, given an array's shape."""
    return _fit(axes, shape, _automatic())


def num_shards(entry: Any) -> int:
    """Into how many parts the axes of one entry of a spec cut a dimension, on the mesh at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[name] for name in spec_axis_names(entry)]))


def axis_size(name: str) -> int:
    """The size of an axis of the mesh set by `jax.set_mesh`; 1 where `constrain` would drop it."""
    return _automatic().get(name, 1)


def varying(x: Any) -> frozenset[str]:
    """The axes along which `x` is known to differ by device: of `jax.shard_map`, which keeps count
    of them unless it was told `check_vma=False`."""
    kind = getattr(getattr(x, "aval", None), "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", ()))


def _automatic() -> dict[str, int]:
    """Axes along which arrays are global and XLA decides how they are cut."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size
            for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
            if kind == AxisType.Auto}


def constrain_hidden(x: jax.Array) -> jax.Array:
    """`constrain` for the residual stream [B, T, D]: rows cut like the batch, tokens by all else.

    Parameters are cut along D, and without this XLA would let activations take on that cut, and
    send them over the network instead of the smaller parameters.
    """
    return constrain(x, BATCH_AXES, ("sequence", "tensor"), None)


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
