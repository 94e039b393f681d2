"""Pre-training of the papers' large models on four TPU slices that are not here: does each fit,
what bounds a step, and does it scale?

    pip install ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python experiments/slices.py

Every step is compiled by the real TPU compiler (`transformer_jax.planner.plan`), at the same tokens a chip
on every slice, bfloat16, splash attention. Rows are printed as they come; a row that is already in
`rows.jsonl` is not compiled again. Hardware: one CPU core takes one to three minutes a row.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
import tyro

from transformer_jax.models import presets
from transformer_jax.planner import chips, plan
from transformer_jax.report import plots

SHAPE = {"dtype": "bfloat16", "attention_impl": "splash", "dropout_rate": 0.0,
         "attention_dropout_rate": 0.0}


class Work(NamedTuple):
    """What each chip gets of a model."""

    rows: int
    length: int
    fsdp: int  # chips that share one copy of the parameters; the others cut the batch
    remat: str


WORK = {
    "gpt2_xl": Work(4, 1024, 4, "full"),
    "bert_large": Work(16, 512, 1, "full"),
    "bart_large": Work(4, 1024, 1, "full"),
    "transformer_big": Work(16, 256, 1, "none"),
}


@dataclass(frozen=True)
class Slices:
    """Attributes:
    models, topologies: each model on each slice.
    """

    models: tuple[str, ...] = tuple(WORK)
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
    out: Path = Path("runs/slices")


def setting_of(model: str, devices: int) -> plan.PlanConfig:
    """The same work for every chip."""
    if model not in WORK:
        raise ValueError(f"no work for model {model!r}; choose of {', '.join(WORK)}")
    work = WORK[model]
    config = presets.get(model, **SHAPE, remat=work.remat)
    if config.max_length < work.length:
        config = config.replace(max_length=work.length)
    return plan.PlanConfig(config, {"data": devices // work.fsdp, "fsdp": work.fsdp},
                        work.rows * devices, work.length)


def row_of(model: str, topology: str, found: plan.Plan) -> dict:
    """What the table has of a plan."""
    return {
        "model": model, "topology": topology, "devices": found.num_devices,
        "setting": str(found.config), "tokens_per_chip": WORK[model].rows * WORK[model].length,
        "state_gib": found.state_bytes / 2**30, "temporary_gib": found.temporary_bytes / 2**30,
        "total_gib": found.peak_bytes / 2**30, "has_gib": found.chip.memory_bytes / 2**30,
        "fits": found.fits, "flops_ratio": found.compiled_flops / found.model_flops,
        **{f"{name}_ms": 1000 * seconds for name, seconds in found.roofline_seconds.items()},
        "sum_ms": 1000 * sum(found.roofline_seconds.values()), "mfu": found.mfu,
        "mfu_of_sum": found.model_flops / found.chip.flops_per_second / sum(found.roofline_seconds.values()),
        "collectives_mib": {kind: n / 2**20 for kind, n in found.collective_bytes.items()},
        "compile_seconds": found.compile_seconds}


COLUMNS = {"state_gib": ".2f", "temporary_gib": ".2f", "has_gib": ".0f", "flops_ratio": ".2f",
           "compute_ms": ".0f", "hbm_ms": ".0f", "interconnect_ms": ".0f", "mfu": ".2f",
           "mfu_of_sum": ".2f"}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| model, slice | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join(lines + [
        f"| {row['model']}, {row['topology']} | "
        + " | ".join(format(row[name], form) for name, form in COLUMNS.items()) + " |"
        for row in rows])


def growth(rows: list[dict]) -> dict[str, float]:
    """Of each model, the step's time on the largest v5e slice to that on the smallest, at the same
    tokens a chip: by the longest of the three times, and by their sum."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = sorted((row for row in rows
                       if row["model"] == model and row["topology"].startswith("v5e")),
                      key=lambda row: row["devices"])
        if len(mine) > 1:
            longest = [max(row[f"{name}_ms"] for name in ("compute", "hbm", "interconnect"))
                       for row in (mine[0], mine[-1])]
            found[model] = longest[1] / longest[0]
            found[f"{model}, sum"] = mine[-1]["sum_ms"] / mine[0]["sum_ms"]
    return found


def main(c: Slices) -> dict:
    """The command."""
    for model in c.models:
        setting_of(model, 16)
    kept = c.out / "rows.jsonl"
    c.out.mkdir(parents=True, exist_ok=True)
    done = {}
    if kept.exists():
        done = {(row["model"], row["topology"], row["setting"]): row
                for row in map(json.loads, kept.read_text().splitlines())}
    rows = []
    for topology in c.topologies:
        devices = chips.get_devices(topology)
        for model in c.models:
            setting = setting_of(model, len(devices))
            key = (model, topology, str(setting))
            if key not in done:
                found = plan.compile_plan(setting, devices, chips.CHIPS[topology.partition(":")[0]])
                done[key] = row_of(model, topology, found)
                with kept.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
            rows.append(done[key])
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    (c.out / "table.md").write_text(table(rows) + "\n")
    plots.plans(c.out / "slices.png", {
        f"{row['model']}, {row['topology']}": {
            "state": row["state_gib"], "temporary": row["temporary_gib"],
            **{name: row[f"{name}_ms"] for name in ("compute", "hbm", "interconnect")}}
        for row in rows}, limit=min(row["has_gib"] for row in rows), title="A chip of each slice")
    seconds = sum(row["compile_seconds"] for row in rows)
    return common.write_results(c.out, c, {"rows": rows, "growth": growth(rows)}, seconds)


if __name__ == "__main__":
    if os.environ.get("TPU_SKIP_MDS_QUERY") != "1":
        print("set JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 where there is no TPU", flush=True)
    main(tyro.cli(Slices, description=__doc__))
