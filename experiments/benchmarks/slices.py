"""Pre-training steps of four large models, compiled ahead of time for four TPU slices.

    pip install ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python experiments/benchmarks/slices.py

No TPU is needed: every step is compiled by the TPU compiler (`transformer_jax.planner.plan`), with
the same number of tokens per chip on every slice, in bfloat16 and with splash attention. The table
shows whether each step fits into memory, which resource bounds it, and how it scales.

Each row of the table is printed as soon as its step is compiled, and saved to `<out>/rows.jsonl`;
saved rows are not compiled again. Hardware: one CPU core, one to three minutes per row.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from transformer_jax.cli.command import run_command
from transformer_jax.errors import did_you_mean
from transformer_jax.models import presets
from transformer_jax.planner import chips, plan
from transformer_jax.recipes.run_dir import write_results
from transformer_jax.report import plots

MODEL_OPTIONS = {"dtype": "bfloat16", "attention_impl": "splash", "dropout_rate": 0.0,
                 "attention_dropout_rate": 0.0}
RESOURCES = ("compute", "hbm", "interconnect")


class Workload(NamedTuple):
    """Rows and tokens per chip (of source and target each), the mesh axis "fsdp", and
    `Config.remat`.
    """

    batch_size: int
    length: int
    fsdp: int
    remat: str


WORKLOADS = {
    "gpt2_xl": Workload(4, 1024, 4, "full"),
    "bert_large": Workload(16, 512, 1, "full"),
    "bart_large": Workload(4, 1024, 1, "full"),
    "transformer_big": Workload(16, 256, 1, "none"),
}
"""Model preset -> its workload."""


@dataclass(frozen=True)
class SlicesConfig:
    """Settings of the benchmark.

    Attributes:
        models: model presets in `WORKLOADS`.
        topologies: TPU slices; every model is compiled for each.
        out: folder for the results.
    """

    models: tuple[str, ...] = tuple(WORKLOADS)
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
    out: Path = Path("runs/slices")


def make_plan_config(model: str, num_devices: int) -> plan.PlanConfig:
    """Returns the plan config of a model on a slice, with the same workload on each chip."""
    if model not in WORKLOADS:
        raise ValueError(f"unknown model {model!r}; {did_you_mean(model, WORKLOADS)}")
    work = WORKLOADS[model]
    config = presets.get(model, **MODEL_OPTIONS, remat=work.remat)
    if config.max_length < work.length:
        config = config.replace(max_length=work.length)
    mesh = {"data": num_devices // work.fsdp, "fsdp": work.fsdp}
    return plan.PlanConfig(config, mesh, work.batch_size * num_devices, work.length)


def make_row(model: str, topology: str, found: plan.Plan) -> dict[str, Any]:
    """Returns the row of the table for a compiled plan."""
    work, seconds = WORKLOADS[model], found.roofline_seconds
    total_seconds = sum(seconds.values())
    return {
        "model": model, "topology": topology, "devices": found.num_devices,
        "setting": str(found.config), "tokens_per_chip": work.batch_size * work.length,
        "state_gib": found.state_bytes / 2**30, "temporary_gib": found.temporary_bytes / 2**30,
        "total_gib": found.peak_bytes / 2**30, "has_gib": found.chip.memory_bytes / 2**30,
        "fits": found.fits, "flops_ratio": found.compiled_flops / found.model_flops,
        **{f"{name}_ms": 1000 * seconds[name] for name in RESOURCES},
        "sum_ms": 1000 * total_seconds, "mfu": found.mfu,
        "mfu_of_sum": found.model_flops / found.chip.flops_per_second / total_seconds,
        "collectives_mib": {kind: n / 2**20 for kind, n in found.collective_bytes.items()},
        "compile_seconds": found.compile_seconds}


COLUMNS = {
    "state_gib": ("state GiB", ".2f"), "temporary_gib": ("temporary GiB", ".2f"),
    "has_gib": ("chip GiB", ".0f"), "flops_ratio": ("compiled / model FLOPs", ".2f"),
    "compute_ms": ("compute ms", ".0f"), "hbm_ms": ("HBM ms", ".0f"),
    "interconnect_ms": ("interconnect ms", ".0f"), "mfu": ("MFU", ".2f"),
    "mfu_of_sum": ("MFU without overlap", ".2f")}
"""Key of a row -> (heading of its column, number format)."""


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of rows."""
    headings = ["model, slice", *(heading for heading, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join(lines + [
        f"| {row['model']}, {row['topology']} | "
        + " | ".join(format(row[key], form) for key, (_, form) in COLUMNS.items()) + " |"
        for row in rows])


def step_time_growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the step time on the largest v5e slice divided by that on the smallest.

    The key MODEL has the ratio of the longest of the three times for compute, HBM and interconnect,
    and the key "MODEL, sum" the ratio of their sums.
    """
    growth = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        v5e_rows = sorted((row for row in rows
                           if row["model"] == model and row["topology"].startswith("v5e")),
                          key=lambda row: row["devices"])
        if len(v5e_rows) > 1:
            smallest, largest = v5e_rows[0], v5e_rows[-1]
            longest = [max(row[f"{name}_ms"] for name in RESOURCES)
                       for row in (smallest, largest)]
            growth[model] = longest[1] / longest[0]
            growth[f"{model}, sum"] = largest["sum_ms"] / smallest["sum_ms"]
    return growth


def main(config: SlicesConfig) -> dict[str, Any]:
    """Compiles all steps, writes the table, and returns the content of results.json."""
    for model in config.models:
        make_plan_config(model, 16)  # raises if the model is unknown
    path = config.out / "rows.jsonl"
    config.out.mkdir(parents=True, exist_ok=True)
    done = {}
    if path.exists():
        done = {(row["model"], row["topology"], row["setting"]): row
                for row in map(json.loads, path.read_text().splitlines())}
    rows = []
    for topology in config.topologies:
        devices = chips.get_devices(topology)
        for model in config.models:
            plan_config = make_plan_config(model, len(devices))
            key = (model, topology, str(plan_config))
            if key not in done:
                found = plan.compile_plan(
                    plan_config, devices, chips.CHIPS[topology.partition(":")[0]])
                done[key] = make_row(model, topology, found)
                with path.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
            rows.append(done[key])
            print(to_markdown(rows[-1:]).splitlines()[-1], flush=True)
    (config.out / "table.md").write_text(to_markdown(rows) + "\n")
    plots.plans(config.out / "slices.png", {
        f"{row['model']}, {row['topology']}": {
            "state": row["state_gib"], "temporary": row["temporary_gib"],
            **{name: row[f"{name}_ms"] for name in RESOURCES}}
        for row in rows}, limit=min(row["has_gib"] for row in rows),
        title="Pre-training step on one chip of each slice")
    seconds = sum(row["compile_seconds"] for row in rows)
    return write_results(
        config.out, config, {"rows": rows, "growth": step_time_growth(rows)}, seconds)


if __name__ == "__main__":
    if os.environ.get("TPU_SKIP_MDS_QUERY") != "1":
        print("warning: without a TPU, set JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1",
              file=sys.stderr, flush=True)
    sys.exit(run_command(main, parse=lambda: tyro.cli(SlicesConfig, description=__doc__)))
