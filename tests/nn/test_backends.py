"""Every variant of `nn.backends` equals the reference implementation in value and gradient.

Splash attention and the cross-entropy kernel are interpreted here. cuDNN attention needs a GPU:
JAX_PLATFORMS=cuda.
"""

import ast
import functools
import inspect
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, TRANSFORMER, build, random_tokens

from transformer_jax import sharding
from transformer_jax.nn import attention, backends, layers, quantized
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.backends import cpu, gpu, tpu
from transformer_jax.objectives import causal_lm, cross_entropy

GPU = jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def variants():
    """These tests compare variants, whatever TRANSFORMER_JAX_IMPLEMENTATION is."""
    with backends.use("auto"):
        yield


OPERATIONS = {
    "dot_product_attention": attention.dot_product_attention,
    "matmul": quantized.matmul,
    "matmul_transposed": quantized.matmul_transposed,
    "int8_matmul_transposed": quantized.int8_matmul_transposed,
    "materialize_cotangent": layers.materialize_cotangent,
    "softmax_cross_entropy_and_grad": cross_entropy.softmax_cross_entropy_and_grad,
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


T = 256  # two blocks of queries on a CPU
QKV = [normal(2, T, 2, 16, seed=i) for i in range(3)]
IDS = np.sort(np.random.default_rng(1).integers(1, 4, (2, T)), axis=1)
PADDING = np.arange(T) < np.array([[T], [170]])
DROPOUT = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(9)}
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, attention_window=70),
    "padding": Mask(padding_mask=PADDING),
    "documents": Mask(causal=True, query_document_ids=IDS, key_document_ids=IDS,
                      padding_mask=PADDING),
    "dense": Mask(dense_mask=np.tri(T, dtype=bool)[None, None] | (np.arange(T) < 9)),
}


def case(variant, operation, arrays, tolerance=2e-5, num_differentiated=None, **options):
    """Arrays are the first arguments; gradients of the first `num_differentiated` are compared."""
    return variant, operation, arrays, tolerance, num_differentiated, options


CASES = {
    **{f"CPU attention, {name}": case(cpu.attention, "dot_product_attention", QKV, mask=mask)
       for name, mask in MASKS.items()},
    **{f"CPU attention, dropout, {name}": case(
        cpu.attention, "dot_product_attention", QKV, mask=MASKS[name], **DROPOUT)
       for name in ("full", "causal")},
    **{f"splash attention, {name}": case(
        tpu.splash_attention, "dot_product_attention", QKV, mask=MASKS[name])
       for name in ("full", "window", "padding", "documents")},
    "matmul": case(cpu.matmul, "matmul", [normal(2, 5, 3, 4), normal(3, 4, 6)],
                   num_contracted_axes=2),
    "query projection": case(cpu.matmul, "matmul", [normal(2, 5, 12), normal(12, 3, 4)]),
    **{f"transposed matmul of {rows} rows, {dtype}": case(
        cpu.matmul_transposed, "matmul_transposed",
        [normal(rows, 1, 24, dtype=dtype), normal(40, 24, dtype=dtype)],
        2e-5 if dtype == "float32" else 2e-2, dtype=jnp.float32)
       for rows in (1, cpu.MATVEC_MAX_ROWS, cpu.MATVEC_MAX_ROWS + 1)
       for dtype in ("float32", "bfloat16")},
    **{f"int8 matmul of {rows} rows": case(
        cpu.int8_matmul_transposed, "int8_matmul_transposed",
        [(normal(rows, 24) * 40).astype(jnp.int8), (normal(40, 24) * 40).astype(jnp.int8)], 0, 0)
       for rows in (1, 5)},
    "materialize_cotangent": case(cpu.materialize_cotangent, "materialize_cotangent", [normal(5)]),
    **{f"cross-entropy kernel, label smoothing {smoothing}": case(
        functools.partial(gpu.softmax_cross_entropy_and_grad, interpret=not GPU),
        "softmax_cross_entropy_and_grad", [normal(9, 128) * 9, normal(100)], 2e-5, 0,
        targets=np.arange(9) * 3, weights=np.linspace(0, 2, 9, dtype=np.float32), num_classes=100,
        label_smoothing=smoothing, dtype=jnp.float32) for smoothing in (0.0, 0.1)},
}
if GPU:
    CASES |= {f"cuDNN attention, {name}": case(
        gpu.cudnn_attention, "dot_product_attention", [x.astype(jnp.bfloat16) for x in QKV], 5e-2,
        mask=mask) for name, mask in MASKS.items()}


def values_and_grads(function, arrays, num_differentiated, options):
    """Values, and gradients of a sum of all floating-point values with fixed coefficients."""
    def total(*args):
        out = function(*args, **options)
        sums = [(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum()
                for x in jax.tree.leaves(out)]
        return sum(sums), out

    count = len(arrays) if num_differentiated is None else num_differentiated
    if not count:
        return jax.jit(functools.partial(function, **options))(*arrays), ()
    # The output of a query without any allowed key is not compared: its value is arbitrary.
    (_, out), grads = jax.jit(jax.value_and_grad(total, range(count), has_aux=True))(*arrays)
    return out, grads


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_variant_equals_the_reference(name):
    variant, operation, arrays, tolerance, num_differentiated, options = CASES[name]
    reference = OPERATIONS[operation].__wrapped__
    actual, expected = (
        jax.device_get(values_and_grads(function, arrays, num_differentiated, options))
        for function in (variant, reference))
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        scale = max(1.0, float(np.abs(b.astype(float)).max()))
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=tolerance * scale)


