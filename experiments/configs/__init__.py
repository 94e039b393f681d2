"""A file for each run worth repeating; its docstring gives command, hardware, time and score."""

import importlib
import pkgutil


def load(kind: type) -> dict[str, tuple[str, object]]:
    """Name -> (first line of the docstring, settings) of all runs whose settings are of this kind,
    as tyro's `overridable_config_cli` takes them."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    found = {n: (m.__doc__.splitlines()[0], m.config()) for n, m in modules.items()}
    return {n: (title, config) for n, (title, config) in found.items() if isinstance(config, kind)}
