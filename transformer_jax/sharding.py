"""Device meshes, and the sharding of parameters, batches and activations over them.

A mesh has four axes, each with a different trade-off between memory and communication:

    data      replicates the parameters and splits the batch; needs the least communication
    fsdp      splits the batch, and every large parameter with its optimizer state (fully sharded
              data parallelism: Rajbhandari et al. 2020, "ZeRO", section 5). XLA all-gathers a
              kernel just before it is used, and reduce-scatters its gradient afterwards
    sequence  splits the tokens of a row, for rows too long for one device. Keys and values are
              gathered before attention; everything else is computed locally (context parallelism)
    tensor    splits heads, mlp_dim and vocabulary (Shoeybi et al. 2019, "Megatron-LM", section 3);
              between sublayers it splits tokens instead (Korthikanti et al. 2022, section 4.2.2)

The axis sizes change memory use and communication, but not the computed values:

    with jax.set_mesh(make_mesh(data=2, fsdp=4)) as mesh: ...

All axes have type Auto: inputs and a few intermediate values are given a sharding, and XLA chooses
the others.
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
    (r"kernel(_int8)?$", P("fsdp", None)),  # pooler and heads: [D, any]
    (r"", P()),  # all others are replicated: too small to be worth a gather
)
"""(regular expression, partition spec) pairs: the first expression found in a path applies.

A spec names, for each dimension, the mesh axis that splits it. "fsdp" always splits D (d_model),
the one dimension that every large parameter has and that is nearly always divisible by the number
of devices (a vocabulary of 50,257 is not). "tensor" splits the dimension that a sublayer processes
in parallel: the heads, mlp_dim or the vocabulary. Expressions are matched by `re.search`, so they
also match the optimizer state: Adam's first moment "0/mu/decoder/layer_0/mlp/wi/kernel" has the
sharding of the parameter "decoder/layer_0/mlp/wi/kernel".

Specs are aligned with the *last* dimensions, so the leading axis of stacked layers is not split. A
mesh axis that does not exist or does not divide the dimension is dropped: the array is replicated
along it.
"""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a device mesh with the axes `MESH_AXES`.

    The network inside a TPU slice or a GPU host is fast, and the network between them is slow.
    Devices are therefore arranged so that only "data", the axis with the least communication, spans
    slices or hosts. If that is impossible, a ValueError is raised for TPUs, and GPUs are arranged
    without regard to hosts.

    Args:
        data: size of an axis, like `fsdp`, `sequence` and `tensor`. One of the four may be -1,
            which uses all remaining devices.
        devices: by default all devices of all hosts.

    Raises:
        ValueError: a size is below 1, two sizes are -1, the product of the sizes is not the number
            of devices, or `data` is not a multiple of the number of TPU slices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, sequence, tensor)))
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} = {size}; it must be at least 1, or -1 to use all "
                             "remaining devices")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {' and '.join(open_axes)} are -1; only one axis can use the "
                         "remaining devices")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % known or (not open_axes and known != len(devices)):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices; choose sizes whose product is "
            f"{len(devices)}, or -1 for one of them"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % num_slices and devices[0].platform == "tpu":
        raise ValueError(f"mesh axis data = {shape[0]} does not span {num_slices} slices of "
                         f"devices; it must be a multiple of {num_slices}")
    if num_slices == 1 or shape[0] % num_slices:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within_slice, across_slices = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(
            within_slice, across_slices, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec_axis_names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a spec: None, a name, or a tuple of names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fit_spec(spec: Sequence[Any], shape: Sequence[int], axis_sizes: dict[str, int]) -> P:
    """Aligns a spec with the last dimensions of a shape; a shape with fewer dimensions is
    replicated.

    Axes that do not exist, have size 1 or do not divide the dimension are dropped.
    """
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
    """Returns the sharding of every leaf, as determined by `RULES`.

    The leaves are real or abstract arrays: parameters, an optimizer state or a whole train state.
    Scalars are replicated.

    Example:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> shardings = param_shardings({"classifier": {"bias": np.zeros(3)}}, mesh)
        >>> shardings["classifier"]["bias"].is_fully_replicated
        True
    """
    sizes = dict(mesh.shape)

    def place(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _fit_spec(first_match(RULES, path), np.shape(leaf), sizes))

    return map_paths(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension is split over "data" and "fsdp"."""
    return NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape) or None))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch, which must divide its number of rows."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape]))


class DataShard(NamedTuple):
    """The part of every batch that a process loads: number `index` of `count` equal parts."""

    index: int
    count: int


def process_data_shard(mesh: Mesh | None = None) -> DataShard:
    """Returns the data shard of this process; without a mesh, the whole batch.

    Processes whose devices hold the same rows, because "sequence" or "tensor" spans them, have the
    same data shard.

    Raises:
        ValueError: the rows of two processes overlap, but are not the same.

    Example:
        >>> process_data_shard(make_mesh())  # in a single process
        DataShard(index=0, count=1)
    """
    if mesh is None:
        return DataShard(0, 1)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _data_shard(owners, [mesh.axis_names.index(a) for a in BATCH_AXES if a in mesh.shape],
                       jax.process_index())


