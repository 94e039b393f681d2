"""Sinusoidal and learned position embeddings."""

import functools

import jax
import numpy as np
import pytest

from transformer_jax.nn.positions import make_position_embed, sinusoidal_positions


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
