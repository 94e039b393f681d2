"""What the notes claim, each claim an experiment: `python experiments/study.py NAME`.

A module here has a docstring that says what is claimed, the command, hardware, time and what came
of it; a frozen dataclass of settings; `config()`, `large()` and `smallest()`, which are settings
for two CPU cores, for an accelerator, and for a test; and `run(settings)`, which returns what
`results.json` keeps and writes the picture.
"""

import importlib
import pkgutil

SIZES = {"": "config", "-large": "large", "-smallest": "smallest"}


def names() -> list[str]:
    """Of all studies."""
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}")
               for m in pkgutil.iter_modules(__path__)}
    return [name for name, module in modules.items() if hasattr(module, "run")]


def load() -> dict[str, tuple[str, object]]:
    """Name and size -> (first line of the docstring, settings), as tyro's
    `overridable_config_cli` takes them."""
    found = {}
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        for size, function in SIZES.items():
            found[name + size] = (module.__doc__.splitlines()[0], getattr(module, function)())
    return found
