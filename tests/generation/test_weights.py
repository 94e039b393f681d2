"""Kernels kept by outputs: the same passes, whatever edits the parameters have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2

from transformer_jax import sharding
from transformer_jax.finetuning import peft, quantize
from transformer_jax.generation import generate, kernel_layout
from transformer_jax.models import GPT, init_params
from transformer_jax.nn import layers
from transformer_jax.tree import flatten_paths

MODEL = GPT(GPT2)
PARAMS = init_params(MODEL, jax.random.key(0))


@pytest.mark.parametrize("rows", [1, 2, layers.MATVEC_MAX_ROWS, layers.MATVEC_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_of_few_rows(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 24), dtype)
    matrix = jax.random.normal(jax.random.key(1), (40, 24), dtype)
    ours = jax.jit(layers.matmul_transposed, static_argnums=2)(x, matrix, jnp.float32)
    assert ours.dtype == jnp.float32 and ours.shape == (rows, 1, 40)
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert layers.matmul_transposed(x, matrix).dtype == dtype


def test_few_rows_meet_a_matrix_on_the_left():
    """On a CPU, where the right side would be packed for each token."""
    x, matrix = jnp.ones((4, 24)), jnp.ones((40, 24))
    assert "f32[40,4]" in jax.jit(layers.matmul_transposed).lower(x, matrix).compile().as_text()
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        assert "f32[40,4]" not in jax.jit(layers.matmul_transposed).lower(x, matrix).compile().as_text()


@pytest.mark.parametrize("recipe", ["", "lora:2:all", "lora:2:all,dora", "adapter:4", "ia3",
                                    "prefix:3"])
def test_the_same_logits(recipe):
    params = PARAMS
    if recipe:
        params = jax.tree.map(lambda x: x + 0.01, peft.add_peft_params(
            params, recipe, jax.random.key(1)))
    turned = kernel_layout.transpose_kernels(params, jnp.float32)
    paths = flatten_paths(turned)
    assert ("decoder/layer_0/mlp/wi/kernel_t" in paths) == ("dora" not in recipe)
    assert ("decoder/layer_0/mlp/wi/kernel" in paths) == ("dora" in recipe)
    tokens = jnp.arange(12).reshape(2, 6)
    ours, theirs = (MODEL.apply({"params": p}, tokens).logits for p in (turned, params))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params["decoder"]["final_norm"],
                                     turned["decoder"]["final_norm"]))


def test_in_the_type_of_the_arithmetic():
    turned = flatten_paths(kernel_layout.transpose_kernels(PARAMS, jnp.bfloat16))
    kernel = PARAMS["decoder"]["layer_0"]["self_attention"]["out"]["kernel"]
    ours = turned["decoder/layer_0/self_attention/out/kernel_t"]
    np.testing.assert_array_equal(ours, kernel.astype(jnp.bfloat16).transpose(2, 0, 1))
    assert turned["token_embed/embedding"].dtype == jnp.bfloat16
    assert turned["decoder/layer_0/mlp/wi/bias"].dtype == jnp.float32


def test_parameters_prepared_once():
    want = generate(MODEL, PARAMS, [[5, 9], [7]], max_new_tokens=5)
    ready = kernel_layout.transpose_kernels_for_decoding(MODEL, PARAMS)
    again = kernel_layout.transpose_kernels_for_decoding(MODEL, ready)
    for params in (ready, again):
        np.testing.assert_array_equal(
            want, generate(MODEL, params, [[5, 9], [7]], max_new_tokens=5))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, ready)

    small = quantize.quantize_frozen(PARAMS, jax.tree.map(lambda x: False, PARAMS), "int8")[0]
    want = generate(MODEL, small, [[5, 9], [7]], max_new_tokens=5)
    ready = kernel_layout.transpose_kernels_for_decoding(MODEL, small)
    assert flatten_paths(ready)["token_embed/embedding_t"].dtype == jnp.int8
    np.testing.assert_array_equal(want, generate(MODEL, ready, [[5, 9], [7]], max_new_tokens=5))


def test_what_has_a_successor_is_given_up():
    given = jax.tree.map(jnp.copy, PARAMS)
    ready = kernel_layout.transpose_kernels_for_decoding(MODEL, given, donate=True)
    gone = {path for path, leaf in flatten_paths(given).items() if leaf.is_deleted()}
    assert gone == {path for path in flatten_paths(given) if path.endswith("/kernel")}
    assert generate(MODEL, ready, [[5]], max_new_tokens=2).shape == (1, 3)


def test_on_a_mesh_kernels_stay_as_they_are():
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        turned = flatten_paths(kernel_layout.transpose_kernels(PARAMS, jnp.bfloat16))
    for path, leaf in flatten_paths(PARAMS).items():
        assert turned[path].shape == leaf.shape
        assert turned[path].dtype == (
            jnp.bfloat16 if path.endswith(("kernel", "embedding")) else leaf.dtype)


SMALL, _ = quantize.quantize_frozen(PARAMS, jax.tree.map(lambda x: False, PARAMS), "int8")


def test_int8_on_both_sides():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.integers(-127, 128, (40, 96)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, 40), jnp.float32)
    for rows in (1, 2, 5):
        x = jnp.asarray(rng.normal(size=(rows, 1, 96)) * 3, jnp.float32).at[0, 0, 0].set(0)
        found = jax.jit(layers.matmul_transposed_int8)(x, matrix, scale)
        expected = np.einsum("btd,fd->btf", x, matrix) * scale
        assert found.shape == (rows, 1, 40) and found.dtype == jnp.float32
        # Each input is off by at most half a unit, all of random sign.
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert not layers.matmul_transposed_int8(jnp.zeros((1, 96)), matrix, scale).any()


@pytest.mark.parametrize("recipe", ["", "lora:2:all"])
def test_int8_parameters_write_nearly_the_same(recipe):
    small = SMALL
    if recipe:
        small = jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 else x,
                             peft.add_peft_params(SMALL, recipe, jax.random.key(1)))
    turned = kernel_layout.transpose_kernels(small, jnp.float32)
    paths = flatten_paths(turned)
    assert paths["decoder/layer_0/mlp/wi/kernel_t"].dtype == jnp.int8
    assert paths["token_embed/embedding_t"].dtype == jnp.int8
    tokens = jnp.arange(12).reshape(2, 6)
    ours, theirs = (MODEL.apply({"params": p}, tokens).logits
                    for p in (turned, quantize.dequantize(small) if not recipe else small))
    np.testing.assert_allclose(ours, theirs, atol=0.05 * float(jnp.abs(theirs).max()))
    text = generate(MODEL, small, [[1, 2, 3], [4, 5]], max_new_tokens=5)
    assert text.shape == (2, 8)


def test_int8_parameters_on_a_mesh_are_left_alone():
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        turned = kernel_layout.transpose_kernels(SMALL, jnp.float32)
    assert flatten_paths(turned).keys() == flatten_paths(SMALL).keys()


def test_int8_parameters_train_as_they_did():
    """Rounding inputs has no gradient: it is for writing only."""
    def loss(embedding):
        params = SMALL | {"position_embed": {"embedding": embedding}}
        return (MODEL.apply({"params": params}, jnp.arange(4)[None]).logits ** 2).sum()

    assert jnp.abs(jax.grad(loss)(PARAMS["position_embed"]["embedding"])).max() > 0
