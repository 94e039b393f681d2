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


def flat(kind: type) -> type:
    """Returns `kind` with flags of its `dataset` without a prefix: --data, not --dataset.data."""
    (dataset,) = (f for f in dataclasses.fields(kind) if f.name == "dataset")
    annotation = Annotated[dataset.type, tyro.conf.arg(name="")]
    return dataclasses.make_dataclass(
        kind.__name__, [("dataset", annotation, dataclasses.field(default_factory=dataset.type))],
        bases=(kind,), frozen=True, kw_only=True)


def load_flat(kind: type) -> dict[str, tuple[str, object]]:
    """Returns `load(kind)` with settings of the type `flat(kind)`."""
    flat_kind = flat(kind)
    return {name: (title, flat_kind(**{f.name: getattr(config, f.name)
                                       for f in dataclasses.fields(config)}))
            for name, (title, config) in load(kind).items()}
