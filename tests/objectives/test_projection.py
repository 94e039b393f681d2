"""Cross-entropy without logits: equal to the one with them, in less memory, over any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import sharding
from transformer_jax.nn.layers import LazyLogits
from transformer_jax.objectives import chunked_cross_entropy, cross_entropy

B, T, D, V = 4, 6, 8, 37


def inputs(dtype=jnp.float32, bias=True):
    rng = np.random.default_rng(0)
    made = LazyLogits(
        jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), float),
        None, jnp.asarray(rng.normal(size=V), float) if bias else None)
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.7)
    return made, rng.integers(0, V, (B, T)).astype(np.int32), weights.astype(np.float32)


def whole(made, targets, weights, smoothing=0.0):
    """The three sums, from logits."""
    (loss, _), metrics = cross_entropy.token_losses(made.logits(), None, targets, weights, smoothing)
    return loss, metrics["nll"][0], metrics["accuracy"][0]


def gradients(fn, made, *args):
    """Values, and the gradients of three times the first."""
    def first(made):
        found = fn(made, *args)
        return 3 * found[0], found

    (_, found), grads = jax.jit(jax.value_and_grad(first, has_aux=True))(made)
    return jax.device_get((tuple(found), grads))


def assert_same(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        np.asarray(a, float), np.asarray(b, float), rtol=tolerance,
        atol=tolerance * max(np.abs(np.asarray(b, float)).max(), 1e-6)), found, expected)


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])  # 24 tokens: chunks that fit and that do not
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_and_gradients_are_those_of_the_logits(chunk, smoothing):
    args = inputs()
    found = gradients(functools.partial(chunked_cross_entropy.chunked_cross_entropy, smoothing=smoothing, chunk=chunk), *args)
    assert_same(found, gradients(functools.partial(whole, smoothing=smoothing), *args))


def test_a_table_of_int8_and_no_bias():
    made, targets, weights = inputs(bias=False)
    scale = jnp.linspace(0.01, 0.02, V)
    table = jnp.round(made.embedding * 50).astype(jnp.int8)

    def of(fn):
        def run(free, *args):
            hidden, scale = free
            return fn(LazyLogits(hidden, table, scale), *args)
        return run

    free = (made.hidden, scale)
    found = gradients(of(functools.partial(chunked_cross_entropy.chunked_cross_entropy, chunk=5)), free, targets, weights)
    assert_same(found, gradients(of(whole), free, targets, weights))


def test_bfloat16_hidden_states():
    made, targets, weights = inputs(jnp.bfloat16)
    found = gradients(functools.partial(chunked_cross_entropy.chunked_cross_entropy, chunk=5), made, targets, weights)
    assert found[1].hidden.dtype == jnp.bfloat16 and found[1].embedding.dtype == jnp.float32
    assert_same(found, gradients(whole, made, targets, weights), 2e-2)


ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a CPU's program")


@ON_CPU
def test_what_does_not_train_costs_no_product():
    """Four products of the forward pass and the gradient of the hidden states; six with the
    table's."""
    made, targets, weights = inputs()

    def flops(names):
        def loss(free):
            return chunked_cross_entropy.chunked_cross_entropy(made._replace(**free), targets, weights, chunk=24).loss

        free = {name: getattr(made, name) for name in names}
        return jax.jit(jax.grad(loss)).lower(free).compile().cost_analysis()["flops"]

    product = 2 * B * T * D * V
    assert flops(["hidden", "embedding"]) - flops(["hidden"]) == pytest.approx(product, rel=0.1)
    assert flops(["bias"]) < 2 * product


MESHES = {"data": {"data": 4}, "fsdp": {"data": 2, "fsdp": 2}, "tensor": {"data": 1, "tensor": 4},
          "sequence": {"data": 1, "sequence": 2}, "all": {"data": 2, "sequence": 2, "tensor": 2}}


@pytest.mark.parametrize("name", MESHES)
def test_over_a_mesh(name):
    sizes = MESHES[name]
    count = int(np.prod(list(sizes.values())))
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    devices = jax.devices()[:count]
    args = inputs()
    expected = gradients(whole, *args)
    mesh = sharding.make_mesh(**sizes, devices=devices)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.fit((sharding.BATCH_AXES, "sequence"), (B, T)))
        made = args[0]._replace(hidden=jax.device_put(args[0].hidden, rows))
        found = gradients(functools.partial(chunked_cross_entropy.chunked_cross_entropy, chunk=3), made,
                          *jax.device_put(args[1:], rows))
    assert_same(found, expected)


@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(check):
    """As under `make_train_step(axis_name=...)`: parameters differ by device, for all JAX knows."""
    made, targets, weights = inputs()
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((4,), ("rows",), (jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])

    def local(table, hidden, targets, weights):
        if check:
            table = jax.lax.pcast(table, "rows", to="varying")

        def loss(table):
            return chunked_cross_entropy.chunked_cross_entropy(LazyLogits(hidden, table), targets, weights, chunk=3).loss

        return jax.lax.psum(jax.value_and_grad(loss)(table), "rows")

    rows = jax.P("rows")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), rows, rows, rows),
                                  out_specs=jax.P(), check_vma=check))(
        made.embedding, made.hidden, targets, weights)
    expected = jax.value_and_grad(lambda table: whole(
        LazyLogits(made.hidden, table), targets, weights)[0])(made.embedding)
    assert_same(found, expected)


@ON_CPU
def test_memory_does_not_grow_with_the_vocabulary():
    """Temporary memory at 16,384 tokens of GPT-2's vocabulary, against their logits alone."""
    tokens, V, D = (1, 16_384), 50_257, 768
    made = LazyLogits(jax.ShapeDtypeStruct((*tokens, D), jnp.float32),
                      jax.ShapeDtypeStruct((V, D), jnp.float32))
    targets = jax.ShapeDtypeStruct(tokens, jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens, jnp.float32)

    def loss(made, targets, weights):
        return cross_entropy.token_losses(made.logits(), made, targets, weights)[0][0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(made, targets, weights).compile()
    logits = tokens[1] * V * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 8
