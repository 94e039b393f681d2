"""Which parameters: quality against the share that trains, against what is forgotten.

    python experiments/study.py which_parameters

Claims: fine-tuning needs to change a small part of the parameters; the less it changes, the more of
the old skill stays; and on few labels training everything is not the best.

A GPT of 0.7 million parameters, pre-trained on Python's documentation (a minute and a half), learns
by each recipe to tell which of twelve parts of the library a docstring is about. What it forgot is
the rise of its held-out pre-training loss. Rates are by recipe, chosen by hand.

One core of an AMD EPYC: 8 minutes, three seeds, 100 steps each. It holds in part. With 768 labels
full has 57.2 ± 2.5 % and loses 0.74 nats of the old skill; the embeddings alone 53.3 ± 2.8 for
0.22; LoRA, 5 % of the parameters, 46.5 ± 1.3 for 0.20; head, 0.2 %, 32.1 ± 0.8 for nothing. Where
it trains counts as much as how many: layer 0 alone costs 1.30 nats. With 96 labels full (29.1 ±
0.7) is still the best, if by less than the deviation of the next (last_k:1, 27.2 ± 3.6), and the
other eleven lie between 20.6 and 24.7: that masks do better on few labels does not show here.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import configs

from studies.pictures import Named, show
from transformer_jax import metrics
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain
from transformer_jax.recipes.sweep import SweepConfig, sweep

RATES = {
    "full": 1.5e-3, "last_k:1": 3e-3, "layers:0": 3e-3, "embeddings": 3e-3, "head": 1e-2,
    "bitfit": 1e-2, "layernorm": 1e-2, "lora:8:all": 5e-3, "lora:8:all,dora": 5e-3,
    "adapter:16": 5e-3, "prefix:8": 1e-2, "prompt:8": 3e-2, "ia3": 2e-2,
}


@dataclass(frozen=True, kw_only=True)
class WhichParameters:
    """Attributes:
        rates: what trains -> its highest learning rate.
        examples: annotated, of 12 classes.
        base: the config of its pre-training; pretrain_steps and width, if not 0, are in the place
            of its own.
    """

    out: Path = Path("runs/which_parameters")
    rates: dict[str, float] = field(default_factory=lambda: dict(RATES))
    examples: tuple[int, ...] = (96, 768)
    num_steps: int = 100
    seeds: int = 3
    base: str = "gpt_python_docs"
    pretrain_steps: int = 0
    width: int = 0


def config() -> WhichParameters:
    return WhichParameters()


def large() -> WhichParameters:
    return WhichParameters(examples=(96, 192, 768, 3072), num_steps=500, seeds=10)


def smallest() -> WhichParameters:
    return WhichParameters(rates={"head": 1e-2}, examples=(24,), num_steps=2, seeds=1,
                           pretrain_steps=2, width=16)


def run(c: WhichParameters) -> dict:
    settings = configs.load(PretrainConfig)[c.base][1]
    changes = {}
    if c.pretrain_steps:
        changes = {"num_steps": c.pretrain_steps, "eval_batches": 1,
                   "optimizer": dataclasses.replace(settings.optimizer, warmup_steps=0)}
    if c.width:
        changes["model"] = settings.model.replace(d_model=c.width, mlp_dim=c.width)
    base = c.out / "base"
    if not (base / "results.json").is_file():
        pretrain(dataclasses.replace(settings, out=base, **changes))
    found = sweep(SweepConfig(
        pretrained=str(base), out=c.out / "sweep", dataset=DatasetConfig(),
        trainable=tuple(c.rates), peak_lrs=tuple(c.rates.values()), examples=c.examples,
        seeds=c.seeds, quiet=True,
        training=TrainingConfig(max_length=48, batch_size=16, num_steps=c.num_steps,
                                optimizer=FinetuneOptimizerConfig(b2=0.99))))["metrics"]
    before, panels = found["held_out_before"], {}
    for examples in c.examples:
        rows = [row for row in found["cells"] if row["labels"] == examples]
        scores = {row["recipe"]: (100 * row["score"], 100 * (row["score_std"] or 0))
                  for row in rows}
        panels |= {
            f"Quality and share, {examples} labels": Named(
                {row["recipe"]: (100 * row["share_trained"], *scores[row["recipe"]])
                 for row in rows}, xlabel="share of the parameters that trains (%)", xscale="log"),
            f"Quality and forgetting, {examples} labels": Named(
                {row["recipe"]: (row["held_out_after"] - before, *scores[row["recipe"]])
                 for row in rows}, xlabel="rise of the pre-training loss (nats)")}
    show(c.out / "which_parameters.png", panels, columns=2,
         title=f"GPT by {len(c.rates)} recipes, mean and deviation of {c.seeds} seeds")
    best = {examples: max((row for row in found["cells"] if row["labels"] == examples),
                          key=lambda row: row["score"])["recipe"] for examples in c.examples}
    return {"cells": found["cells"], "held_out_before": before, "best": best,
            "correlation_of_share_and_forgetting": metrics.spearman(
                *([row[name] for row in found["cells"]]
                  for name in ("share_trained", "held_out_after")))}
