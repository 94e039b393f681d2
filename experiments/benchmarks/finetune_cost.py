"""Cost of a training step for each trainable spec: FLOPs, optimizer state, memory and time.

    python experiments/benchmarks/finetune_cost.py --out runs/cost

A model with the shape of BERT-base and random parameters classifies 8 rows of 128 tokens in float32
with dropout 0.1 and AdamW. The specs are timed in interleaved rounds, so that a change in the speed
of the machine affects all of them, and medians over rounds are reported. Then an epoch of `head` on
cached features is compared with one that computes the features in every step.

Hardware: two CPU cores with 8 GB take about ten minutes. Writes results.json and a plot to `--out`.
"""

import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from transformer_jax import tree
from transformer_jax.cli.command import run_command
from transformer_jax.finetuning import frozen, peft, select
from transformer_jax.models import BERT, BERTConfig, init_params, presets
from transformer_jax.objectives import classification
from transformer_jax.recipes.run_dir import setup, write_results
from transformer_jax.report import plots
from transformer_jax.train import optimizers, step


@dataclass(frozen=True)
class CostConfig:
    """Settings of the benchmark.

    Attributes:
        out: folder for the results.
        model: config of the model.
        trainable: trainable specs; ratios are relative to the first.
        batch_size: rows of a batch.
        length: tokens of a row.
        rounds: number of timed rounds.
        steps_per_round: steps of each spec in a round.
        epoch_batches: batches of the epoch on cached features; 0 skips that comparison.
    """

    out: Path = Path("runs/cost")
    model: tyro.conf.AvoidSubcommands[BERTConfig] = field(default_factory=presets.bert_base)
    trainable: tuple[str, ...] = ("full", "head", "last_k:2", "lora:8", "bitfit", "adapter:64",
                                  "prefix:16", "ia3")
    batch_size: int = 8
    length: int = 128
    rounds: int = 5
    steps_per_round: int = 2
    epoch_batches: int = 8


class CompiledSpec(NamedTuple):
    """The compiled train step of a trainable spec, its first state, and its row of the table."""

    train_step: Any
    state: step.TrainState
    costs: dict[str, Any]


