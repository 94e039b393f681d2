"""One file for each run worth repeating: its docstring has command, hardware, time and result."""

import dataclasses
import importlib
import pkgutil
from typing import Annotated

import tyro


def load(kind: type) -> dict[str, tuple[str, object]]:
    """Returns name -> (first line of the docstring, settings) of all runs with settings of `kind`.

    It is the argument of `tyro.extras.overridable_config_cli`.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    found = {n: (m.__doc__.splitlines()[0], m.config()) for n, m in modules.items()}
    return {n: (title, config) for n, (title, config) in found.items() if isinstance(config, kind)}


def flat(kind: type, *nested: str) -> type:
    """Returns the dataclass `kind` with fields whose flags have no prefix.

    Args:
        kind: a config of a recipe.
        nested: names of nested configs, such as "dataset": --data instead of --dataset.data.
    """
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    return dataclasses.make_dataclass(
        kind.__name__,
        [(name, Annotated[types[name], tyro.conf.arg(name="")],
          dataclasses.field(default_factory=types[name])) for name in nested],
        bases=(kind,), frozen=True, kw_only=True)


def load_flat(kind: type, *nested: str) -> dict[str, tuple[str, object]]:
    """Returns `load(kind)` with settings of the type `flat(kind, *nested)`."""
    flat_kind = flat(kind, *nested)
    return {name: (title, flat_kind(**{f.name: getattr(config, f.name)
                                       for f in dataclasses.fields(config)}))
            for name, (title, config) in load(kind).items()}