def test_every_variant_has_a_case_and_the_signature_of_its_reference():
    assert backends.VARIANTS.keys() == OPERATIONS.keys()
    tested = {getattr(function, "func", function) for function, *_ in CASES.values()}
    tested.add(gpu.cudnn_attention)
    for name, variants in backends.VARIANTS.items():
        expected = list(inspect.signature(OPERATIONS[name]).parameters)
        for variant in variants:
            assert variant.implementation in tested, f"{name}: add a case to CASES"
            parameters = inspect.signature(variant.implementation).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                assert list(parameters)[: len(expected)] == expected, name


def select(mask=MASKS["causal"], arrays=QKV, **options):
    return backends.select("dot_product_attention", *arrays, mask, **options)


@pytest.mark.skipif(GPU, reason="the selection on a CPU")
def test_selection():
    assert select() is select(MASKS["full"]) is cpu.attention
    assert select(return_weights=True) is None
    assert select(attention_impl="splash") is tpu.splash_attention
    assert select(attention_impl="splash", return_weights=True) is None
    with jax.set_mesh(sharding.make_mesh(8, 1)):
        assert select() is None
        assert backends.select("matmul", *QKV[:2]) is None
    with backends.use("reference"):
        assert select(attention_impl="splash") is None
        assert backends.is_reference()
        with backends.use("auto"):
            assert select() is cpu.attention
    assert not backends.is_reference()


def test_jit_compiles_each_implementation():
    """A compiled function is not reused for another implementation."""
    traces = []

    @jax.jit
    def f(x):
        traces.append(backends.is_reference())
        return x

    f(1.0)
    with backends.use("reference"):
        f(1.0)
        f(2.0)
    f(3.0)
    assert traces == [False, True]


def test_unknown_implementations():
    with pytest.raises(ValueError, match="'fast'; it must be one of auto, reference"):
        backends.use("fast")
    code = "import transformer_jax.nn.backends as b; print(b.is_reference())"
    for value, expected in (("reference", "True"), ("fast", "must be one of auto, reference")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TRANSFORMER_JAX_IMPLEMENTATION": value})
        assert expected in done.stdout + done.stderr


TOKENS = random_tokens(2, 12)


@pytest.mark.slow
@pytest.mark.parametrize("config", [GPT2, BERT, TRANSFORMER, BART], ids=lambda c: type(c).__name__)
def test_a_model_with_reference_implementations(config):
    """Values, dropout masks and gradients are those of the variants."""
    model, params = build(config)

    @jax.jit
    def values_and_gradient(params, rng):
        def total(params):
            out = model.apply({"params": params}, TOKENS, deterministic=False,
                              rngs={"dropout": rng})
            return jnp.sin(out[0]).sum(), out[0]

        return jax.value_and_grad(total, has_aux=True)(params)

    actual = jax.device_get(values_and_gradient(params, jax.random.key(0)))
    with backends.use("reference"):
        expected = jax.device_get(values_and_gradient(params, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3),
                 actual, expected)


def test_losses_are_not_chunked_with_reference_implementations():
    lazy_logits = layers.LazyLogits(normal(2, 300, 8), normal(37, 8))
    args = (lazy_logits, np.zeros((2, 300), np.int32), np.ones((2, 300)))
    loss = functools.partial(cross_entropy.token_losses, logits_per_chunk=37 * 128)

    def has_scan():
        return "scan" in str(jax.make_jaxpr(loss)(*args))

    assert has_scan()
    expected = loss(*args)[0]
    with backends.use("reference"):
        assert not has_scan()
        np.testing.assert_allclose(loss(*args)[0], expected, rtol=1e-5)


def test_eager_fused_attention_stores_no_scores(monkeypatch):
    """Without `output_attentions`, a model call computes no array `[T, S]`."""
    def fused(query, key, value, mask, **_):
        return value, None

    variant = backends.Variant(fused, lambda *args, return_weights=False, **_: not return_weights)
    monkeypatch.setitem(backends.VARIANTS, "dot_product_attention", (variant,))
    model, params = build(GPT2)
    tokens = random_tokens(2, 31)

    def shapes(**options):
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, tokens, **options))(params)
        return str(jaxpr)

    assert "31,31]" not in shapes()
    assert "f32[2,3,31,31]" in shapes(output_attentions=True)


def test_reference_implementations_are_short():
    def num_lines(function):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        docstring = node.body[0] if ast.get_docstring(node) else None
        num_doc_lines = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
        return node.end_lineno - node.lineno + 1 - num_doc_lines

    assert num_lines(attention.dot_product_attention.__wrapped__) <= 25
    assert num_lines(layers.Linear.__call__) <= 15


def test_a_training_step_runs_with_reference_implementations():
    model, params = build(GPT2)
    batch = {"tokens": TOKENS, "targets": TOKENS, "weights": np.ones(TOKENS.shape, np.float32)}

    def loss(params):
        return causal_lm.loss(model.apply, params, batch)[0]

    with backends.use("reference"):
        expected = jax.jit(loss)(params)
    np.testing.assert_allclose(jax.jit(loss)(params), expected, rtol=1e-5)
