"""Parameters in the decoding layout give the same logits, with and without PEFT parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2

from transformer_jax import sharding
from transformer_jax.finetuning import frozen, peft
from transformer_jax.generation import decoding, generate
from transformer_jax.models import GPT, init_params
from transformer_jax.nn import backends, quantized
from transformer_jax.nn.backends.cpu import MATVEC_MAX_ROWS
from transformer_jax.tree import flatten_paths

MODEL = GPT(GPT2)
BFLOAT16 = GPT(GPT2.replace(dtype="bfloat16"))
PARAMS = init_params(MODEL, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, MATVEC_MAX_ROWS, MATVEC_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_transposed(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 24), dtype)
    matrix = jax.random.normal(jax.random.key(1), (40, 24), dtype)
    out = jax.jit(quantized.matmul_transposed, static_argnums=2)(x, matrix, jnp.float32)
    assert out.dtype == jnp.float32 and out.shape == (rows, 1, 40)
    expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert quantized.matmul_transposed(x, matrix).dtype == dtype


def test_the_matrix_is_the_left_operand_on_a_cpu():
    """XLA for CPUs would repack a right operand for each token."""
    x, matrix = jnp.ones((4, 24)), jnp.ones((40, 24))

    def compiled_text():
        return jax.jit(quantized.matmul_transposed).lower(x, matrix).compile().as_text()

    with backends.use("auto"):
        assert "f32[40,4]" in compiled_text()
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        assert "f32[40,4]" not in compiled_text()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["", "lora:2:all", "lora:2:all,dora", "adapter:4", "ia3",
                                  "prefix:3"])
def test_logits_are_equal(spec):
    params = PARAMS
    if spec:
        params = jax.tree.map(lambda x: x + 0.01, peft.add_peft_params(
            params, spec, jax.random.key(1)))
    converted = decoding.transpose_kernels_for_decoding(MODEL, params)
    paths = flatten_paths(converted)
    assert ("decoder/layer_0/mlp/wi/kernel_t" in paths) == ("dora" not in spec)
    assert ("decoder/layer_0/mlp/wi/kernel" in paths) == ("dora" in spec)
    tokens = jnp.arange(12).reshape(2, 6)
    found, expected = (MODEL.apply({"params": p}, tokens).logits for p in (converted, params))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params["decoder"]["final_norm"],
                                     converted["decoder"]["final_norm"]))


def test_kernels_have_the_compute_dtype():
    converted = flatten_paths(decoding.transpose_kernels_for_decoding(BFLOAT16, PARAMS))
    kernel = PARAMS["decoder"]["layer_0"]["self_attention"]["out"]["kernel"]
    found = converted["decoder/layer_0/self_attention/out/kernel_t"]
    np.testing.assert_array_equal(found, kernel.astype(jnp.bfloat16).transpose(2, 0, 1))
    assert converted["token_embed/embedding"].dtype == jnp.bfloat16
    assert converted["decoder/layer_0/mlp/wi/bias"].dtype == jnp.float32


@pytest.mark.slow
def test_parameters_converted_once():
    expected = generate(MODEL, PARAMS, [[5, 9], [7]], max_new_tokens=5)
    once = decoding.transpose_kernels_for_decoding(MODEL, PARAMS)
    twice = decoding.transpose_kernels_for_decoding(MODEL, once)
    for params in (once, twice):
        np.testing.assert_array_equal(
            expected, generate(MODEL, params, [[5, 9], [7]], max_new_tokens=5))
    assert jax.tree.map(jnp.shape, twice) == jax.tree.map(jnp.shape, once)

    quantized = frozen.quantize_frozen(PARAMS, jax.tree.map(lambda x: False, PARAMS), "int8")[0]
    expected = generate(MODEL, quantized, [[5, 9], [7]], max_new_tokens=5)
    once = decoding.transpose_kernels_for_decoding(MODEL, quantized)
    assert flatten_paths(once)["token_embed/embedding_t"].dtype == jnp.int8
    np.testing.assert_array_equal(
        expected, generate(MODEL, once, [[5, 9], [7]], max_new_tokens=5))


def test_donated_arrays_are_deleted():
    given = jax.tree.map(jnp.copy, PARAMS)
    converted = decoding.transpose_kernels_for_decoding(MODEL, given, donate=True)
    deleted = {path for path, leaf in flatten_paths(given).items() if leaf.is_deleted()}
    assert deleted == {path for path in flatten_paths(given) if path.endswith("/kernel")}
    assert generate(MODEL, converted, [[5]], max_new_tokens=2).shape == (1, 3)


def test_kernels_are_not_transposed_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        converted = flatten_paths(decoding.transpose_kernels_for_decoding(BFLOAT16, PARAMS))
    for path, leaf in flatten_paths(PARAMS).items():
        assert converted[path].shape == leaf.shape
        assert converted[path].dtype == (
            jnp.bfloat16 if path.endswith(("kernel", "embedding")) else leaf.dtype)


QUANTIZED, _ = frozen.quantize_frozen(PARAMS, jax.tree.map(lambda x: False, PARAMS), "int8")


def test_matmul_transposed_int8():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.integers(-127, 128, (40, 96)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, 40), jnp.float32)
    for rows in (1, 2, 5):
        x = jnp.asarray(rng.normal(size=(rows, 1, 96)) * 3, jnp.float32).at[0, 0, 0].set(0)
        found = jax.jit(quantized.matmul_transposed_int8)(x, matrix, scale)
        expected = np.einsum("btd,fd->btf", x, matrix) * scale
        assert found.shape == (rows, 1, 40) and found.dtype == jnp.float32
        # The rounding error of each input is at most half a step.
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert not quantized.matmul_transposed_int8(jnp.zeros((1, 96)), matrix, scale).any()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["", "lora:2:all"])
def test_int8_parameters_give_nearly_equal_logits(spec):
    quantized = QUANTIZED
    if spec:
        quantized = jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 else x,
                             peft.add_peft_params(QUANTIZED, spec, jax.random.key(1)))
    converted = decoding.transpose_kernels_for_decoding(MODEL, quantized)
    paths = flatten_paths(converted)
    assert paths["decoder/layer_0/mlp/wi/kernel_t"].dtype == jnp.int8
    assert paths["token_embed/embedding_t"].dtype == jnp.int8
    tokens = jnp.arange(12).reshape(2, 6)
    found, expected = (MODEL.apply({"params": p}, tokens).logits
                       for p in (converted,
                                 frozen.dequantize(quantized) if not spec else quantized))
    np.testing.assert_allclose(found, expected, atol=0.05 * float(jnp.abs(expected).max()))
    out = generate(MODEL, quantized, [[1, 2, 3], [4, 5]], max_new_tokens=5)
    assert out.shape == (2, 8)


def test_int8_parameters_are_unchanged_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        converted = decoding.transpose_kernels_for_decoding(MODEL, QUANTIZED)
    assert flatten_paths(converted).keys() == flatten_paths(QUANTIZED).keys()


@pytest.mark.slow
def test_int8_parameters_are_differentiable_outside_the_decoding_layout():
    """Only the decoding layout rounds inputs, which has no gradient."""
    def loss(embedding):
        params = QUANTIZED | {"position_embed": {"embedding": embedding}}
        return (MODEL.apply({"params": params}, jnp.arange(4)[None]).logits ** 2).sum()

    assert jnp.abs(jax.grad(loss)(PARAMS["position_embed"]["embedding"])).max() > 0