def _data_shard(owners: np.ndarray, batch_axes: Sequence[int], process: int) -> DataShard:
    """Data shard of a process, given the process of each device and the axes that split a batch."""
    # blocks[i]: the processes whose devices hold batch shard i.
    blocks = np.moveaxis(owners, batch_axes, range(len(batch_axes)))
    blocks = blocks.reshape(int(np.prod(blocks.shape[: len(batch_axes)])), -1)
    shards = {tuple(np.flatnonzero((blocks == p).any(1)).tolist()) for p in np.unique(owners)}
    if sum(map(len, shards)) != len(blocks):
        raise ValueError(
            f"the devices of different processes hold overlapping rows of a batch (batch shards "
            f"{sorted(shards)} of {len(blocks)}); choose mesh sizes such that sequence * "
            "tensor is a multiple or a divisor of the number of devices per process"
        )
    own = next(s for s in sorted(shards) if (blocks[list(s)] == process).any())
    return DataShard(sorted(shards).index(own), len(shards))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Converts host arrays [B, ...] to arrays that are sharded over the mesh.

    With several processes, each passes the rows of its `process_data_shard`, and the global batch
    consists of the rows of all data shards.

    Raises:
        ValueError: the global number of rows is not a multiple of the number of batch shards.

    Example:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> shard_batch({"tokens": np.zeros((4, 8))}, mesh)["tokens"].shape
        (4, 8)
    """
    sharding = batch_sharding(mesh)
    num_parts = num_batch_shards(mesh)
    num_data_shards = process_data_shard(mesh).count if jax.process_count() > 1 else 1

    def place(path: str, rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        total = len(rows) * num_data_shards
        if total % num_parts:
            raise ValueError(
                f"batch entry {path!r} has {total} rows, which cannot be split equally into the "
                f"{num_parts} batch shards of the mesh (data * fsdp); use a batch size that is a "
                f"multiple of {num_parts}"
            )
        shape = (total, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return map_paths(place, batch)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the sharding of an array on the mesh set by `jax.set_mesh`.

    `axes` has, for each of the last dimensions of `x`, the mesh axis or tuple of axes that splits
    it, or None. Axes that the mesh does not have or that do not divide the dimension are dropped.
    If no mesh is set, and inside `jax.pmap` and `jax.shard_map`, where arrays are local already,
    `x` is returned unchanged.

    Example:
        >>> x = jax.numpy.ones((8, 4))
        >>> constrain(x, ("data", "fsdp"), None) is x  # no mesh is set
        True
    """
    spec = constraint_spec(axes, x.shape)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def constraint_spec(axes: Sequence[Any], shape: Sequence[int]) -> P:
    """Returns the partition spec that `constrain` applies to an array of this shape."""
    return _fit_spec(axes, shape, _auto_axis_sizes())


def num_shards(entry: Any) -> int:
    """Returns the number of shards of a dimension with this spec entry, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[name] for name in spec_axis_names(entry)]))


def axis_size(name: str) -> int:
    """Returns the size of an axis of the current mesh; 1 if `constrain` would drop the axis."""
    return _auto_axis_sizes().get(name, 1)


def varying_axes(x: Any) -> frozenset[str]:
    """Axes of an enclosing `jax.shard_map` over which `x` varies; none are known if
    check_vma=False.
    """
    axis_type = getattr(getattr(x, "aval", None), "manual_axis_type", None)
    return frozenset(getattr(axis_type, "varying", ()))


def _auto_axis_sizes() -> dict[str, int]:
    """Returns the sizes of the axes of the current mesh that have type Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size
            for name, size, axis_type in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
            if axis_type == AxisType.Auto}


def constrain_hidden(x: jax.Array) -> jax.Array:
    """Constrains the residual stream [B, T, D]: B is split like the batch, T over the other axes.

    Without this, XLA would split activations along D like the parameters, and communicate
    activations instead of the smaller parameters.
    """
    return constrain(x, BATCH_AXES, ("sequence", "tensor"), None)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every leaf to all devices of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def init_sharded(init_fn: Callable[[Any], PyTree], rng: Any, mesh: Mesh) -> PyTree:
    """Computes `init_fn(rng)`, a tree, directly with its `param_shardings`.

    No device ever holds the whole tree, so the model may be larger than the memory of one device.
    The values do not depend on the mesh, because JAX's random numbers do not depend on the
    sharding.

    Example:
        >>> init_fn = lambda rng: {"classifier": {"kernel": jax.random.normal(rng, (16, 3))}}
        >>> params = init_sharded(init_fn, jax.random.key(0), make_mesh(devices=jax.devices()[:1]))
        >>> params["classifier"]["kernel"].shape
        (16, 3)
    """
    shardings = param_shardings(jax.eval_shape(init_fn, rng), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(init_fn, out_shardings=shardings)(rng)
