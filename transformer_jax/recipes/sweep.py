"""Comparison of trainable specs on one labeled dataset, for several training sizes and seeds.

A cell is one fine-tuning run, with a given spec, number of examples and seed. Each cell is appended
to `cells.jsonl` when it is complete, and the same call resumes an interrupted sweep. Runs that
differ only in the seed share compiled steps.
"""

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from transformer_jax import metrics
from transformer_jax.data.datasets import LabeledDataset, load_dataset, subsample_balanced
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import DatasetConfig, TrainingConfig, convert_paths
from transformer_jax.recipes.finetuning import plot_classes
from transformer_jax.recipes.finetuning_run import (
    add_task_head,
    check_training_config,
    encode_for_training,
    finetune_params,
    load_base,
    main_metric,
)
from transformer_jax.recipes.retention import RetentionEval, make_retention_eval
from transformer_jax.recipes.task_encoder import EncodedDataset
from transformer_jax.report import plots

SCRATCH = "scratch"
"""Spec in `SweepConfig.trainable` that trains a newly initialized model of the same size."""
AVERAGED = ("score", "exact_match", "f1", "accuracy", "matthews", "spearman", "ece",
            "held_out_after", "seconds", "seconds_per_step")
"""Metrics whose mean and standard deviation over seeds are stored in `results.json`."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a comparison of trainable specs.

    Attributes:
        pretrained: folder of a pre-training run, or a checkpoint in the Hugging Face format.
        out: folder of the sweep.
        dataset: the labeled data.
        training: settings of the training.
        dropout_rate: overrides the model's dropout rate, also that of attention weights.
        pooling: overrides the input of BERT's classifier: "first" or "mean".
        retention_data: text on which the pre-training loss of a checkpoint is measured.
        trainable: trainable specs; "scratch" trains a newly initialized model of the same size.
        peak_lrs: peak learning rate for each spec; if empty, that of `training`.
        epochs: number of passes over the examples for each spec; if empty, that of `training`.
        aux_lm_loss_weights: weight of GPT's auxiliary language-model loss for each spec; if empty,
            that of `training`.
        examples: numbers of training examples, as balanced as the classes allow; empty for all.
        seeds: number of runs of each spec, which differ in the selection of examples, new
            parameters, data order and dropout.
        quiet: whether to suppress the progress display.
    """

    pretrained: str
    out: Path
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    dropout_rate: float | None = None
    pooling: str | None = None
    retention_data: str = "python_docs/documents"
    trainable: tuple[str, ...] = ("full", "lora:8", "bitfit", "last_k:2", "head")
    peak_lrs: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    aux_lm_loss_weights: tuple[float, ...] = ()
    examples: tuple[int, ...] = ()
    seeds: int = 3
    quiet: bool = False

    def __post_init__(self):
        convert_paths(self, "out")
        for name in ("peak_lrs", "epochs", "aux_lm_loss_weights"):
            values = getattr(self, name)
            if values and len(values) != len(self.trainable):
                raise ValueError(f"there are {len(values)} {name} for {len(self.trainable)} "
                                 "trainable specs; give one for each")
        if len(self.variants) < len(self.trainable):
            raise ValueError(f"trainable is {', '.join(self.trainable)}; each spec may occur once, "
                             "or once for each value of aux_lm_loss_weights")

    @property
    def variants(self) -> dict[str, tuple[str, TrainingConfig]]:
        """Name of each row of the table -> its trainable spec and training settings."""
        variants = {}
        for k, spec in enumerate(self.trainable):
            name, training = spec, self.training
            if self.peak_lrs:
                optimizer = dataclasses.replace(training.optimizer, peak_lr=self.peak_lrs[k])
                training = dataclasses.replace(training, optimizer=optimizer)
            if self.epochs:
                training = dataclasses.replace(training, epochs=self.epochs[k])
            if self.aux_lm_loss_weights:
                weight = self.aux_lm_loss_weights[k]
                name = f"{spec}, LM loss x {weight:g}"
                training = dataclasses.replace(training, aux_lm_loss_weight=weight)
            variants[name] = ("full" if spec == SCRATCH else spec, training)
        return variants


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Runs all cells that are not complete, prints the table, and writes results and figures.

    Writes to `config.out`: `cells.jsonl`; the predictions and figures of the first seed; and
    `results.json` with the means and standard deviations over seeds of the scores and of the
    pre-training loss after fine-tuning.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: the model or the data does not exist.
        ValueError: the data or the settings do not fit the model.
    """
    began = time.perf_counter()
    console = Console(width=120)
    base = load_base(config.pretrained, dropout_rate=config.dropout_rate, pooling=config.pooling)
    dataset = load_dataset(config.dataset)
    model, pretrained = add_task_head(base, dataset)
    for _, training in config.variants.values():
        check_training_config(training, dataset, model)
    retention = make_retention_eval(config.pretrained, base, config.retention_data)
    before = retention.loss()
    console.print(f"{len(dataset.train):,} examples, {len(dataset.validation):,} to evaluate on; "
                  f"left out: {dataset.dropped}; held-out pre-training loss "
                  f"({retention.objective}) {before:.3f}")

    for num_examples in config.examples or (None,):
        @functools.cache
        def encode(seed: int, num_examples: int | None = num_examples) -> EncodedDataset:
            chosen = subsample_balanced(dataset.train, None, seed, total=num_examples)
            return encode_for_training(
                dataset._replace(train=chosen), model, base.tokenizer, config.training)

        # The runs of a variant with different seeds share compiled steps.
        for name in config.variants:
            for seed in range(config.seeds):
                cell = _cell_key(config, name, num_examples, seed)
                if any(done.items() >= cell.items() for done in _load_cells(config)):
                    continue
                done = _run_cell(config, cell, encode(seed), pretrained, retention)
                console.print(f"{name}, {done['labels']:,} examples, seed {seed}: "
                              f"{dataset.metric} {done['score']:.4f}, {done['seconds']:.0f} s, "
                              f"pre-training loss {done['held_out_after']:.3f}", highlight=False)
    rows = summarize(config, _load_cells(config))
    console.print(make_table(config, rows, dataset.metric, before))
    _save_figures(config, rows, dataset)
    return run_dir.write_results(
        config.out, config, {
            "cells": rows, "held_out_objective": retention.objective, "held_out_before": before,
            "metric": dataset.metric, "dropped": dataset.dropped}, time.perf_counter() - began)


def _run_cell(config: SweepConfig, cell: dict, data: EncodedDataset, pretrained: dict,
              retention: RetentionEval) -> dict[str, Any]:
    """Runs one cell, appends its line to `cells.jsonl` and returns it."""
    spec, training = config.variants[cell["recipe"]]
    from_scratch = cell["recipe"].startswith(SCRATCH)
    result = finetune_params(data, None if from_scratch else pretrained, spec, training,
                             cell["seed"], quiet=config.quiet)
    m, dataset = result.metrics, data.dataset
    if cell["seed"] == 0:
        name = re.sub(r"[^\w.]+", "_", f"{cell['recipe']} {m['labels']}")
        run_dir.write_predictions(
            config.out / "predictions" / f"{name}.jsonl", result.predictions)
        plot_classes(config.out, f"_{name}", m, dataset.label_names,
                     f"{_dataset_name(config)}, {cell['recipe']}")
    scalars = {name: x for name, x in m.items() if not isinstance(x, dict) and np.ndim(x) == 0}
    line = run_dir.to_json(cell | scalars | {
        "score": m[main_metric(dataset)],
        "ece": m["calibration"]["ece"] if "calibration" in m else None,
        "held_out_after": retention.loss(result.params)})
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "cells.jsonl"
    if path.is_file() and not (text := path.read_text()).endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])  # drops an incomplete line
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def _cell_key(config: SweepConfig, name: str, num_examples: int | None, seed: int) -> dict:
    """Returns the identity of a cell, with a hash of the settings that it depends on."""
    settings = [config.pretrained, config.dataset, config.variants[name], config.dropout_rate,
                config.pooling, config.retention_data]
    # With the old names of settings, so that sweeps of older versions can be resumed.
    text = json.dumps(
        run_dir.with_old_names(run_dir.without_new_settings(run_dir.to_json(settings))),
        sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"recipe": name, "examples": num_examples, "seed": seed, "config": digest[:16]}


def _load_cells(config: SweepConfig) -> list[dict]:
    """Returns all lines of `cells.jsonl`, except a last line that is incomplete."""
    path = config.out / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summarize(config: SweepConfig, cells: Sequence[dict]) -> list[dict]:
    """Returns a row for each variant and number of examples: means and standard deviations."""
    rows = []
    for num_examples in config.examples or (None,):
        for name in config.variants:
            keys = [_cell_key(config, name, num_examples, seed) for seed in range(config.seeds)]
            # Two processes that share the folder may write a cell twice; the first is used.
            found = [next(x for x in cells if x.items() >= key.items()) for key in keys]
            row = {"recipe": name, "labels": found[0]["labels"], "seeds": len(found),
                   "trained": found[0]["trained"], "share_trained": found[0]["share_trained"],
                   "scores": [x["score"] for x in found]}
            for metric in AVERAGED:
                values = [x[metric] for x in found if x.get(metric) is not None]
                if values:
                    row[metric], row[f"{metric}_std"], _ = metrics.mean_std(values)
            rows.append(row)
    return rows


def _percent_scale(metric: str) -> int:
    """Returns the factor that converts a metric to percent; some are already in percent."""
    return 1 if metric in ("squad", "rouge", "bleu") else 100


def make_table(config: SweepConfig, rows: Sequence[dict], metric: str, before: float) -> Table:
    """Returns the table of the rows of `summarize`, with the pre-training loss `before`."""
    table = Table(title=f"{config.dataset.data}: {metric} over {config.seeds} seeds; held-out "
                        f"pre-training loss before {before:.3f}")
    for heading in ("examples", "trainable", metric, "trained %", "ms/step", "seconds",
                    "pre-training loss after"):
        table.add_column(heading, justify="left" if heading == "trainable" else "right")
    scale = _percent_scale(metric)
    for row in rows:
        std = f" ± {scale * row['score_std']:.1f}" if row["seeds"] > 1 else ""
        table.add_row(
            f"{row['labels']:,}", row["recipe"], f"{scale * row['score']:.1f}{std}",
            f"{100 * row['share_trained']:.3f}", f"{1000 * row.get('seconds_per_step', 0):.0f}",
            f"{row['seconds']:.0f}", f"{row['held_out_after']:.3f}")
    return table


def _dataset_name(config: SweepConfig) -> str:
    return config.dataset.data.rstrip("/").rpartition("/")[2]


def _save_figures(config: SweepConfig, rows: Sequence[dict], dataset: LabeledDataset) -> None:
    """Plots scores by number of examples or, for one number, by fraction of parameters trained."""
    name, metric = _dataset_name(config), dataset.metric
    scale = _percent_scale(metric)
    if len(config.examples) > 1:
        # `label_efficiency` multiplies by 100.
        lines = {variant: tuple(zip(*[
            (r["labels"], scale / 100 * r["score"], scale / 100 * r["score_std"])
            for r in rows if r["recipe"] == variant])) for variant in config.variants}
        chance = None
        if metric == "accuracy" and dataset.task_type != "token_classification":
            labels = [e["label"] for e in dataset.validation]
            chance = float(max(np.bincount(labels)) / len(labels))
        plots.label_efficiency(
            config.out / "label_efficiency.png", {name: lines}, chance=chance,
            title=f"Label efficiency ({config.seeds} seeds)", ylabel=f"{metric} (%)")
        return
    plots.trainable_specs(
        config.out / "recipes.png",
        {r["recipe"]: (r["share_trained"], scale * r["score"], scale * r["score_std"])
         for r in rows}, title=f"{name}, {config.seeds} seeds", ylabel=f"{metric} (%)")
