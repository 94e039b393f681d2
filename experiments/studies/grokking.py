"""Grokking: generalization on modular addition long after the training pairs are memorized.

    python experiments/study.py grokking

Claims (Power et al. 2022, "Grokking"; Varma et al. 2023, "Explaining grokking through circuit
efficiency"): on modular addition, the accuracy on unseen pairs rises to 100 % long after that on
the training pairs. If the training pairs are less than a critical fraction of the addition table,
the accuracy on unseen pairs never rises to 100 %.
A grokked model forgets the rule when training continues on less than that fraction ("ungrokking").

Full fine-tuning is compared with fine-tuning of few parameters, which preserves the rule.

Hardware and time: one core of an AMD EPYC, 14 minutes; addition modulo 47, three seeds.

Result: the claims hold. With 40 % of the table, the accuracy on the training pairs reaches 99 %
after 400 to 500 steps, and that on unseen pairs after 2,000 to 2,500 (with 50 % of the table, after
600 to 900); both are 100 % at the end. The critical fraction, at which the accuracy on unseen pairs
is 50 % after 6,000 steps, is 30 %; with 25 %, no seed exceeds 8 %. When training continues on 5 %
of the table, the accuracy of the grokked models on unseen pairs falls from 100 % to 5 or 6 % for
every seed. With `lora:2:all` or `bitfit`, the same learning rate and the same number of steps, it
stays at 100 % for every seed.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from studies.figures import Line, Lines, save_panels
from transformer_jax import tree
from transformer_jax.finetuning import peft, select
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.train import optimizers, step


@dataclass(frozen=True, kw_only=True)
class Grokking:
    """Settings of the study: modular addition a + b = c (mod p); a row has the tokens a, b and =.

    Attributes:
        out: folder for the figure and the results.
        modulus: p, a prime; the addition table has p x p pairs.
        train_fractions: fractions of the table to train on.
        seeds: number of seeds for each fraction and each trainable spec.
        num_steps: steps of training.
        eval_every: steps between evaluations.
        batch_size: rows per step.
        num_layers: layers of the model.
        d_model: width of the model.
        peak_lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        grokked_fraction: one of `train_fractions`, whose models are fine-tuned.
        finetune_fraction: fraction of the table to fine-tune on; less than `grokked_fraction`.
        trainable: trainable specs of fine-tuning.
        finetune_steps: steps of fine-tuning.
        seed: first seed.
    """

    out: Path = Path("runs/grokking")
    modulus: int = 47
    train_fractions: tuple[float, ...] = (0.2, 0.25, 0.3, 0.4, 0.5)
    seeds: int = 3
    num_steps: int = 6000
    eval_every: int = 100
    batch_size: int = 256
    num_layers: int = 1
    d_model: int = 64
    peak_lr: float = 1e-3
    weight_decay: float = 1.0
    grokked_fraction: float = 0.4
    finetune_fraction: float = 0.05
    trainable: tuple[str, ...] = ("full", "lora:2:all", "bitfit")
    finetune_steps: int = 3000
    seed: int = 0


SIZES = {
    "default": Grokking(),
    "large": Grokking(
        modulus=97, train_fractions=(0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), seeds=8, num_layers=2,
        d_model=128, batch_size=512, num_steps=50_000, finetune_steps=20_000),
    "smallest": Grokking(
        modulus=5, train_fractions=(0.4, 0.8), seeds=2, num_steps=20, eval_every=10, batch_size=8,
        d_model=32, grokked_fraction=0.8, finetune_fraction=0.3, finetune_steps=20),
}


class ParallelRuns(NamedTuple):
    """Runs that `jax.vmap` trains in parallel: arrays have a leading run axis.

    `order` [runs, p * p] has permutations of the table's pairs; a run trains on the first `count`
    of them.
    """

    state: step.TrainState
    order: jax.Array
    count: jax.Array


Series = dict[str, np.ndarray]
"""Evaluations of parallel runs: "step" [evaluations]; "loss", "train" and "test" (accuracies) and
"norm" (of the parameters), each [runs, evaluations]."""


def addition_table(modulus: int) -> dict[str, np.ndarray]:
    """Returns all pairs as rows of the tokens a, b and =; the target at = is (a + b) mod p."""
    a, b = np.divmod(np.arange(modulus**2), modulus)
    tokens = np.stack([a, b, np.full(modulus**2, modulus)], axis=1).astype(np.int32)
    targets = np.zeros_like(tokens)
    targets[:, 2] = (a + b) % modulus
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, 2] = 1
    return {"tokens": tokens, "targets": targets, "weights": weights}


def make_model(config: Grokking) -> GPT:
    return GPT(presets.gpt2(
        num_layers=config.num_layers, d_model=config.d_model,
        num_heads=max(config.d_model // 32, 1), mlp_dim=4 * config.d_model,
        vocab_size=config.modulus + 1, max_length=3, dropout_rate=0.0, attention_dropout_rate=0.0,
        tie_embeddings=False))


def make_train_and_eval(config: Grokking, train_step: Callable, apply: Callable) -> Callable:
    """Returns `train_and_eval(runs, rng) -> (runs, metrics)`.

    It trains every run for `eval_every` steps on random training pairs, then computes the
    accuracies on the training pairs and on the rest of the table.
    """
    pairs = jax.tree.map(jnp.asarray, addition_table(config.modulus))
    num_pairs = config.modulus**2

    def train_and_eval_one(state, order, count, rng):
        def update(state, rng):
            rows = order[jax.random.randint(rng, (config.batch_size,), 0, count)]
            state, metrics = train_step(state, jax.tree.map(lambda x: x[rows], pairs), None)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(update, state, jax.random.split(rng, config.eval_every))
        logits = apply({"params": state.params}, pairs["tokens"]).logits[:, 2]
        is_correct = logits.argmax(-1) == pairs["targets"][:, 2]
        is_train = jnp.zeros(num_pairs, bool).at[order].set(jnp.arange(num_pairs) < count)
        train, test = ((is_correct & part).sum() / part.sum() for part in (is_train, ~is_train))
        norm = jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(state.params)))
        return state, {"loss": losses.mean(), "train": train, "test": test, "norm": norm}

    def train_and_eval(runs: ParallelRuns, rng):
        rngs = jax.random.split(rng, runs.count.shape[0])
        state, metrics = jax.vmap(train_and_eval_one)(*runs, rngs)
        return runs._replace(state=state), metrics

    return jax.jit(train_and_eval, donate_argnums=0)


def train(config: Grokking, train_and_eval: Callable, runs: ParallelRuns, num_steps: int,
          title: str) -> tuple[ParallelRuns, Series]:
    """Trains parallel runs and shows a progress bar."""
    evaluations = []
    for i in track(range(num_steps // config.eval_every), title):
        runs, metrics = train_and_eval(runs, jax.random.key(10_000 + config.seed + i))
        evaluations.append(jax.device_get(metrics))
    series = {name: np.stack([metrics[name] for metrics in evaluations], axis=1)
              for name in evaluations[0]}
    return runs, {"step": config.eval_every * np.arange(1, len(evaluations) + 1), **series}


def make_optimizer(
    config: Grokking, num_steps: int, end_lr: float
) -> optax.GradientTransformation:
    schedule = optimizers.make_schedule(
        "cosine", config.peak_lr, num_steps, min(10, num_steps - 1), end_lr)
    return optimizers.make_optimizer(
        schedule, weight_decay=config.weight_decay, b2=0.98, clip_norm=None)


def init_runs(params: dict, optimizer: optax.GradientTransformation, mask: Any,
              orders: Sequence[np.ndarray], counts: Sequence[int]) -> ParallelRuns:
    """Returns parallel runs before the first step; arrays in `params` have a leading run axis."""
    state = jax.jit(jax.vmap(lambda p: step.init_state(p, optimizer, mask)))(params)
    return ParallelRuns(state, jnp.asarray(np.stack(orders)), jnp.asarray(counts))


def train_all_fractions(
    config: Grokking, model: GPT
) -> tuple[dict, Series, list[np.ndarray]]:
    """Trains all fractions and seeds in parallel; returns (parameters, series, orders of the
    pairs).

    Runs are in order of fraction, then of seed.
    """
    # With a constant learning rate, Adam occasionally moves a converged model out of its minimum
    # (Thilak et al. 2022, "The Slingshot Mechanism"), so the learning rate decays to a tenth.
    optimizer = make_optimizer(config, config.num_steps, config.peak_lr / 10)
    train_step = step.make_train_step(functools.partial(causal_lm.loss, model.apply), optimizer)
    num_pairs = config.modulus**2
    seeds = [config.seed + k for k in range(config.seeds)] * len(config.train_fractions)
    fractions = np.repeat(config.train_fractions, config.seeds)
    orders = [np.random.default_rng(seed).permutation(num_pairs) for seed in seeds]
    params = jax.jit(jax.vmap(lambda seed: init_params(model, jax.random.key(seed))))(
        jnp.array(seeds))
    runs = init_runs(params, optimizer, None, orders, [int(f * num_pairs) for f in fractions])
    runs, series = train(config, make_train_and_eval(config, train_step, model.apply), runs,
                         config.num_steps, f"{len(seeds)} runs of {config.num_steps} steps")
    return jax.device_get(runs.state.params), series, orders


def finetune(
    config: Grokking, model: GPT, params: dict, orders: Sequence[np.ndarray], spec: str
) -> dict[str, Any]:
    """Fine-tunes the grokked models with a trainable spec on a subset of their training pairs.

    Returns the series, and the fraction of trainable parameters as "trained".
    """
    rng = jax.random.key(config.seed)
    params = jax.vmap(lambda p: peft.add_and_mask(p, spec, rng)[0])(params)
    mask = select.trainable_mask(params, spec)
    optimizer = make_optimizer(config, config.finetune_steps, config.peak_lr)
    train_step = step.make_train_step(
        functools.partial(causal_lm.loss, model.apply), optimizer, mask)
    count = int(config.finetune_fraction * config.modulus**2)
    runs = init_runs(params, optimizer, mask, orders, [count] * config.seeds)
    _, series = train(config, make_train_and_eval(config, train_step, model.apply), runs,
                      config.finetune_steps, f"{spec} on {config.finetune_fraction:.0%}")
    print(f"  accuracy on unseen pairs, by seed: {np.round(100 * series['test'][:, -1], 1)} %",
          flush=True)
    trained = tree.count(tree.partition(params, mask)[0]) / tree.count(params)
    return series | {"trained": trained}


def first_step_above(steps: np.ndarray, accuracy: np.ndarray, threshold: float) -> list[float]:
    """Returns the first step at which the accuracy of each run is at least `threshold`, or NaN."""
    reached = accuracy >= threshold
    return [float(steps[row.argmax()]) if row.any() else float("nan") for row in reached]


def critical_fraction(fractions: Sequence[float], accuracy: np.ndarray) -> float:
    """Returns the fraction at which the mean accuracy crosses 50 %, interpolated; NaN if it does
    not.
    """
    if accuracy[0] >= 0.5 or accuracy[-1] < 0.5:
        return float("nan")
    i = int((accuracy >= 0.5).argmax())
    part = (0.5 - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return fractions[i - 1] + part * (fractions[i] - fractions[i - 1])


def run(config: Grokking) -> dict[str, Any]:
    if config.grokked_fraction not in config.train_fractions:
        raise ValueError(f"grokked_fraction is {config.grokked_fraction}; it must be one of the "
                         f"train_fractions {config.train_fractions}")
    if config.finetune_fraction >= config.grokked_fraction:
        raise ValueError(f"finetune_fraction is {config.finetune_fraction}; it must be less than "
                         f"grokked_fraction, {config.grokked_fraction}")
    model = make_model(config)
    params, series, orders = train_all_fractions(config, model)
    steps = series["step"]
    runs_of = {fraction: slice(i * config.seeds, (i + 1) * config.seeds)
               for i, fraction in enumerate(config.train_fractions)}
    rows = [{"fraction": fraction, "train": series["train"][runs, -1],
             "test": series["test"][runs, -1], "best_test": series["test"][runs].max(1),
             "steps_to_train": first_step_above(steps, series["train"][runs], 0.99),
             "steps_to_test": first_step_above(steps, series["test"][runs], 0.99)}
            for fraction, runs in runs_of.items()]
    for row in rows:
        print(f"{row['fraction']:.0%} of the table: test accuracy {100 * row['test'].mean():.1f} "
              f"%; training accuracy reaches 99 % after {row['steps_to_train']} steps, test "
              f"accuracy after {row['steps_to_test']}", flush=True)
    critical = critical_fraction(
        config.train_fractions, np.array([row["test"].mean() for row in rows]))
    grokked = runs_of[config.grokked_fraction]
    curves = {name: series[name][grokked] for name in ("train", "test")} | {"step": steps}
    grokked_params = jax.tree.map(lambda x: x[grokked], params)
    finetuned = {spec: finetune(config, model, grokked_params, orders[grokked], spec)
                 for spec in config.trainable}
    save_figure(config, curves, rows, critical, finetuned)
    return {
        "sweep": rows, "critical_fraction": critical, "curves": curves,
        "finetuning": {spec: {name: found[name] for name in ("trained", "step", "train", "test")}
                       for spec, found in finetuned.items()},
    }


def mean_line(x: Sequence[float], accuracy: np.ndarray, **style: Any) -> Line:
    """Returns a line of the mean over runs, in percent, with the standard deviation as its band."""
    return Line(x, 100 * accuracy.mean(0), 100 * accuracy.std(0), **style)


def save_figure(config: Grokking, curves: Series, rows: Sequence[dict], critical: float,
                finetuned: dict[str, dict[str, Any]]) -> None:
    last = np.array([row["test"] for row in rows])
    before = curves["test"][:, -1:]
    finetuned_lines = {
        f"{spec} ({100 * found['trained']:.3g} % trainable)": mean_line(
            np.concatenate([[0], found["step"]]),
            np.concatenate([before, found["test"]], axis=1),
            dashed=spec == config.trainable[-1])  # so that a coinciding line stays visible
        for spec, found in finetuned.items()}
    axes = {"ylabel": "accuracy (%)", "ylim": (-3, 103)}
    save_panels(config.out / "grokking.png", {
        f"Grokking: {config.grokked_fraction:.0%} of the table": Lines({
            "training pairs": mean_line(curves["step"], curves["train"]),
            "unseen pairs": mean_line(curves["step"], curves["test"])}, xscale="log", **axes),
        f"Critical fraction after {config.num_steps:,} steps": Lines({
            "unseen pairs": Line([100 * f for f in config.train_fractions], 100 * last.mean(1),
                                 100 * last.std(1), markers=True, color="C1")},
            xlabel="training pairs (% of the table)",
            vertical=None if np.isnan(critical) else (100 * critical, f"{100 * critical:.0f} %"),
            **axes),
        f"Ungrokking: fine-tuning on {config.finetune_fraction:.0%} of the table": Lines(
            finetuned_lines, xlabel="step of fine-tuning",
            **(axes | {"ylabel": "accuracy on unseen pairs (%)"})),
    }, title=f"Addition modulo {config.modulus}, mean and standard deviation of {config.seeds} "
             "seeds")
