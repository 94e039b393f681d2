"""`python -m transformer_jax`: the command line, see `transformer_jax.cli`."""

import sys

from transformer_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
