"""What each recipe costs: compiled FLOPs, optimizer state, memory and time of a training step.

    python experiments/finetune_cost.py --out runs/cost

A BERT of BERT-base's shape with random weights classifies 8 rows of 128 tokens, float32, dropout
0.1, AdamW. Steps are timed in turn, a few of each recipe a round, so that a busy machine is busy
for all; medians over rounds. Then an epoch of `head` on features computed once is timed against one
that computes them anew. Hardware: 2 CPU cores need 8 GB and about ten minutes. `results.json` and a
picture.
"""

import functools
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from transformer_jax import tree
from transformer_jax.finetuning import feature_cache, peft, select
from transformer_jax.models import BERT, BERTConfig, init_params, presets
from transformer_jax.objectives import classification
from transformer_jax.report import plots
from transformer_jax.train import optimizers, step


@dataclass(frozen=True)
class Cost:
    """Attributes:
    recipes: what is compared, to the first.
    rounds, per_round: how often each recipe has its turn, and steps of a turn.
    epoch_batches: of the epoch with cached features; 0 leaves it out.
    """

    out: Path = Path("runs/cost")
    model: tyro.conf.AvoidSubcommands[BERTConfig] = field(default_factory=presets.bert_base)
    recipes: tuple[str, ...] = ("full", "head", "last_k:2", "lora:8", "bitfit", "adapter:64",
                                "prefix:16", "ia3")
    batch_size: int = 8
    length: int = 128
    rounds: int = 5
    per_round: int = 2
    epoch_batches: int = 8


class Recipe(NamedTuple):
    step: Any  # compiled
    state: step.TrainState
    figures: dict


