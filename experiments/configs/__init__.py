"""A file for each run worth repeating; its docstring gives command, hardware, time and score."""

import importlib
import pkgutil


def load() -> dict[str, tuple[str, object]]:
    """Name -> (first line of the docstring, settings), as tyro's `overridable_config_cli` takes."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {n: (m.__doc__.splitlines()[0], m.config()) for n, m in modules.items()}
