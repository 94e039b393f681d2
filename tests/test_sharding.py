"""Meshes, sharding rules and constraints, on eight simulated devices."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from transformer_jax import sharding, tree

D, N, H, F, V = 16, 2, 8, 32, 50

# Each kind of parameter: path -> (shape, partition spec on a mesh of fsdp 4 x tensor 2).
SPECS = {
    "token_embed/embedding": ((V, D), P("tensor", "fsdp")),
    "position_embed/embedding": ((V, D), P(None, "fsdp")),
    "segment_embed/embedding": ((2, D), P(None, "fsdp")),
    "embed_norm/scale": ((D,), P(None)),
    "encoder/layer_0/self_attention/query/kernel": ((D, N, H), P("fsdp", "tensor", None)),
    "encoder/layer_0/self_attention/query/bias": ((N, H), P("tensor", None)),
    "encoder/layer_0/self_attention/key/kernel_int8": ((D, N, H), P("fsdp", "tensor", None)),
    "encoder/layer_0/self_attention/key/kernel_scale": ((N, H), P(None, None)),
    "encoder/layer_0/self_attention/out/kernel": ((N, H, D), P("tensor", None, "fsdp")),
    "encoder/layer_0/self_attention/out/bias": ((D,), P(None)),
    "encoder/layer_0/mlp/wi/kernel": ((D, F), P("fsdp", "tensor")),
    "encoder/layer_0/mlp/wi/bias": ((F,), P("tensor")),
    "encoder/layer_0/mlp/wo/kernel": ((F, D), P("tensor", "fsdp")),
    "encoder/layer_0/mlp_norm/scale": ((D,), P(None)),
    "pooler/kernel": ((D, D), P("fsdp", None)),
    "lm_head/embedding": ((V, D), P("tensor", "fsdp")),
    "mlm_head/dense/kernel": ((D, D), P("fsdp", None)),
    "mlm_head/output/bias": ((V,), P(None)),
    "nsp_head/kernel": ((D, 2), P("fsdp", None)),
    "classifier/kernel": ((D, 3), P("fsdp", None)),
}


def parameters() -> dict:
    return tree.unflatten_paths({path: jnp.ones(shape) for path, (shape, _) in SPECS.items()})


def specs(shardings) -> dict[str, P]:
    return {path: s.spec for path, s in tree.flatten_paths(shardings).items()}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (8, 1, 1, 1)), ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)), ({"fsdp": 8}, (1, 8, 1, 1)),
     ({"sequence": 4}, (2, 1, 4, 1)), ({"data": 1, "tensor": -1, "sequence": 2}, (1, 1, 2, 4))]
)
def test_make_mesh(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(
        zip(("data", "fsdp", "sequence", "tensor"), shape))


@dataclass(frozen=True)
class Chip:
    """A device of one of several slices."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "GPU"


