"""Faster implementations of operations for single backends, and their selection.

The reference implementation of an operation is written as in the papers, and decorated with
`dispatched`. `VARIANTS` lists the faster implementations, which equal it in value and gradient, up
to rounding. The first one that supports the arguments is called, and the reference if there is
none. `use("reference")` switches all variants off, for debugging and for tests; so does the
environment variable `TRANSFORMER_JAX_IMPLEMENTATION=reference`, which is read when the library is
imported.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax

from transformer_jax.nn.backends import cpu, gpu, tpu

__all__ = ["VARIANTS", "Variant", "cpu", "dispatched", "gpu", "is_reference", "select", "tpu",
           "use"]

IMPLEMENTATIONS = ("auto", "reference")


class Variant(NamedTuple):
    """A faster implementation of an operation, with the signature of the reference."""

    implementation: Callable
    supports: Callable[..., bool]  # of the same arguments: whether to use the implementation


# Operation -> its variants; the first one that supports the arguments is used.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "dot_product_attention": (
        Variant(tpu.splash_attention, tpu.supports_splash),
        Variant(gpu.cudnn_attention, gpu.supports_cudnn),
        Variant(cpu.attention, cpu.supports_attention),
    ),
    "matmul": (Variant(cpu.matmul, cpu.has_no_mesh),),
    "matmul_transposed": (Variant(cpu.matmul_transposed, cpu.has_no_mesh),),
    "int8_matmul_transposed": (Variant(cpu.int8_matmul_transposed, cpu.is_default),),
    "materialize_cotangent": (Variant(cpu.materialize_cotangent, cpu.is_default),),
    "softmax_cross_entropy_and_grad": (
        Variant(gpu.softmax_cross_entropy_and_grad, gpu.supports_fused_cross_entropy),),
}


def _check(name: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; it must be one of "
                         f"{', '.join(IMPLEMENTATIONS)}")
    return name


# `jax.jit` compiles a function again if the value of the context differs.
_implementation = jax.make_user_context(
    _check(os.environ.get("TRANSFORMER_JAX_IMPLEMENTATION", "auto")))


def use(name: str) -> contextlib.AbstractContextManager:
    """Returns a context manager that selects the implementation of all operations.

    "auto" is the fastest one that supports the arguments; "reference" switches all variants off. It
    applies to functions that are called or traced inside of it, and `jax.jit` compiles a function
    once for each implementation, so calls can be compared.

    Raises:
        ValueError: an unknown name.
    """
    return _implementation(_check(name))


def is_reference() -> bool:
    """Returns whether all variants are switched off."""
    return _implementation.value == "reference"


def select(operation: str, *args, **kwargs) -> Callable | None:
    """Returns the variant for these arrays, or their shapes and dtypes; None for the reference."""
    variants = () if is_reference() else VARIANTS[operation]
    return next((variant.implementation for variant in variants
                 if variant.supports(*args, **kwargs)), None)


def dispatched(reference: Callable) -> Callable:
    """Decorates the reference implementation of an operation, whose name is a key of `VARIANTS`.

    The reference remains available as `operation.__wrapped__`.
    """
    @functools.wraps(reference)
    def operation(*args, **kwargs):
        implementation = select(reference.__name__, *args, **kwargs) or reference
        return implementation(*args, **kwargs)

    return operation
