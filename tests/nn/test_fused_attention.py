"""Fused attention on meshes, and the inputs that it does not support.

Splash attention is interpreted here; tests/tpu compiles it for TPUs. `test_backends` compares the
implementations with the reference.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import sharding
from transformer_jax.nn import backends
from transformer_jax.nn.attention import Mask, dot_product_attention
from transformer_jax.nn.backends import gpu, tpu
from transformer_jax.nn.backends.tpu import splash_block_size


@pytest.fixture(autouse=True)
def variants():
    """These tests compare variants, whatever TRANSFORMER_JAX_IMPLEMENTATION is."""
    with backends.use("auto"):
        yield


B, T, N, H = 2, 768, 2, 16  # two blocks of 384; a causal mask excludes one block of scores
DOCUMENT_IDS = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)), axis=1)
PADDING_MASK = np.arange(T) < np.array([[T], [500]])

MASKS = {
    "padding": Mask(padding_mask=PADDING_MASK),
    "documents": Mask(causal=True, query_document_ids=DOCUMENT_IDS, key_document_ids=DOCUMENT_IDS,
                      padding_mask=PADDING_MASK),
}


def select_implementation(name, query, key, mask, has_dropout) -> str:
    variant = backends.select(
        "dot_product_attention", query, key, key, mask, attention_impl=name, dropout_rate=0.1,
        dropout_rng=jax.random.key(0) if has_dropout else None)
    return {tpu.splash_attention: "splash", gpu.cudnn_attention: "cudnn"}.get(variant, "xla")


def arrays(dtype=jnp.float32, S=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, length, N, H)), dtype) for length in (T, S, S)]


def value_and_gradients(attention_impl, mask, args):
    def loss(args):
        out, _ = dot_product_attention(*args, mask, attention_impl=attention_impl)
        is_token = jnp.asarray(PADDING_MASK)[:, :, None, None]
        out = jnp.where(is_token, out.astype(jnp.float32), 0)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
    return jax.device_get((out, grads))


def assert_same(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=tolerance)


def test_splash_cross_attention_to_another_length():
    args = arrays(S=128)
    mask = Mask(padding_mask=PADDING_MASK[:, 400:528])
    assert_same(value_and_gradients("splash", mask, args),
                value_and_gradients("xla", mask, args), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"data": 2}, {"data": 1, "tensor": 2}, {"data": 1, "sequence": 2},
              {"data": 2, "sequence": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["documents", "padding"])
def test_splash_on_a_mesh(sizes, name):
    mask, args = MASKS[name], arrays()
    count = int(np.prod(list(sizes.values())))
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    devices = jax.devices()[:count]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        assert select_implementation("splash", args[0], args[1], mask, False) == "splash"
        actual = value_and_gradients("splash", mask, args)
    assert_same(actual, value_and_gradients("xla", mask, args), 2e-5)


FALLBACKS = {
    "dropout": ("splash", arrays(), Mask(), True),
    "dense mask": ("splash", arrays(), Mask(dense_mask=jnp.ones((1, 1, T, T), bool)), False),
    "length that is no multiple of 128": ("splash", arrays(S=130), Mask(), False),
    "decoding": ("splash", [x[:, :1] for x in arrays()], Mask(causal=True), False),
    "float32 on a GPU": ("cudnn", arrays(), Mask(), False),
    "one token": ("cudnn", [x[:, :1] for x in arrays(jnp.bfloat16)], Mask(), False),
    "dropout with cuDNN": ("cudnn", arrays(jnp.bfloat16), Mask(), True),
    "16-bit inputs with high matmul precision": ("splash", arrays(jnp.bfloat16), Mask(), False),
    "no accelerator": ("auto", arrays(), Mask(), False),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_unsupported_inputs_fall_back_to_xla(name):
    attention_impl, (query, key, _), mask, has_dropout = FALLBACKS[name]
    if name == "no accelerator" and jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    assert select_implementation(attention_impl, query, key, mask, has_dropout) == "xla"


def test_default_of_each_platform(monkeypatch):
    query, key, _ = arrays(jnp.bfloat16)
    for platform, capability, expected in [
            ("tpu", None, "splash"), ("cpu", None, "xla"), ("gpu", "9.0", "cudnn"),
            ("gpu", "7.5", "xla"), ("gpu", "gfx942", "xla")]:
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        with jax.default_matmul_precision("default"):
            mask = Mask(causal=True)
            assert select_implementation("auto", query, key, mask, False) == expected


def test_block_sizes_divide_the_length():
    assert [splash_block_size(n) for n in (128, 384, 512, 640, 768, 1024)] == [
        128, 384, 512, 128, 384, 512]


def test_cudnn_gets_the_window_of_causal_masks_only(monkeypatch):
    """As in the reference, a mask that is not causal has no window."""
    windows = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, *, local_window_size, **_:
                        windows.append(local_window_size) or q)
    for causal in (True, False):
        gpu.cudnn_attention(*arrays(jnp.bfloat16), Mask(causal=causal, attention_window=4))
    assert windows == [(3, 0), None]
