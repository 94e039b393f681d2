"""Chunked cross-entropy equals that of the full logits, on any mesh, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from transformer_jax import sharding
from transformer_jax.nn import backends
from transformer_jax.nn.layers import LazyLogits
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.objectives.cross_entropy import chunked_cross_entropy, token_losses

B, T, D, V = 4, 6, 8, 37


def inputs(dtype=jnp.float32, bias=True):
    rng = np.random.default_rng(0)
    lazy_logits = LazyLogits(
        jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(rng.normal(size=(V, D)), float),
        None, jnp.asarray(rng.normal(size=V), float) if bias else None)
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.7)
    return lazy_logits, rng.integers(0, V, (B, T)).astype(np.int32), weights.astype(np.float32)


def unchunked(lazy_logits, targets, weights, label_smoothing=0.0):
    """The three sums, from the full logits."""
    loss, _, metrics = token_losses(lazy_logits.logits(), targets, weights, label_smoothing)
    return loss, metrics["nll"][0], metrics["accuracy"][0]


def values_and_grads(fn, x, *args):
    """The values of `fn(x, *args)`, and the gradient of three times the first of them."""
    def scaled_loss(x):
        values = fn(x, *args)
        return 3 * values[0], values

    (_, values), grads = jax.jit(jax.value_and_grad(scaled_loss, has_aux=True))(x)
    return jax.device_get((tuple(values), grads))


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        np.asarray(a, float), np.asarray(b, float), rtol=tolerance,
        atol=tolerance * max(np.abs(np.asarray(b, float)).max(), 1e-6)), actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 24, 100])  # of 24 tokens
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_sums_and_gradients_equal_those_of_full_logits(tokens_per_chunk, label_smoothing):
    args = inputs()
    actual = values_and_grads(functools.partial(
        chunked_cross_entropy, label_smoothing=label_smoothing,
        tokens_per_chunk=tokens_per_chunk), *args)
    assert_close(actual, values_and_grads(
        functools.partial(unchunked, label_smoothing=label_smoothing), *args))


def test_int8_embedding_without_bias():
    lazy_logits, targets, weights = inputs(bias=False)
    scale = jnp.linspace(0.01, 0.02, V)
    embedding = jnp.round(lazy_logits.embedding * 50).astype(jnp.int8)

    def with_frozen_embedding(fn):
        def run(trainable, *args):
            hidden, scale = trainable
            return fn(LazyLogits(hidden, embedding, scale), *args)
        return run

    args = (lazy_logits.hidden, scale), targets, weights
    chunked = functools.partial(chunked_cross_entropy, tokens_per_chunk=5)
    assert_close(values_and_grads(with_frozen_embedding(chunked), *args),
                 values_and_grads(with_frozen_embedding(unchunked), *args))


def test_bfloat16_hidden_states():
    args = inputs(jnp.bfloat16)
    actual = values_and_grads(functools.partial(chunked_cross_entropy, tokens_per_chunk=5), *args)
    grads = actual[1]
    assert grads.hidden.dtype == jnp.bfloat16 and grads.embedding.dtype == jnp.float32
    assert_close(actual, values_and_grads(unchunked, *args), 2e-2)


ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="analyzes a program for CPUs")


@ON_CPU
def test_frozen_parameters_cost_no_matrix_product():
    """The forward pass and the gradient of the hidden states take 4 B T D V FLOPs; with the
    gradient of the embedding, 6."""
    lazy_logits, targets, weights = inputs()

    def flops(names):
        def loss(trainable):
            return chunked_cross_entropy(lazy_logits._replace(**trainable), targets, weights,
                                         tokens_per_chunk=24).loss

        trainable = {name: getattr(lazy_logits, name) for name in names}
        return jax.jit(jax.grad(loss)).lower(trainable).compile().cost_analysis()["flops"]

    matmul = 2 * B * T * D * V
    assert flops(["hidden", "embedding"]) - flops(["hidden"]) == pytest.approx(matmul, rel=0.1)
    assert flops(["bias"]) < 2 * matmul


MESHES = {"data": {"data": 4}, "fsdp": {"data": 2, "fsdp": 2}, "tensor": {"data": 1, "tensor": 4},
          "sequence": {"data": 1, "sequence": 2}, "all": {"data": 2, "sequence": 2, "tensor": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh(name):
    sizes = MESHES[name]
    num_devices = int(np.prod(list(sizes.values())))
    if jax.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices")
    args = inputs()
    expected = values_and_grads(unchunked, *args)
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        spec = sharding.constraint_spec((sharding.BATCH_AXES, "sequence"), (B, T))
        token_sharding = jax.NamedSharding(mesh, spec)
        lazy_logits = args[0]._replace(hidden=jax.device_put(args[0].hidden, token_sharding))
        actual = values_and_grads(
            functools.partial(chunked_cross_entropy, tokens_per_chunk=3), lazy_logits,
            *jax.device_put(args[1:], token_sharding))
    assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """As in `make_train_step(axis_name=...)`: JAX treats the parameters as varying over devices."""
    lazy_logits, targets, weights = inputs()
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((4,), ("rows",), (jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])

    def local(embedding, hidden, targets, weights):
        if check_vma:
            embedding = jax.lax.pcast(embedding, "rows", to="varying")

        def loss(embedding):
            return chunked_cross_entropy(LazyLogits(hidden, embedding), targets, weights,
                                         tokens_per_chunk=3).loss

        return jax.lax.psum(jax.value_and_grad(loss)(embedding), "rows")

    rows = jax.P("rows")
    actual = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), rows, rows, rows),
                                   out_specs=jax.P(), check_vma=check_vma))(
        lazy_logits.embedding, lazy_logits.hidden, targets, weights)
    expected = jax.value_and_grad(lambda embedding: unchunked(
        LazyLogits(lazy_logits.hidden, embedding), targets, weights)[0])(lazy_logits.embedding)
    assert_close(actual, expected)


@ON_CPU
def test_memory_does_not_grow_with_the_vocabulary():
    """Temporary memory for 16,384 tokens of GPT-2's vocabulary is below 1/8 of their logits."""
    tokens, V, D = (1, 16_384), 50_257, 768
    lazy_logits = LazyLogits(jax.ShapeDtypeStruct((*tokens, D), jnp.float32),
                             jax.ShapeDtypeStruct((V, D), jnp.float32))
    targets = jax.ShapeDtypeStruct(tokens, jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens, jnp.float32)

    def loss(lazy_logits, targets, weights):
        return token_losses(lazy_logits, targets, weights)[0]

    with backends.use("auto"):  # the reference implementation computes all logits at once
        compiled = jax.jit(jax.value_and_grad(loss)).lower(lazy_logits, targets, weights).compile()
    logits_bytes = tokens[1] * V * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 8


