"""Recipes side by side: one annotated set, several recipes, numbers of examples and seeds.

    python experiments/sweep.py sst2 --data path/to/sst2 --out runs/sst2
    python experiments/sweep.py sst2_few --data path/to/sst2 --out runs/sst2_few

The configs say what they need, how long they take and what to expect. Each cell of the table, a
recipe with a number of examples and a seed, is written to `cells.jsonl` when it is done, and the
same command goes on where a run was cut off. Runs that differ in the seed alone share their
compiled steps. "scratch" among the recipes trains a model of the same size from new parameters.
`results.json` has means and deviations over seeds, each beside what was forgotten.
"""

import functools
import hashlib
import json
import re
import time
from collections.abc import Sequence

import common
import configs
import forgetting
import numpy as np
import supervised
import tyro
from finetune import finetune, for_task, read
from rich.console import Console
from rich.table import Table
from settings import SCRATCH, Sweep

from transformer_jax import metrics
from transformer_jax.data import subsample_balanced
from transformer_jax.report import plots

KEPT = ("rouge", "rouge1", "rouge2", "bleu", "accuracy", "macro_f1", "matthews", "f1",
        "exact_match", "pearson_spearman", "pearson", "spearman", "precision", "recall", "labels",
        "steps", "trained", "share_trained", "cut", "cut_validation",
        "seconds", "seconds_per_step")


def main(c: Sweep) -> dict:
    """The command: all cells that are not done yet, then the table and the pictures."""
    began = time.perf_counter()
    console = Console(width=120)
    base = common.load_base(c.pretrained, dropout_rate=c.dropout_rate, pooling=c.pooling)
    data = c.data.load()
    model, start = for_task(base, data)
    memory = forgetting.measure(c.pretrained, base, text=c.remember)
    before = memory.loss({})
    console.print(f"{len(data.train):,} examples, {len(data.validation):,} to evaluate on; "
                  f"left out: {data.dropped}; held-out pre-training loss ({memory.objective}) "
                  f"{before:.3f}")
    # The recipe outside the seeds, so that its steps are compiled once.
    for examples in c.examples or (None,):
        task = functools.cache(functools.partial(_task, c, data, model, base.tokenizer, examples))
        for name in c.rows:
            for seed in range(c.seeds):
                cell = _cell(c, name, examples, seed)
                if any(done.items() >= cell.items() for done in _cells(c)):
                    continue
                run_cell(c, cell, model, start, base.tokenizer, task(seed), memory)
                last = _cells(c)[-1]
                console.print(f"{name}, {last['labels']:,} examples, seed {seed}: "
                              f"{data.metric} {last['score']:.4f}, "
                              f"{last['seconds']:.0f} s, pre-training loss "
                              f"{last['held_out_after']:.3f}", highlight=False)
    rows = summary(c, _cells(c))
    console.print(table(c, rows, data.metric, before))
    pictures(c, rows, data)
    return common.write_results(
        c.out, c, {"cells": rows, "held_out_objective": memory.objective,
                   "held_out_before": before, "metric": data.metric, "dropped": data.dropped},
        time.perf_counter() - began)


def _task(c: Sweep, data, model, tokenizer, examples: int | None, seed: int) -> supervised.Task:
    chosen = subsample_balanced(data.train, None, seed, total=examples)
    return read(data._replace(train=chosen), model, tokenizer, c.settings)


def run_cell(c: Sweep, cell: dict, model, start, tokenizer, task, memory) -> None:
    """One run, its line in cells.jsonl, and for the first seed predictions and pictures."""
    recipe, settings = c.rows[cell["recipe"]]
    outcome = finetune(model, None if cell["recipe"].startswith(SCRATCH) else start, tokenizer,
                       task, recipe, settings, cell["seed"], quiet=c.quiet)
    m = outcome.metrics
    name = re.sub(r"[^\w.]+", "_", f"{cell['recipe']} {m['labels']}")
    if cell["seed"] == 0:
        supervised.write_predictions(c.out / "predictions" / f"{name}.jsonl", outcome.lines)
        if "confusion" in m and task.data.label_names:
            title = f"{c.data.data.rstrip('/').rpartition('/')[2]}, {cell['recipe']}"
            plots.confusion(c.out / f"confusion_{name}.png", m["confusion"],
                           task.data.label_names, title=title)
            plots.calibration(c.out / f"calibration_{name}.png", m["calibration"], title=title)
    line = cell | {name: m[name] for name in KEPT if name in m} | {
        "score": m[task.data.metric if task.data.metric in m else "f1"],
        "ece": m["calibration"]["ece"] if "calibration" in m else None,
        "held_out_after": memory.loss(outcome.params)}
    c.out.mkdir(parents=True, exist_ok=True)
    path = c.out / "cells.jsonl"
    if path.is_file() and not (text := path.read_text()).endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])  # a line that was cut off
    with path.open("a") as file:
        file.write(json.dumps(common.to_json(line)) + "\n")