def test_only_data_spans_slices():
    chips = [Chip(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh(data=4, fsdp=2, devices=chips)
    where = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)[:, :, 0, 0]
    np.testing.assert_array_equal(where, [[0, 0], [0, 0], [1, 1], [1, 1]])
    # Impossible with TPUs; GPUs only communicate more slowly.
    assert sharding.make_mesh(data=1, fsdp=8, devices=chips).shape["fsdp"] == 8
    chips = [dataclasses.replace(chip, platform="tpu") for chip in chips]
    with pytest.raises(ValueError, match=r"data = 1 does not span 2 slices .* a multiple of 2"):
        sharding.make_mesh(data=1, fsdp=8, devices=chips)


def test_make_mesh_of_some_devices():
    assert sharding.make_mesh(devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3, fsdp=1, sequence=1, tensor=1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3, .* does not fit 8 devices"),
        ({"data": 4, "fsdp": 1}, "data=4, fsdp=1, .* does not fit 8 devices"),
        ({"data": 0}, "mesh axis data = 0; it must be at least 1"),
        ({"data": -1, "tensor": -1}, "data and tensor are -1; only one axis can use the"),
    ],
)
def test_errors_of_make_mesh(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


FOUR_BY_TWO = {"data": 1, "fsdp": 4, "tensor": 2}


def test_the_sharding_of_every_parameter():
    found = specs(sharding.param_shardings(parameters(), sharding.make_mesh(**FOUR_BY_TWO)))
    assert {path: tuple(spec) for path, spec in found.items()} == {
        path: tuple(spec) for path, (_, spec) in SPECS.items()
    }


def test_an_axis_that_does_not_divide_is_dropped():
    odd = {"classifier": {"kernel": jnp.ones((12, 3))}}
    assert specs(sharding.param_shardings(odd, sharding.make_mesh(1, 8))) == {
        "classifier/kernel": P(None, None)
    }


def test_optimizer_state_has_the_sharding_of_its_parameter():
    state = jax.eval_shape(optax.adamw(1e-3).init, parameters())  # abstract arrays
    found = specs(sharding.param_shardings(state, sharding.make_mesh(**FOUR_BY_TWO)))
    assert found["0/count"] == P()
    for path, (_, spec) in SPECS.items():
        assert tuple(found[f"0/mu/{path}"]) == tuple(found[f"0/nu/{path}"]) == tuple(spec)


def test_stacked_layers_are_not_split_by_layer():
    stacked = tree.stack_layers(parameters())
    found = specs(sharding.param_shardings(stacked, sharding.make_mesh(**FOUR_BY_TWO)))
    assert found["encoder/layers/self_attention/query/kernel"] == P(None, "fsdp", "tensor", None)
    assert found["encoder/layers/mlp/wo/kernel"] == P(None, "tensor", "fsdp")


def test_a_mesh_without_the_axes_of_a_spec_replicates():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    found = specs(sharding.param_shardings(parameters(), mesh))
    assert not any(any(spec) for spec in found.values())
    assert sharding.batch_sharding(mesh).spec == P("data")


def test_shard_batch_splits_rows_over_both_axes():
    batch = {"tokens": np.arange(16 * 3).reshape(16, 3)}
    placed = sharding.shard_batch(batch, sharding.make_mesh(2, 4))["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match="'tokens' has 12 rows, which cannot be split equally"):
        sharding.shard_batch({"tokens": np.zeros((12, 3))}, sharding.make_mesh(2, 4))


def test_constrain_is_a_no_op_without_a_mesh():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ("data", "fsdp"), None) is x
    inside = jax.pmap(lambda x: sharding.constrain(x, "data", None), axis_name="data")
    np.testing.assert_array_equal(inside(jnp.ones((8, 8, 4))), 1)


def test_constrain_under_a_mesh():
    with jax.set_mesh(sharding.make_mesh(2, 4)):
        place = jax.jit(lambda x: sharding.constrain(x * 2, ("data", "fsdp"), None))
        assert place(jnp.ones((8, 4))).sharding.spec[0] == ("data", "fsdp")
        x = jnp.ones((6, 3))
        assert sharding.constrain(x, "fsdp", "tensor") is x  # nothing fits
        # Of several axes, only those that divide the dimension: six rows over data.
        assert place(x).sharding.spec == P("data")


# The process of each device of a mesh (data, fsdp, tensor), and the data shard of each process.
OWNERS = {
    "one process per block of rows": ([[[0], [1]], [[2], [3]]], [(0, 4), (1, 4), (2, 4), (3, 4)]),
    "two blocks per process": ([[[0], [0]], [[1], [1]]], [(0, 2), (1, 2)]),
    "tensor spans processes": ([[[0, 1]], [[2, 3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    "all processes hold all rows": ([[[0, 1, 2]]], [(0, 1)] * 3),
}


@pytest.mark.parametrize("name", OWNERS)
def test_processes_with_the_same_rows_have_the_same_data_shard(name):
    owners, shards = OWNERS[name]
    owners = np.array(owners)
    assert [sharding._data_shard(owners, [0, 1], p) for p in range(owners.max() + 1)] == shards


def test_partially_overlapping_rows_are_an_error():
    with pytest.raises(ValueError, match=r"overlapping rows .* \[\(0, 1\), \(1,\)\] of 2"):
        sharding._data_shard(np.array([[[0, 0]], [[0, 1]]]), [0, 1], 0)


def test_a_single_process_has_the_whole_batch():
    assert sharding.process_data_shard(sharding.make_mesh(2, 4)) == (0, 1)
    assert sharding.process_data_shard() == (0, 1)


def test_replicate():
    placed = sharding.replicate({"a": jnp.ones(3)}, sharding.make_mesh())
    assert placed["a"].is_fully_replicated
    assert len(placed["a"].sharding.device_set) == 8


def test_init_sharded_has_the_values_of_init():
    def init(rng):
        return {"classifier": {"kernel": jax.random.normal(rng, (D, 3)), "bias": jnp.zeros(3)}}

    rng = jax.random.key(0)
    params = sharding.init_sharded(init, rng, sharding.make_mesh(1, 8))
    kernel = params["classifier"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(init)(rng))
