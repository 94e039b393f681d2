"""Commands before and after a run: `plan` (memory and speed), `report` and `convert`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from transformer_jax.cli.command import ModelArgument, optional


def report(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    text: Annotated[str | None, optional("STR")] = None,
    out: Annotated[Path | None, optional("PATH")] = None,
) -> None:
    """Writes a run's results as one HTML page: scores, curves, samples and attention maps.

        transformer-jax report runs/bert

    An unfinished run is reported up to its last recorded step.

    Args:
        run: folder of a run.
        text: input text for the sample and the attention maps.
        out: HTML file to write; by default, report.html in the folder of the run.
    """
    from transformer_jax.report import page

    print(page.write_report(run, out, **({} if text is None else {"text": text})))


def convert(
    model: ModelArgument,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    task: Annotated[str | None, optional("STR")] = None,
) -> None:
    """Converts a run or a checkpoint to the Hugging Face format, as safetensors.

        transformer-jax convert runs/bert exported

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        out: output folder.
        task: head of a checkpoint to convert, such as causal_lm, masked_lm, seq2seq_lm or
            classification; by default, that of its config.json. A run has one head only.
    """
    from transformer_jax.pretrained import is_run, load_pretrained, load_run, save_pretrained

    if is_run(model) and task is not None:
        raise ValueError(f"task is {task}, but {model} is a run, which has one head; omit --task")
    found = load_run(model) if is_run(model) else load_pretrained(model, task)
    save_pretrained(out, found.model, found.params, found.tokenizer)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")]


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Sizes to try for each mesh axis; -1 uses all remaining devices."""

    data: Sizes = (-1,)
    fsdp: Sizes = (1,)
    sequence: Sizes = (1,)
    tensor: Sizes = (1,)


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Flags of the model.

    Attributes:
        attention_impl: attention implementation; auto selects it by platform.
        dtype: dtype of the computation.
        attention_dropout_rate: dropout rate of attention weights; splash supports only 0.
    """

    attention_impl: Literal["auto", "splash", "cudnn", "xla"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_dropout_rate: float = 0.0


def plan(
    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
    /,
    topology: str = "v5e:4x4",
    mesh: MeshSizes = MeshSizes(),
    batch_size: Annotated[Sizes, tyro.conf.arg(help_behavior_hint="")] = (),
    length: Annotated[int | None, optional("INT")] = None,
    remat: Annotated[tuple[Literal["none", "dots", "full"], ...],
                     tyro.conf.arg(metavar="{none,dots,full} ...")] = ("none",),
    accumulate: Sizes = (1,),
    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags(),
    out: Annotated[Path | None, optional("PATH")] = None,
) -> None:
    """Estimates memory and speed of a training step on a TPU slice, compiled ahead of time.

        transformer-jax plan gpt2_xl --topology v5e:16x16 --mesh.data 16 --mesh.fsdp 16

    No TPU is needed. If flags have several values, all combinations are compiled.

    Args:
        preset: model preset, such as gpt2_xl or bert_large.
        topology: chip and shape of the slice, such as v5e:16x16 or v5p:4x4x4; or local, for the
            devices of this machine.
        mesh: sizes to try for each mesh axis; -1 uses all remaining devices.
        batch_size: global batch size; by default, 4 * data * fsdp * accumulate rows.
        length: tokens per row; by default, the model's max_length.
        remat: rematerialization policy.
        accumulate: number of microbatches for gradient accumulation.
        model: flags of the model.
        out: folder for plan.json and plan.png.
    """
    from transformer_jax.models import presets
    from transformer_jax.planner import chips, plan_config
    from transformer_jax.planner import plan as plan_module
    from transformer_jax.report import plots

    base = presets.get(preset, dropout_rate=0.0, **vars(model))
    devices = chips.get_devices(topology)
    chip = chips.get_chip(topology, model.dtype)
    configs = plan_config.enumerate_configs(
        base, len(devices), meshes=dataclasses.asdict(mesh), batch_sizes=batch_size,
        length=length, remat=remat, accumulate=accumulate)
    plans = []
    for config in configs:
        plans.append(plan_module.compile_plan(config, devices, chip))
        print(f"{config}: compiled in {plans[-1].compile_seconds:.0f} s", flush=True)
    title = f"{preset} on {topology}"
    plan_module.print_plans(plans, f"{title}, {len(devices)} devices")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        values = [plan_module.plan_to_dict(found) for found in plans]
        (out / "plan.json").write_text(json.dumps(values, indent=2))
        plots.plans(out / "plan.png", plan_module.bar_chart_data(plans),
                    limit=chip.memory_bytes / 2**30, title=title)
