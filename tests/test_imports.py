"""`import transformer_jax` touches no device and needs none of the optional packages."""

import subprocess
import sys


def test_import_initialises_no_backend():
    script = ("import transformer_jax.generation, transformer_jax.train.step\n"
              "import jax._src.xla_bridge as bridge\n"
              "assert not bridge.backends_are_initialized()\n"
              "import sys; assert not {'torch', 'tensorflow', 'datasets'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
