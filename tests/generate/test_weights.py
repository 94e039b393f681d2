"""Kernels kept by outputs: the same passes, whatever edits the parameters have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2

from transformer_jax import sharding
from transformer_jax.finetune import deltas, shrink
from transformer_jax.generate import generate, weights
from transformer_jax.models import GPT, init_params
from transformer_jax.nn import layers
from transformer_jax.tree import flatten_paths

MODEL = GPT(GPT2)
PARAMS = init_params(MODEL, jax.random.key(0))


@pytest.mark.parametrize("rows", [1, 2, layers.FEW_ROWS, layers.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_of_few_rows(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 24), dtype)
    matrix = jax.random.normal(jax.random.key(1), (40, 24), dtype)
    ours = jax.jit(layers.by_outputs, static_argnums=2)(x, matrix, jnp.float32)
    assert ours.dtype == jnp.float32 and ours.shape == (rows, 1, 40)
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert layers.by_outputs(x, matrix).dtype == dtype


def test_few_rows_meet_a_matrix_on_the_left():
    """On a CPU, where the right side would be packed for each token."""
    x, matrix = jnp.ones((4, 24)), jnp.ones((40, 24))
    assert "f32[40,4]" in jax.jit(layers.by_outputs).lower(x, matrix).compile().as_text()
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        assert "f32[40,4]" not in jax.jit(layers.by_outputs).lower(x, matrix).compile().as_text()


@pytest.mark.parametrize("recipe", ["", "lora:2:all", "lora:2:all,dora", "adapter:4", "ia3",
                                    "prefix:3"])
def test_the_same_logits(recipe):
    params = PARAMS
    if recipe:
        params = jax.tree.map(lambda x: x + 0.01, deltas.add_deltas(
            params, recipe, jax.random.key(1)))
    turned = weights.by_outputs(params, jnp.float32)
    paths = flatten_paths(turned)
    assert ("decoder/layer_0/mlp/wi/kernel_t" in paths) == ("dora" not in recipe)
    assert ("decoder/layer_0/mlp/wi/kernel" in paths) == ("dora" in recipe)
    tokens = jnp.arange(12).reshape(2, 6)
    ours, theirs = (MODEL.apply({"params": p}, tokens).logits for p in (turned, params))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params["decoder"]["final_norm"],
                                     turned["decoder"]["final_norm"]))


def test_in_the_type_of_the_arithmetic():
    turned = flatten_paths(weights.by_outputs(PARAMS, jnp.bfloat16))
    kernel = PARAMS["decoder"]["layer_0"]["self_attention"]["out"]["kernel"]
    ours = turned["decoder/layer_0/self_attention/out/kernel_t"]
    np.testing.assert_array_equal(ours, kernel.astype(jnp.bfloat16).transpose(2, 0, 1))
    assert turned["token_embed/embedding"].dtype == jnp.bfloat16
    assert turned["decoder/layer_0/mlp/wi/bias"].dtype == jnp.float32


def test_on_a_mesh_kernels_stay_as_they_are():
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        turned = flatten_paths(weights.by_outputs(PARAMS, jnp.bfloat16))
    for path, leaf in flatten_paths(PARAMS).items():
        assert turned[path].shape == leaf.shape
        assert turned[path].dtype == (
            jnp.bfloat16 if path.endswith(("kernel", "embedding")) else leaf.dtype)


def test_int8_kernels_are_left_alone():
    small, _ = shrink.shrink(PARAMS, jax.tree.map(lambda x: False, PARAMS), "int8")
    turned = weights.by_outputs(small, jnp.float32)
    assert flatten_paths(turned).keys() == flatten_paths(small).keys()
    prompts = [[1, 2, 3], [4, 5]]
    np.testing.assert_array_equal(
        generate(MODEL, small, prompts, max_new_tokens=5),
        generate(MODEL, shrink.restore(small), prompts, max_new_tokens=5))
