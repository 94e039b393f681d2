"""Configs of reproducible runs; each docstring gives the command, hardware, time and result."""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from transformer_jax.cli import run_command
from transformer_jax.recipes.run_dir import setup


def load(kind: type) -> dict[str, tuple[str, object]]:
    """Returns (title, config) by name for `overridable_config_cli`, for the type `kind`."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    found = {n: (m.__doc__.splitlines()[0], m.CONFIG) for n, m in modules.items()}
    return {n: (title, config) for n, (title, config) in found.items() if isinstance(config, kind)}


def flat(kind: type, *nested: str) -> type:
    """Returns a subclass of the dataclass `kind` whose flags of `nested` configs have no prefix."""
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


def run(recipe: Callable, kind: type, description: str, *nested: str) -> None:
    """Runs a recipe with a config from the command line, which changes one of this folder if any.

    `nested` are the fields of `flat`.
    """
    def main(config) -> None:
        setup()
        recipe(config)

    def parse():
        if configs := load_flat(kind, *nested):
            return tyro.extras.overridable_config_cli(configs, description=description)
        return tyro.cli(flat(kind, *nested), description=description)

    sys.exit(run_command(main, parse=parse))
