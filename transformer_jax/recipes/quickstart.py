"""Quickstart: pre-trains a GPT and a BERT, fine-tunes, evaluates and generates, in five minutes.

Nothing is downloaded: the text is the documentation that comes with Python. Copies of both
pre-trained models are fine-tuned to classify docstrings by the part of the standard library that
they document, with few labels and with increasing numbers of trainable parameters. A model of the
same size is trained from scratch for comparison.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from transformer_jax.data.datasets import load_dataset, subsample_balanced
from transformer_jax.generation import fill_mask, generate
from transformer_jax.models import GPT, presets
from transformer_jax.nn.layers import sinusoidal_positions
from transformer_jax.objectives.input_format import pack_bert_input
from transformer_jax.pretrained import LoadedRun, load_run
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
    convert_paths,
)
from transformer_jax.recipes.finetuning_run import (
    add_task_head,
    encode_for_training,
    finetune_params,
)
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain
from transformer_jax.recipes.retention import make_retention_eval
from transformer_jax.report import plots

PROMPTS = ("Return the", "If the file", "This class is used to")
SENTENCES = ("Return the [MASK] of the string.", "Raise an [MASK] if the file does not exist.",
             "I ate an [MASK] today.")
MODEL_SIZE = {
    "num_layers": 2, "d_model": 128, "num_heads": 4, "mlp_dim": 512, "vocab_size": 2048,
    "max_length": 64, "dropout_rate": 0.0, "attention_dropout_rate": 0.0, "init_std": 0.05}
"""Size of both models of the quickstart."""


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of the quickstart.

    Attributes:
        out: folder for all runs.
        trainable: trainable specs to compare.
        peak_lrs: peak learning rate for each spec; higher for fewer trainable parameters. Training
            from scratch uses that of "full" or, without such a spec, that of `training`.
        labels_per_class: numbers of labeled examples per class, in ascending order.
        seeds: number of fine-tuning runs per cell of the table.
        test_examples: number of examples of the test split to evaluate on.
        retention_rows: number of held-out rows on which the pre-training loss is measured.
        pretrain_steps: overrides the number of pre-training steps of both models, unless 0.
        training: settings of the fine-tuning runs.
    """

    out: Path = Path("runs/quickstart")
    trainable: tuple[str, ...] = ("head", "last_k:1", "full")
    peak_lrs: tuple[float, ...] = (1e-2, 3e-3, 1.5e-3)
    labels_per_class: tuple[int, ...] = (16, 64)
    seeds: int = 3
    test_examples: int = 384
    retention_rows: int = 96
    pretrain_steps: int = 0
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(
        max_length=48, batch_size=16, num_steps=50,
        optimizer=FinetuneOptimizerConfig(peak_lr=1.5e-3, b2=0.99)))

    def __post_init__(self):
        convert_paths(self, "out")
        if len(self.peak_lrs) != len(self.trainable):
            raise ValueError(f"there are {len(self.peak_lrs)} peak_lrs for {len(self.trainable)} "
                             "trainable specs; give one for each")


def gpt_python_docs() -> PretrainConfig:
    """Returns the pre-training settings of the quickstart's GPT."""
    return PretrainConfig(
        out=Path("runs/gpt_python_docs"),
        model=presets.gpt2(**MODEL_SIZE),
        objective="causal_lm", tokenizer="bpe", max_length=64, batch_size=32, num_steps=500,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=30, b2=0.99),
        eval_every=125, save_every=500, log_every=50,
    )


def bert_python_docs() -> PretrainConfig:
    """Returns the pre-training settings of the quickstart's BERT."""
    return PretrainConfig(
        out=Path("runs/bert_python_docs"),
        model=presets.bert_tiny(**MODEL_SIZE, norm_first=True, norm_epsilon=1e-6,
                                positions="sinusoidal"),
        objective="mlm_nsp", tokenizer="wordpiece", max_length=48, batch_size=32,
        num_steps=1400, mask_rate=0.3,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=60, b2=0.99),
        eval_every=350, save_every=1400, log_every=100,
    )


