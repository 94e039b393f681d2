"""The `transformer-jax` command line: one module per group of commands."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "analysis", "command", "inference", "main", "training",
    ],
    submod_attrs={
        "command": ["run_command"],
    },
)
