"""Studies: claims about transformers and transfer learning, each tested by an experiment.

    python experiments/study.py NAME

A study is a module with a docstring that states the claims, the command, the hardware, the time and
the results; a frozen dataclass of settings; `SIZES`, with the settings for one CPU core, an
accelerator and a smoke test; and `run(config)`, which saves the figures and returns the metrics for
`results.json`.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def _modules() -> dict[str, ModuleType]:
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}")
               for m in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def load() -> dict[str, tuple[str, Any]]:
    """Returns name with suffix -> (summary, settings), for tyro's `overridable_config_cli`."""
    return {
        name if size == "default" else f"{name}-{size}": (module.__doc__.splitlines()[0], config)
        for name, module in _modules().items() for size, config in module.SIZES.items()}
