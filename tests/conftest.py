"""Eight fake devices and exact matmuls for every test, before JAX starts."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that $TRANSFORMER_JAX_DATA names."""
    folder = os.environ.get("TRANSFORMER_JAX_DATA")
    if not folder:
        pytest.skip("set TRANSFORMER_JAX_DATA to the folder of real data sets")
    return Path(folder)