def _cell(c: Sweep, recipe: str, examples: int | None, seed: int) -> dict:
    """What tells a cell from others, also from those of another configuration in the folder."""
    what = [c.pretrained, c.data, c.rows[recipe], c.dropout_rate, c.pooling,
            c.remember]
    digest = hashlib.sha256(json.dumps(common.to_json(what), sort_keys=True).encode()).hexdigest()
    return {"recipe": recipe, "examples": examples, "seed": seed, "config": digest[:16]}


def _cells(c: Sweep) -> list[dict]:
    """All that are done. A last line that was cut off is not."""
    path = c.out / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(c: Sweep, cells: Sequence[dict]) -> list[dict]:
    """A row for each recipe and number of examples: means and deviations over seeds."""
    rows = []
    for examples in c.examples or (None,):
        for recipe in c.rows:
            wanted = [_cell(c, recipe, examples, seed) for seed in range(c.seeds)]
            # The first of each: two processes may have shared the folder.
            found = [next(x for x in cells if x.items() >= cell.items()) for cell in wanted]
            row = {"recipe": recipe, "labels": found[0]["labels"], "seeds": len(found),
                   "trained": found[0]["trained"], "share_trained": found[0]["share_trained"],
                   "scores": [x["score"] for x in found]}
            for name in ("score", "exact_match", "f1", "accuracy", "matthews", "spearman", "ece",
                         "held_out_after", "seconds", "seconds_per_step"):
                values = [x[name] for x in found if x.get(name) is not None]
                if values:
                    row[name], row[f"{name}_std"], _ = metrics.mean_std(values)
            rows.append(row)
    return rows


def scale_of(metric: str) -> int:
    """What makes percents of a metric: some are shares, others percents by custom."""
    return 1 if metric in ("squad", "rouge", "bleu") else 100


def table(c: Sweep, rows: Sequence[dict], metric: str, before: float) -> Table:
    shown = Table(title=f"{c.data.data}: {metric} over {c.seeds} seeds; held-out pre-training loss "
                        f"before {before:.3f}")
    for heading in ("examples", "recipe", metric, "trained %", "ms/step", "seconds",
                    "pre-training loss after"):
        shown.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        scale = scale_of(metric)
        shown.add_row(
            f"{row['labels']:,}", row["recipe"],
            f"{scale * row['score']:.1f}" + (
                f" ± {scale * row['score_std']:.1f}" if row["seeds"] > 1 else ""),
            f"{100 * row['share_trained']:.3f}", f"{1000 * row.get('seconds_per_step', 0):.0f}",
            f"{row['seconds']:.0f}", f"{row['held_out_after']:.3f}")
    return shown


def pictures(c: Sweep, rows: Sequence[dict], data) -> None:
    name = c.data.data.rstrip("/").rpartition("/")[2]
    if len(c.examples) > 1:
        share = scale_of(data.metric) / 100
        lines = {recipe: tuple(zip(*[(r["labels"], share * r["score"], share * r["score_std"])
                                     for r in rows if r["recipe"] == recipe])) for recipe in c.rows}
        chance = None
        if data.metric == "accuracy" and data.kind != "token_classification":
            labels = [e["label"] for e in data.validation]
            chance = float(max(np.bincount(labels)) / len(labels))
        plots.label_efficiency(
            c.out / "label_efficiency.png", {name: lines},
            title=f"How many labels does it take? ({c.seeds} seeds)", chance=chance,
            ylabel=f"{data.metric} (%)")
        return
    scale = scale_of(data.metric)
    plots.trainable_specs(c.out / "recipes.png", {
        r["recipe"]: (r["share_trained"], scale * r["score"], scale * r["score_std"])
        for r in rows}, title=f"{name}, {c.seeds} seeds", ylabel=f"{data.metric} (%)")


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(configs.load(Sweep), description=__doc__)
    common.start()
    main(config)