CONFIGS = {"GPT": gpt_python_docs, "BERT": bert_python_docs}
"""Name of a model of the quickstart -> its pre-training settings."""


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Runs the quickstart and returns the content of `results.json`.

    Prints tables, generated texts and filled masks, and writes figures, results and the folders of
    both pre-training runs to `config.out`.
    """
    began = time.perf_counter()
    console = Console(width=110)
    cells, pretraining, runs = [], {}, {}
    for name, make_config in CONFIGS.items():
        console.rule(f"Pre-training {name} on the documentation of Python")
        folder = config.out / f"{name.lower()}_python_docs"
        pretrain_config = dataclasses.replace(make_config(), out=folder)
        if num_steps := config.pretrain_steps:  # of which at most a tenth are warm-up
            optimizer = pretrain_config.optimizer
            pretrain_config = dataclasses.replace(
                pretrain_config, num_steps=num_steps, optimizer=dataclasses.replace(
                    optimizer, warmup_steps=min(optimizer.warmup_steps, num_steps // 10)))
        pretraining[name] = pretrain(pretrain_config)["metrics"]
        runs[name] = load_run(folder)
        cells += _compare_specs(config, name, runs[name], folder, console)
    _save_figures(config, runs, cells)
    samples = _show_samples(runs, console)
    for name, measured in pretraining.items():
        console.print(f"{name}: held-out loss {measured['held_out_before']['loss']:.3f} before, "
                      f"{measured['held_out']['loss']:.3f} after pre-training (nats)")
    console.print(_finetuning_table(cells))
    metrics = {"pretraining": pretraining, "finetuning": cells, "samples": samples}
    results = run_dir.write_results(config.out, config, metrics, time.perf_counter() - began)
    console.print(f"{results['seconds']:.0f} s; figures and results.json are in {config.out}")
    return results


def _compare_specs(
    config: QuickstartConfig, name: str, base: LoadedRun, folder: Path, console: Console
) -> list[dict]:
    """Fine-tunes a model with each trainable spec on each number of labels.

    Returns one dict for each cell of the table, with means and standard deviations over seeds.
    """
    dataset = load_dataset(DatasetConfig())
    dataset = dataset._replace(validation=dataset.validation[: config.test_examples])
    model, pretrained = add_task_head(base, dataset)
    retention = make_retention_eval(folder, base, num_rows=config.retention_rows)
    before, labels = retention.loss(), [e["label"] for e in dataset.validation]
    peak_lrs = dict(zip(config.trainable, config.peak_lrs))
    rows = [("from scratch", "full", None),
            *[(spec, spec, pretrained) for spec in config.trainable]]
    cells = []
    for labels_per_class in config.labels_per_class:
        encoded = [
            encode_for_training(
                dataset._replace(train=subsample_balanced(dataset.train, labels_per_class, seed)),
                model, base.tokenizer, config.training)
            for seed in range(config.seeds)]
        for label, spec, params in rows:
            peak_lr = peak_lrs.get(spec, config.training.optimizer.peak_lr)
            training = dataclasses.replace(config.training, optimizer=dataclasses.replace(
                config.training.optimizer, peak_lr=peak_lr))
            results = [finetune_params(data, params, spec, training, seed, quiet=True)
                       for seed, data in enumerate(encoded)]
            accuracy = np.array([x.metrics["accuracy"] for x in results])
            after = [] if params is None else [retention.loss(x.params) for x in results]
            statistics = results[0].metrics
            cells.append({
                "model": name, "recipe": label, "labels": statistics["labels"],
                "accuracy": accuracy.mean(), "accuracy_std": accuracy.std(),
                "share_trained": statistics["share_trained"],
                "seconds_per_step": np.median([x.metrics["seconds_per_step"] for x in results]),
                "held_out_before": before, "held_out_after": np.mean(after) if after else None,
                "chance": max(np.bincount(labels)) / len(labels)})
            console.print(f"{name}, {label}, {statistics['labels']} labels: accuracy "
                          f"{100 * accuracy.mean():.1f} %")
    return cells


def _finetuning_table(cells: Sequence[dict]) -> Table:
    table = Table(title="Fine-tuning: trainable parameters and number of labels (mean of seeds)")
    for heading in ("model", "labels", "trainable", "accuracy %", "trained %", "ms/step",
                    "pre-training loss before", "after"):
        table.add_column(heading, justify="left" if heading in ("model", "trainable") else "right")
    for i, cell in enumerate(cells):
        after = cell["held_out_after"]
        table.add_row(
            cell["model"], str(cell["labels"]), cell["recipe"],
            f"{100 * cell['accuracy']:.1f} ± {100 * cell['accuracy_std']:.1f}",
            f"{100 * cell['share_trained']:.2f}", f"{1000 * cell['seconds_per_step']:.0f}",
            "" if after is None else f"{cell['held_out_before']:.3f}",
            "" if after is None else f"{after:.3f}",
            end_section=i + 1 < len(cells) and cells[i + 1]["labels"] != cell["labels"],
        )
    return table


def _show_samples(runs: dict[str, LoadedRun], console: Console) -> dict[str, Any]:
    """Prints and returns texts generated by the GPT and masks filled by the BERT."""
    gpt, bert = runs["GPT"], runs["BERT"]
    prompts = [gpt.tokenizer.encode(prompt) for prompt in PROMPTS]
    console.rule("Generated text")
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "rng": jax.random.key(0)}
    texts = {}
    for method, options in (("greedy", {}), ("sampled", sampling)):
        rows = generate(gpt.model, gpt.params, prompts, max_new_tokens=40,
                        eos_token_id=gpt.tokenizer.eos_id, **options)
        # Prompts are padded on the left with the end-of-text token, which decoding skips.
        texts[method] = [gpt.tokenizer.decode(row) for row in rows]
        for text in texts[method]:
            console.print(f"[{method}] {text}", markup=False)
    console.rule("Filled masks")
    tokenizer = bert.tokenizer
    masks = {}
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        row = pack_bert_input(
            ids, length=len(ids) + 2, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
        (prediction,) = fill_mask(
            bert.model, bert.params, row["tokens"], mask_id=tokenizer.mask_id)
        masks[sentence] = {tokenizer.decode([i]): float(p) for i, p in zip(
            prediction.token_ids, prediction.probabilities)}
        words = ", ".join(f"{word} {p:.2f}" for word, p in masks[sentence].items())
        console.print(f"{sentence}  ->  {words}", markup=False)
    return {"texts": texts, "masks": masks}


def _save_figures(
    config: QuickstartConfig, runs: dict[str, LoadedRun], cells: Sequence[dict]
) -> None:
    """Plots label efficiency, position embeddings, and attention with and without the causal mask.

    The loss curves of pre-training are in the folders of the two runs.
    """
    gpt = runs["GPT"]
    learned = np.asarray(gpt.params["position_embed"]["embedding"])
    plots.positions(config.out / "positions.png", {
        "fixed (sinusoidal)": sinusoidal_positions(*learned.shape), "learned by GPT": learned})
    ids = gpt.tokenizer.encode("Return the number of bytes that were written to the file.")
    plots.attention(config.out / "attention.png", _attention_maps(gpt.model, gpt.params, ids),
                    [gpt.tokenizer.decode([i]) or "·" for i in ids],
                    title="GPT, last layer, mean over heads")
    panels: dict[str, dict[str, tuple]] = {}
    for cell in cells:
        line = panels.setdefault(cell["model"], {}).setdefault(cell["recipe"], ([], [], []))
        for values, key in zip(line, ("labels", "accuracy", "accuracy_std")):
            values.append(cell[key])
    plots.label_efficiency(config.out / "labels.png", panels, chance=cells[0]["chance"],
                           title="Accuracy by number of labels and trainable parameters")


def _attention_maps(model: GPT, params: dict, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns attention weights `[T, T]` of the last layer with and without the causal mask."""
    apply = jax.jit(functools.partial(model.apply, output_attentions=True))
    masks = {"with the causal mask": None, "without it": np.ones((1, 1, 1, 1), bool)}
    return {
        name: np.asarray(apply({"params": params}, np.array([ids]), attention_mask=mask)
                         .attention[-1]).mean((0, 1))
        for name, mask in masks.items()
    }
