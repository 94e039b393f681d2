"""The `transformer-jax` command line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "inspect", "main",
    ],
    submod_attrs={
    },
)
