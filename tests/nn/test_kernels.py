"""Kernels equal the plain products, in value and gradient; what they cannot do is left to those.

Splash attention runs interpreted here; the TPU compiler takes it in tests/tpu, and cuDNN's needs a
GPU: JAX_PLATFORMS=cuda.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import sharding
from transformer_jax.nn import fused_attention
from transformer_jax.nn.attention import Mask, dot_product_attention

B, T, N, H = 2, 768, 2, 16  # two blocks of 384, of which a causal mask hides one
DOCUMENTS = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)), axis=1)
REAL = np.arange(T) < np.array([[T], [500]])

MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "context": Mask(causal=True, attention_window=70),
    "padding": Mask(real=REAL),
    "documents": Mask(causal=True, query_documents=DOCUMENTS, key_documents=DOCUMENTS, real=REAL),
}
GPU = jax.default_backend() == "gpu"


def arrays(dtype=jnp.float32, S=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, length, N, H)), dtype) for length in (T, S, S)]


def value_and_gradients(kernel, mask, args):
    def total(args):
        out, _ = dot_product_attention(*args, mask, attention_impl=kernel)
        seen = jnp.where(jnp.asarray(REAL)[:, :, None, None], out.astype(jnp.float32), 0)
        return (seen * jnp.cos(jnp.arange(seen.size)).reshape(seen.shape)).sum(), seen

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return jax.device_get((out, grads))


def assert_same(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=tolerance)


@pytest.mark.parametrize("name", MASKS)
def test_splash_is_the_plain_products(name):
    args = arrays()
    assert fused_attention.select_implementation("splash", args[0], args[1], MASKS[name], False) == "splash"
    found = value_and_gradients("splash", MASKS[name], args)
    assert_same(found, value_and_gradients("xla", MASKS[name], args), 2e-5)


def test_splash_across_to_a_memory_of_another_length():
    args = arrays(S=128)
    mask = Mask(real=REAL[:, 400:528])
    assert_same(value_and_gradients("splash", mask, args),
                value_and_gradients("xla", mask, args), 2e-5)


@pytest.mark.parametrize(
    "sizes", [{"data": 2}, {"data": 1, "tensor": 2}, {"data": 1, "sequence": 2},
              {"data": 2, "sequence": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["documents", "padding"])
def test_splash_over_a_mesh(sizes, name):
    mask, args = MASKS[name], arrays()
    count = int(np.prod(list(sizes.values())))
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    devices = jax.devices()[:count]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        assert fused_attention.select_implementation("splash", args[0], args[1], mask, False) == "splash"
        found = value_and_gradients("splash", mask, args)
    assert_same(found, value_and_gradients("xla", mask, args), 2e-5)


@pytest.mark.skipif(not GPU, reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("name", MASKS)
def test_cudnn_is_the_plain_products(name):
    args = arrays(jnp.bfloat16)
    assert fused_attention.select_implementation("auto", args[0], args[1], MASKS[name], False) == "cudnn"
    found = value_and_gradients("cudnn", MASKS[name], args)
    assert_same(found, value_and_gradients("xla", MASKS[name], args), 5e-2)


FALLBACKS = {
    "dropout": ("splash", arrays(), Mask(), True),
    "a mask of booleans": ("splash", arrays(), Mask(allowed=jnp.ones((1, 1, T, T), bool)), False),
    "part of a block": ("splash", arrays(S=130), Mask(), False),
    "decoding": ("splash", [x[:, :1] for x in arrays()], Mask(causal=True), False),
    "float32 on a GPU": ("cudnn", arrays(), Mask(), False),
    "one token": ("cudnn", [x[:, :1] for x in arrays(jnp.bfloat16)], Mask(), False),
    "cuDNN's dropout": ("cudnn", arrays(jnp.bfloat16), Mask(), True),
    "16 bits that are to be exact": ("splash", arrays(jnp.bfloat16), Mask(), False),
    "no accelerator": ("auto", arrays(), Mask(), False),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_a_kernel_cannot_do_is_left_to_the_plain_products(name):
    kernel, (query, key, _), mask, dropped = FALLBACKS[name]
    if name == "no accelerator" and jax.default_backend() != "cpu":
        pytest.skip("there is one")
    assert fused_attention.select_implementation(kernel, query, key, mask, dropped) == "xla"


def test_the_choice_by_what_runs(monkeypatch):
    query, key, _ = arrays(jnp.bfloat16)
    for platform, capability, kernel in [
            ("tpu", None, "splash"), ("cpu", None, "xla"), ("gpu", "9.0", "cudnn"),
            ("gpu", "7.5", "xla"), ("gpu", "gfx942", "xla")]:
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        with jax.default_matmul_precision("default"):
            assert fused_attention.select_implementation("auto", query, key, Mask(causal=True), False) == kernel


def test_blocks_divide_the_length():
    assert [fused_attention.splash_block_size(n) for n in (128, 384, 512, 640, 768, 1024)] == [
        128, 384, 512, 128, 384, 512]
