"""Eight fake devices, exact matmuls and quick compilation for every test, before JAX starts."""

import os
from importlib.metadata import version
from pathlib import Path

# Compiling is what these tests cost, and most of it is optimisation that tiny shapes never repay;
# where that could matter a test asks for it (`small_models.optimized_jit`).
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Other versions know no such choice, and refuse the flag.
    *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
])

import jax
import pytest

# JAX_PLATFORMS=cuda runs the tests of a GPU's kernels (tests/nn/test_backends.py).
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that $TRANSFORMER_JAX_DATA names."""
    folder = os.environ.get("TRANSFORMER_JAX_DATA")
    if not folder:
        pytest.skip("set TRANSFORMER_JAX_DATA to the folder of real data sets")
    return Path(folder)
