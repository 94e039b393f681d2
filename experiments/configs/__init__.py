"""Configs of reproducible runs; each docstring gives the command, hardware, time and result."""

import dataclasses
import importlib
import pkgutil
from typing import Annotated

import tyro


def load(kind: type) -> dict[str, tuple[str, object]]:
    """Returns all configs of type `kind`: name -> (first line of the module docstring, config).

    The result is an argument of `tyro.extras.overridable_config_cli`.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    found = {n: (m.__doc__.splitlines()[0], m.config()) for n, m in modules.items()}
    return {n: (title, config) for n, (title, config) in found.items() if isinstance(config, kind)}


def flat(kind: type, *nested: str) -> type:
    """Returns a subclass of the dataclass `kind` in which flags of nested configs have no prefix.

    Args:
        kind: class of the config of a recipe.
        nested: fields that are nested configs, such as "dataset" for --data instead of
            --dataset.data.
    """
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    return dataclasses.make_dataclass(
        kind.__name__,
        [(name, Annotated[types[name], tyro.conf.arg(name="")],
          dataclasses.field(default_factory=types[name])) for name in nested],
        bases=(kind,), frozen=True, kw_only=True)


def load_flat(kind: type, *nested: str) -> dict[str, tuple[str, object]]:
    """Returns `load(kind)`, with configs converted to the type `flat(kind, *nested)`."""
    flat_kind = flat(kind, *nested)
    return {name: (title, flat_kind(**{f.name: getattr(config, f.name)
                                       for f in dataclasses.fields(config)}))
            for name, (title, config) in load(kind).items()}
