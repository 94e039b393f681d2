"""Layers, on numbers computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.nn.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    Bias,
    Embed,
    LayerNorm,
    LazyLogits,
    Linear,
    make_position_embed,
    sinusoidal_positions,
)


def test_layer_norm_by_hand():
    # Mean 3, variance 4, epsilon 0: (1, 5) becomes (-1, 1).
    params = {"scale": jnp.asarray([2.0, 3.0]), "bias": jnp.asarray([0.5, 10.0])}
    out = LayerNorm(0.0).apply({"params": params}, jnp.asarray([[1.0, 5.0]]))
    np.testing.assert_allclose(out, [[-1.5, 13]], rtol=1e-6)


def test_layer_norm_epsilon_is_inside_the_square_root():
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    out = LayerNorm(5.0).apply({"params": params}, jnp.asarray([1.0, 5.0]))  # sqrt(4 + 5) = 3
    np.testing.assert_allclose(out, [-2 / 3, 2 / 3], rtol=1e-6)


def test_layer_norm_statistics_are_float32():
    # bfloat16 cannot represent 257.0: a bfloat16 mean would be off by one.
    x = jnp.asarray([256.0, 258.0, 260.0, 262.0], jnp.bfloat16)
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    out = LayerNorm(0.0, dtype=jnp.bfloat16).apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    expected = np.array([-3, -1, 1, 3]) / 5**0.5
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=5e-3)


def test_linear_keeps_head_axes():
    rng = np.random.default_rng(0)
    for layer, inputs, formula, shape in (
        (Linear((3, 2)), (6,), "btd,dnh->btnh", (6, 3, 2)),
        (Linear((6,), num_contracted_axes=2), (3, 2), "btnh,nhd->btd", (3, 2, 6)),
    ):
        x = rng.normal(size=(2, 5, *inputs)).astype(np.float32)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        assert {k: v.shape for k, v in shapes.items()} == {"kernel": shape, "bias": layer.features}
        params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
        expected = np.einsum(formula, x, params["kernel"]) + params["bias"]
        np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5,
                                   atol=1e-5)


def test_linear_adds_its_bias():
    params = {"kernel": jnp.asarray([[1.0], [2.0]]), "bias": jnp.asarray([10.0])}
    assert Linear((1,)).apply({"params": params}, jnp.asarray([3.0, 4.0])).tolist() == [21]


def test_embed_and_its_output_layer_use_one_table():
    table = jnp.asarray([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    embed, variables = Embed(3, 2), {"params": {"embedding": table}}
    assert embed.apply(variables, np.array([2, 0])).tolist() == [[3, 3], [1, 0]]
    lazy_logits = embed.apply(variables, jnp.asarray([1.0, 10.0]), method="project")
    assert lazy_logits.logits().tolist() == [1, 20, 33]


def test_bias_is_added():
    variables = {"params": {"bias": jnp.asarray([1.0, 2.0])}}
    lazy_logits = LazyLogits(jnp.asarray([[10.0, 20.0]]), jnp.eye(2))
    assert Bias(2).apply(variables, lazy_logits).logits().tolist() == [[11, 22]]


@pytest.mark.parametrize(
    ("name", "expected"),  # at -1, 0 and 1
    [
        ("gelu", [-0.1586553, 0, 0.8413447]),  # x times the normal cumulative distribution function
        ("gelu_tanh", [-0.1588080, 0, 0.8411920]),
        ("relu", [0, 0, 1]),
        ("swish", [-0.2689414, 0, 0.7310586]),
        ("tanh", [-0.7615942, 0, 0.7615942]),
    ],
)
def test_activations(name, expected):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray([-1.0, 0, 1])), expected, rtol=2e-6)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == {"gelu", "gelu_tanh", "relu", "swish", "tanh"}


def test_initializers():
    kernels = {name: np.asarray(make_init(0.02)(jax.random.key(0), (200, 200)))
               for name, make_init in INITIALIZERS.items()}
    np.testing.assert_allclose(kernels["normal"].std(), 0.02, rtol=0.02)
    assert np.abs(kernels["normal"]).max() > 0.06
    # Truncation at two standard deviations reduces the standard deviation by 0.8796, as in
    # TensorFlow and the release of BERT.
    assert np.abs(kernels["truncated_normal"]).max() <= 0.04
    np.testing.assert_allclose(kernels["truncated_normal"].std(), 0.02 * 0.8796, rtol=0.02)


def test_sinusoids_by_hand():
    # Four features: wavelengths 2 pi and 2 pi * 100; sine and cosine alternate.
    table = sinusoidal_positions(3, 4)
    expected = [
        [0, 1, 0, 1],
        [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)],
        [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)],
    ]
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    np.testing.assert_allclose(table[1], [0.84147, 0.54030, 0.0099998, 0.99995], rtol=1e-4)


def test_a_shift_of_sinusoids_is_a_rotation():
    # Vaswani et al. 2017, section 3.5: PE(p + k) is a linear function of PE(p).
    table = sinusoidal_positions(100, 8)
    pairs = table.reshape(100, 4, 2)
    products = np.einsum("pfi,pfi->pf", pairs[:-5], pairs[5:])  # cos(5 / wavelength), for all p
    np.testing.assert_allclose(products, np.tile(products[:1], (95, 1)), atol=1e-12)


def test_odd_features_raise():
    with pytest.raises(ValueError, match="features is 7; it must be even for sinusoidal positions"):
        sinusoidal_positions(4, 7)


def test_learned_positions_have_a_table_and_sinusoidal_ones_no_parameters():
    positions = np.array([[2, 0, 2]])
    make = functools.partial(make_position_embed, max_length=5, features=4, dtype=np.float32,
                             embedding_init=jax.nn.initializers.normal(0.02))
    learned = make("learned")
    out, variables = learned.init_with_output(jax.random.key(0), positions)
    table = variables["params"]["embedding"]
    assert table.shape == (5, 4)
    np.testing.assert_array_equal(out[0], table[np.array([2, 0, 2])])

    fixed = make("sinusoidal")
    out, variables = fixed.init_with_output(jax.random.key(0), positions)
    assert variables == {}
    np.testing.assert_allclose(out[0], sinusoidal_positions(5, 4)[[2, 0, 2]], rtol=1e-6)
