"""The compiled train step: the memory check, and one compilation per batch shape."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import train

from transformer_jax.train import compiled_step


def test_a_step_that_needs_more_memory_than_is_free_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled_step, "free_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"a step needs 0.00 GiB in addition to the 0.00 GiB of "
                                         r"parameters, optimizer state and batch, and 0.00 GiB are "
                                         r"free; use"):
        train(3)
    analysis = SimpleNamespace(temp_size_in_bytes=60, output_size_in_bytes=50,
                               alias_size_in_bytes=10, argument_size_in_bytes=0)
    compiled_step.check_memory(analysis, 100)
    with pytest.raises(ValueError):
        compiled_step.check_memory(analysis, 99)
    compiled_step.check_memory(None, 1)
    compiled_step.check_memory(analysis, None)


def test_each_shape_is_compiled_once():
    def count(state, batch, rng):
        return state + batch["x"].sum(), {"loss": jnp.float32(0)}

    step = compiled_step.CompiledStep(count, jnp.float32(0), None)
    state = jnp.float32(0)
    with compiled_step.CompilationCounter() as compilations:
        for length in (3, 5, 3, 5, 3):
            state, _ = step(state, {"x": np.ones(length, np.float32)}, None)
        assert float(state) == 19
        assert compilations.count <= 3  # two shapes, and one for `float`


def test_compilations_are_counted_and_repeated_calls_are_not():
    with compiled_step.CompilationCounter() as compilations:
        f = jax.jit(lambda x: x * 3 + 1)
        f(jnp.ones(3)).block_until_ready()
        first = compilations.count
        f(jnp.ones(3)).block_until_ready()
        assert compilations.count == first >= 1 and compilations.seconds > 0
        f(jnp.ones(4)).block_until_ready()
        assert compilations.count > first
        last = compilations.count
    jax.jit(lambda x: x * 5)(jnp.ones(7)).block_until_ready()
    assert compilations.count == last


def test_peak_memory_is_at_least_the_size_of_the_arrays():
    before = compiled_step.peak_memory()
    x = jax.device_put(jnp.ones((64, 2**20), jnp.float32))
    x.block_until_ready()
    assert compiled_step.peak_memory() >= max(before, x.nbytes)