def rows(c: Cost, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random texts of full length."""
    rng = np.random.default_rng(seed)
    shape = (count, c.length)
    return {"tokens": rng.integers(5, c.model.vocab_size, shape).astype(np.int32),
            "segment_ids": np.zeros(shape, np.int32), "padding_mask": np.ones(shape, bool),
            "labels": rng.integers(0, 2, count).astype(np.int32),
            "weights": np.ones(count, np.float32)}


def prepare(c: Cost, model: BERT, recipe: str, loss_fn) -> Recipe:
    """The compiled step of a recipe with what the compiler says of it."""
    optimizer = optimizers.make_optimizer(1e-4)

    def params_of(key):
        return peft.add_peft_params(init_params(model, key), recipe, key)

    mask = select.trainable_mask(jax.eval_shape(params_of, jax.random.key(0)), recipe)
    state = jax.jit(lambda key: step.init_state(params_of(key), optimizer, mask))(
        jax.random.key(0))
    began = time.perf_counter()
    compiled = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0).lower(
        state, rows(c, c.batch_size), jax.random.key(1)).compile()
    memory = compiled.memory_analysis()
    return Recipe(compiled, state, {
        "recipe": recipe, "trained": tree.count(tree.partition(state.params, mask)[0]),
        "share_trained": tree.count(tree.partition(state.params, mask)[0]) / tree.count(state.params),
        "flops": compiled.cost_analysis()["flops"],
        "optimizer_bytes": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "compile_seconds": time.perf_counter() - began})


def interleaved(c: Cost, found: list[Recipe]) -> list[list[float]]:
    """Seconds a step of each recipe, by round."""
    batch, rng = jax.device_put(rows(c, c.batch_size)), jax.random.key(1)
    times: list[list[float]] = [[] for _ in found]
    states = [r.state for r in found]
    for turn in range(c.rounds + 1):
        for k, recipe in enumerate(found):
            began = time.perf_counter()
            for _ in range(c.per_round):
                states[k], metrics = recipe.step(states[k], batch, rng)
            jax.block_until_ready((states[k], metrics))
            if turn:  # the first is for warmth
                times[k].append((time.perf_counter() - began) / c.per_round)
    return times


def cached_features(c: Cost, model: BERT) -> dict[str, float]:
    """Seconds of an epoch of `head` that computes the body, that does it once and for all, and of
    an epoch after that."""
    optimizer = optimizers.make_optimizer(1e-4)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    mask = select.trainable_mask(params, "head")
    batches = [rows(c, c.batch_size, seed) for seed in range(c.epoch_batches)]

    def epoch(apply, batches) -> float:
        loss_fn = functools.partial(classification.classification_loss, apply)
        run = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0)
        state = step.init_state(params, optimizer, mask)
        state, _ = run(state, batches[0], jax.random.key(1))  # compiles
        jax.block_until_ready(state)
        began = time.perf_counter()
        for batch in batches:
            state, _ = run(state, batch, jax.random.key(1))
        jax.block_until_ready(state)
        return time.perf_counter() - began

    recomputed = epoch(model.apply, batches)
    began = time.perf_counter()
    found = feature_cache.compute_features(model, params, batches)
    once = time.perf_counter() - began
    small = [{name: np.stack([row[name] for row in found[k : k + c.batch_size]])
              for name in found[0]} for k in range(0, len(found), c.batch_size)]
    cached = epoch(feature_cache.make_features_apply(model.apply), small)
    return {"recomputed": recomputed, "computing_features": once, "cached": cached,
            "ratio": recomputed / cached}


def main(c: Cost) -> dict:
    """The command: compile all, time them in turn, and write the table."""
    began = time.perf_counter()
    console = Console(width=110)
    model = BERT(c.model, num_classes=2, task="classification")
    loss_fn = functools.partial(classification.classification_loss, model.apply)
    found = []
    for recipe in c.recipes:
        found.append(prepare(c, model, recipe, loss_fn))
        console.print(f"{recipe}: compiled in {found[-1].figures['compile_seconds']:.0f} s")
    times = interleaved(c, found)
    figures = [r.figures for r in found]
    first = figures[0]
    for k, row in enumerate(figures):
        row["seconds_per_step"] = float(np.median(times[k]))
        row["time_ratio"] = float(np.median(np.array(times[k]) / np.array(times[0])))
        row["flops_ratio"] = row["flops"] / first["flops"]
    del found
    gc.collect()
    metrics = {"recipes": figures}
    if c.epoch_batches:
        metrics["cached_features"] = cached_features(c, model)
    console.print(table(c, figures))
    if c.epoch_batches:
        console.print("an epoch of head: {recomputed:.2f} s computing the body, {cached:.3f} s on "
                      "cached features: {ratio:.0f} times faster".format(
                          **metrics["cached_features"]))
    plots.costs(c.out / "cost.png", {
        row["recipe"]: {"FLOPs": row["flops_ratio"], "time": row["time_ratio"],
                        "optimizer state": row["optimizer_bytes"] / first["optimizer_bytes"]}
        for row in figures}, title=f"A training step, relative to {c.recipes[0]}")
    return common.write_results(c.out, c, metrics, time.perf_counter() - began)


def table(c: Cost, figures: list[dict]) -> Table:
    shown = Table(title=f"One step of {c.batch_size} x {c.length} tokens; ratios to {c.recipes[0]}")
    for heading in ("recipe", "trained", "%", "GFLOP", "ratio", "ms", "ratio", "optimizer MB",
                    "temporary MB"):
        shown.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in figures:
        shown.add_row(
            row["recipe"], f"{row['trained']:,}", f"{100 * row['share_trained']:.3f}",
            f"{row['flops'] / 1e9:.1f}", f"{row['flops_ratio']:.3f}",
            f"{1000 * row['seconds_per_step']:.0f}", f"{row['time_ratio']:.2f}",
            f"{row['optimizer_bytes'] / 1e6:.2f}", f"{(row['temporary_bytes'] or 0) / 1e6:.0f}")
    return shown


if __name__ == "__main__":
    config = tyro.cli(Cost, description=__doc__)
    common.start()
    main(config)
