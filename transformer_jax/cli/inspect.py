"""The commands before a run and after: what it would take, and what came of it."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Sizes of each axis to try; -1 takes the devices that the others leave."""

    data: tuple[int, ...] = (-1,)
    fsdp: tuple[int, ...] = (1,)
    sequence: tuple[int, ...] = (1,)
    tensor: tuple[int, ...] = (1,)


def plan(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
    /,
    topology: str = "v5e:4x4",
    mesh: MeshSizes = MeshSizes(),
    rows: tuple[int, ...] = (),
    length: int | None = None,
    remat: tuple[str, ...] = ("none",),
    accumulate: tuple[int, ...] = (1,),
    attention_impl: str = "auto",
    dtype: str = "bfloat16",
    attention_dropout_rate: float = 0.0,
    out: Path | None = None,
) -> None:
    """Compile pre-training for TPUs that are not here, or for what is: does it fit, how fast can it
    be?

    Several values of a flag are all tried, and the best that fits is named.

    Args:
        model: a preset, such as gpt2_xl or bert_large.
        topology: chip and shape of the slice, such as v5e:16x16, v5p:4x4x4 or v6e:16x16; "here" for
            the devices that are here, whose rates are measured.
        mesh: sizes of the mesh's axes.
        rows: of the global batch; four for each part it is cut into if not given.
        length: tokens of a row; the model's positions if not given.
        remat: what the way back computes again: none, dots or full.
        accumulate: microbatches, one after another.
        attention_impl: of attention: auto for the platform's, splash, cudnn or xla.
        dtype: of the arithmetic.
        attention_dropout_rate: above 0 attention cannot be splash.
        out: a folder for plan.json and plan.png.
    """
    from transformer_jax.models import presets
    from transformer_jax.planner import chips, table
    from transformer_jax.planner import plan as planning
    from transformer_jax.report import plots

    base = presets.get(model, dtype=dtype, attention_impl=attention_impl, dropout_rate=0.0,
                       attention_dropout_rate=attention_dropout_rate)
    devices = chips.devices_of(topology)
    chip = chips.chip_of(topology, dtype)
    settings = planning.enumerate_configs(
        base, len(devices), meshes=dataclasses.asdict(mesh), rows=rows, length=length,
        remat=remat, accumulate=accumulate)
    found = []
    for setting in settings:
        found.append(planning.compile_plan(setting, devices, chip))
        print(f"{setting}: compiled in {found[-1].compile_seconds:.0f} s", flush=True)
    table.print_plans(found, f"{model} on {topology}, {len(devices)} devices")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        reports = [planning.plan_to_dict(one) for one in found]
        (out / "plan.json").write_text(json.dumps(reports, indent=2))
        plots.plans(out / "plan.png", table.memory_bars(found), limit=chip.memory / 2**30,
                   title=f"{model} on {topology}")


def report(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    text: str | None = None,
    out: Path | None = None,
) -> None:
    """A run's results, or how far it is, as one HTML page: curves, numbers, pictures, what its
    model makes of a text and where it looks.

    Args:
        run: its folder.
        text: given to the model.
        out: the page; report.html in the folder if not given.
    """
    from transformer_jax.report import page as reports

    print(reports.write_report(run, out, **({} if text is None else {"text": text})))
