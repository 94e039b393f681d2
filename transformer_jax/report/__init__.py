"""HTML reports and plots of training runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "markup", "page", "plots", "summary",
    ],
    submod_attrs={
        "page": ["write_report"],
    },
)