def random_batch(config: CostConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of random texts without padding, with random labels."""
    rng = np.random.default_rng(seed)
    shape = (config.batch_size, config.length)
    return {"tokens": rng.integers(5, config.model.vocab_size, shape).astype(np.int32),
            "segment_ids": np.zeros(shape, np.int32), "padding_mask": np.ones(shape, bool),
            "labels": rng.integers(0, 2, config.batch_size).astype(np.int32),
            "weights": np.ones(config.batch_size, np.float32)}


def compile_spec(config: CostConfig, model: BERT, spec: str, loss_fn: Callable) -> CompiledSpec:
    """Compiles the train step of a trainable spec."""
    optimizer = optimizers.make_optimizer(1e-4)

    def init(rng):
        return peft.add_peft_params(init_params(model, rng), spec, rng)

    mask = select.trainable_mask(jax.eval_shape(init, jax.random.key(0)), spec)
    state = jax.jit(lambda rng: step.init_state(init(rng), optimizer, mask))(jax.random.key(0))
    began = time.perf_counter()
    compiled = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0).lower(
        state, random_batch(config), jax.random.key(1)).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    num_trainable = tree.count(tree.partition(state.params, mask)[0])
    return CompiledSpec(compiled, state, {
        "spec": spec, "trained": num_trainable,
        "share_trained": num_trainable / tree.count(state.params),
        "flops": compiled.cost_analysis()["flops"],
        "optimizer_bytes": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "compile_seconds": compile_seconds})


def time_interleaved(config: CostConfig, specs: list[CompiledSpec]) -> list[list[float]]:
    """Returns, for each spec, the seconds per step in each round."""
    batch, rng = jax.device_put(random_batch(config)), jax.random.key(1)
    times: list[list[float]] = [[] for _ in specs]
    states = [spec.state for spec in specs]
    for i in range(config.rounds + 1):
        for k, spec in enumerate(specs):
            began = time.perf_counter()
            for _ in range(config.steps_per_round):
                states[k], metrics = spec.train_step(states[k], batch, rng)
            jax.block_until_ready((states[k], metrics))
            if i:  # the first round warms up
                times[k].append((time.perf_counter() - began) / config.steps_per_round)
    return times


def time_cached_features(config: CostConfig, model: BERT) -> dict[str, float]:
    """Times an epoch of `head` with and without cached features, in seconds."""
    optimizer = optimizers.make_optimizer(1e-4)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    mask = select.trainable_mask(params, "head")
    batches = [random_batch(config, seed) for seed in range(config.epoch_batches)]

    def time_epoch(apply, batches) -> float:
        loss_fn = functools.partial(classification.classification_loss, apply)
        train_step = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0)
        state = step.init_state(params, optimizer, mask)
        state, _ = train_step(state, batches[0], jax.random.key(1))  # compiles
        jax.block_until_ready(state)
        began = time.perf_counter()
        for batch in batches:
            state, _ = train_step(state, batch, jax.random.key(1))
        jax.block_until_ready(state)
        return time.perf_counter() - began

    recomputed = time_epoch(model.apply, batches)
    began = time.perf_counter()
    rows = frozen.compute_features(model, params, batches)
    computing_features = time.perf_counter() - began
    feature_batches = [
        {name: np.stack([row[name] for row in rows[i : i + config.batch_size]])
         for name in rows[0]} for i in range(0, len(rows), config.batch_size)]
    cached = time_epoch(frozen.make_features_apply(model.apply), feature_batches)
    return {"recomputed": recomputed, "computing_features": computing_features, "cached": cached,
            "ratio": recomputed / cached}


def main(config: CostConfig) -> dict[str, Any]:
    """Compiles and times all specs, and returns the content of results.json."""
    began = time.perf_counter()
    console = Console(width=110)
    model = BERT(config.model, num_classes=2, task="classification")
    loss_fn = functools.partial(classification.classification_loss, model.apply)
    specs = []
    for spec in config.trainable:
        specs.append(compile_spec(config, model, spec, loss_fn))
        console.print(f"{spec}: compiled in {specs[-1].costs['compile_seconds']:.0f} s")
    times = time_interleaved(config, specs)
    rows = [spec.costs for spec in specs]
    first = rows[0]
    for row, seconds in zip(rows, times):
        row["seconds_per_step"] = float(np.median(seconds))
        row["time_ratio"] = float(np.median(np.array(seconds) / np.array(times[0])))
        row["flops_ratio"] = row["flops"] / first["flops"]
    del specs  # frees the states
    gc.collect()
    metrics: dict[str, Any] = {"specs": rows}
    if config.epoch_batches:
        metrics["cached_features"] = time_cached_features(config, model)
    console.print(make_table(config, rows))
    if config.epoch_batches:
        console.print(
            "an epoch of head: {recomputed:.2f} s without cached features, {cached:.3f} s with "
            "them: {ratio:.0f} times as fast".format(**metrics["cached_features"]))
    plots.costs(config.out / "cost.png", {
        row["spec"]: {"FLOPs": row["flops_ratio"], "time": row["time_ratio"],
                      "optimizer state": row["optimizer_bytes"] / first["optimizer_bytes"]}
        for row in rows}, title=f"Cost of a training step, relative to {config.trainable[0]}")
    return write_results(config.out, config, metrics, time.perf_counter() - began)


def make_table(config: CostConfig, rows: list[dict[str, Any]]) -> Table:
    """Returns the table of costs, one row for each spec."""
    table = Table(title=f"A training step of {config.batch_size} x {config.length} tokens; ratios "
                        f"are relative to {config.trainable[0]}")
    for heading in ("spec", "trainable", "%", "GFLOP", "ratio", "ms", "ratio", "optimizer MB",
                    "temporary MB"):
        table.add_column(heading, justify="left" if heading == "spec" else "right")
    for row in rows:
        table.add_row(
            row["spec"], f"{row['trained']:,}", f"{100 * row['share_trained']:.3f}",
            f"{row['flops'] / 1e9:.1f}", f"{row['flops_ratio']:.3f}",
            f"{1000 * row['seconds_per_step']:.0f}", f"{row['time_ratio']:.2f}",
            f"{row['optimizer_bytes'] / 1e6:.2f}", f"{(row['temporary_bytes'] or 0) / 1e6:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(run_command(
        lambda config: (setup(), main(config)),
        parse=lambda: tyro.cli(CostConfig, description=__doc__)))