@pytest.mark.slow
@pytest.mark.parametrize(("config", "loss_fn"), [
    (small_models.GPT2, causal_lm.loss), (small_models.BERT, mlm_nsp.loss),
    (small_models.BART, seq2seq.loss)], ids=lambda x: getattr(x, "__module__", None))
def test_losses_of_all_models_are_chunked(config, loss_fn):
    """A chunked loss is computed from the hidden states; the program has no full logits."""
    model, params = small_models.build(config.replace(num_layers=1))
    tokens = small_models.random_tokens(2, 6)
    ones = np.ones((2, 6), np.float32)
    batch = {"tokens": tokens, "targets": tokens, "weights": ones, "decoder_tokens": tokens,
             "padding_mask": ones > 0, "segment_ids": np.zeros_like(tokens),
             "masked_positions": np.zeros_like(tokens), "masked_targets": tokens,
             "masked_weights": ones}
    if loss_fn is causal_lm.loss:
        del batch["decoder_tokens"]

    def loss(params, logits_per_chunk=None):
        return loss_fn(model.apply, params, batch, logits_per_chunk=logits_per_chunk)

    chunked = functools.partial(loss, logits_per_chunk=1)
    assert_close(chunked(params), loss(params), 1e-4)
    logits = f"f32[2,6,{model.config.vocab_size}]"
    assert logits in str(jax.make_jaxpr(loss)(params))
    assert logits not in str(jax.make_jaxpr(chunked)(params))
