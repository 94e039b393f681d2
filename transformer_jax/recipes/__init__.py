"""End-to-end jobs: a config dataclass and a function each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=[])
