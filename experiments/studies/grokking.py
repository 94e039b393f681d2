"""Grokking: a model that has long known its examples by heart comes to understand them.

    python experiments/study.py grokking

Claims (Power et al. 2022, "Grokking"; Varma et al. 2023, "Explaining grokking through circuit
efficiency"): on modular addition the accuracy on unseen pairs rises to 100 % long after that on the
training pairs; below a critical share of the table it never does; and a model that has grokked
forgets the rule if it is trained on, on less than that share ("ungrokking"). What fine-tuning
leaves alone cannot be forgotten: masks that keep the rule are shown beside it.

One core of an AMD EPYC: 14 minutes, addition modulo 47, three seeds. It holds. Of 40 % of the table
99 % of the training pairs are known after 400 to 500 steps, 99 % of the others after 2,000 to
2,500, and all at the end; of 50 % after 600 to 900. The critical share, where unseen pairs cross
one half after 6,000 steps, is 30 %; of 25 % no seed gets beyond 8 %. Trained on, on 5 % of the
table, the grokked models fall from 100 to 5 or 6 % of the unseen pairs in every seed; by lora:2:all
and by bitfit, at the same rate for as long, all seeds stay at 100 %.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from studies.pictures import Line, Lines, show
from transformer_jax import tree
from transformer_jax.finetuning import peft, select
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.train import optimizers, step


@dataclass(frozen=True, kw_only=True)
class Grokking:
    """Modular addition, a + b = c (mod p), a row being the three tokens a b =.

    Attributes:
        p: the modulus, a prime; the table has p x p pairs.
        shares: of the table that are trained on, in the sweep.
        seeds: of each share, and of each fine-tuning.
        every: updates between two looks.
        grokked: the share that the fine-tuned models have learnt from; few: what is left of it for
            fine-tuning.
        recipes: what trains then; finetune_steps: for how long.
        rate, weight_decay: of AdamW.
    """

    out: Path = Path("runs/grokking")
    p: int = 47
    shares: tuple[float, ...] = (0.2, 0.25, 0.3, 0.4, 0.5)
    seeds: int = 3
    num_steps: int = 6000
    every: int = 100
    batch_size: int = 256
    num_layers: int = 1
    d_model: int = 64
    rate: float = 1e-3
    weight_decay: float = 1.0
    grokked: float = 0.4
    few: float = 0.05
    recipes: tuple[str, ...] = ("full", "lora:2:all", "bitfit")
    finetune_steps: int = 3000
    seed: int = 0


def config() -> Grokking:
    return Grokking()


def large() -> Grokking:
    return Grokking(p=97, shares=(0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), seeds=8, num_layers=2,
                    d_model=128, batch_size=512, num_steps=50_000, finetune_steps=20_000)


def smallest() -> Grokking:
    return Grokking(p=5, shares=(0.4, 0.8), seeds=2, num_steps=20, every=10, batch_size=8,
                    d_model=32, grokked=0.8, few=0.3, finetune_steps=20)


class Runs(NamedTuple):
    """Runs side by side, each a row: states, the table's pairs in its own order, and how many of
    these it trains on. One compiled step serves them all."""

    state: step.TrainState
    order: jax.Array  # [runs, p * p]
    count: jax.Array  # [runs]


def table(p: int) -> dict[str, np.ndarray]:
    """All pairs: tokens a b =, of which the last predicts c."""
    a, b = np.divmod(np.arange(p * p), p)
    tokens = np.stack([a, b, np.full(p * p, p)], axis=1).astype(np.int32)
    targets = np.zeros_like(tokens)
    targets[:, 2] = (a + b) % p
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, 2] = 1
    return {"tokens": tokens, "targets": targets, "weights": weights}


def make_model(c: Grokking) -> GPT:
    return GPT(presets.gpt2(
        num_layers=c.num_layers, d_model=c.d_model, num_heads=max(c.d_model // 32, 1),
        mlp_dim=4 * c.d_model, vocab_size=c.p + 1, max_length=3, dropout_rate=0.0,
        attention_dropout_rate=0.0, tie_embeddings=False))


def make_rounds(c: Grokking, train_step: Any, apply: Any):
    """`rounds(runs, key) -> (runs, metrics)`: `every` updates of all runs on rows that each draws
    from its own share, then the accuracy of each on its share and on the rest of the table."""
    pairs = jax.tree.map(jnp.asarray, table(c.p))

    def one(state, order, count, key):
        def update(state, key):
            chosen = order[jax.random.randint(key, (c.batch_size,), 0, count)]
            state, metrics = train_step(state, jax.tree.map(lambda x: x[chosen], pairs), None)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(update, state, jax.random.split(key, c.every))
        logits = apply({"params": state.params}, pairs["tokens"]).logits[:, 2]
        right = logits.argmax(-1) == pairs["targets"][:, 2]
        seen = jnp.zeros(c.p**2, bool).at[order].set(jnp.arange(c.p**2) < count)
        shares = [(right & which).sum() / which.sum() for which in (seen, ~seen)]
        size = jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(state.params)))
        return state, {"loss": losses.mean(), "train": shares[0], "test": shares[1],
                       "norm": size}

    def rounds(runs: Runs, key):
        keys = jax.random.split(key, runs.count.shape[0])
        state, metrics = jax.vmap(one)(*runs, keys)
        return runs._replace(state=state), metrics

    return jax.jit(rounds, donate_argnums=0)


def train(c: Grokking, rounds, runs: Runs, num_steps: int, title: str) -> tuple[Runs, dict]:
    """(runs, {"step" [looks], "train", "test", ... [runs, looks]})."""
    looks = []
    for i in track(range(num_steps // c.every), title):
        runs, metrics = rounds(runs, jax.random.key(10_000 + c.seed + i))
        looks.append(jax.device_get(metrics))
    series = {name: np.stack([look[name] for look in looks], axis=1) for name in looks[0]}
    return runs, {"step": c.every * np.arange(1, len(looks) + 1), **series}


def optimizer(c: Grokking, num_steps: int, end: float):
    # In the sweep the rate falls to a tenth: at a constant one Adam throws a finished model out of
    # its minimum now and then (Thilak et al. 2022, "The Slingshot Mechanism").
    schedule = optimizers.make_schedule("cosine", c.rate, num_steps, min(10, num_steps - 1), end)
    return optimizers.make_optimizer(schedule, weight_decay=c.weight_decay, b2=0.98, clip_norm=None)


def start(c: Grokking, model: GPT, made: Any, mask: Any, params: dict, counts: list[int],
          orders: list[np.ndarray]) -> Runs:
    state = jax.jit(jax.vmap(lambda p: step.init_state(p, made, mask)))(params)
    return Runs(state, jnp.asarray(np.stack(orders)), jnp.asarray(counts))


def sweep(c: Grokking, model: GPT) -> tuple[dict, dict, list[np.ndarray]]:
    """All shares and seeds at once: (parameters and numbers by run, shares slowest; orders)."""
    made = optimizer(c, c.num_steps, c.rate / 10)
    train_step = step.make_train_step(functools.partial(causal_lm.loss, model.apply), made)
    seeds = [c.seed + k for k in range(c.seeds)] * len(c.shares)
    shares = np.repeat(c.shares, c.seeds)
    orders = [np.random.default_rng(seed).permutation(c.p**2) for seed in seeds]
    params = jax.jit(jax.vmap(lambda seed: init_params(model, jax.random.key(seed))))(
        jnp.array(seeds))
    runs = start(c, model, made, None, params, [int(s * c.p**2) for s in shares], orders)
    runs, series = train(c, make_rounds(c, train_step, model.apply), runs, c.num_steps,
                         f"{len(seeds)} runs of {c.num_steps} steps")
    return jax.device_get(runs.state.params), series, orders


def finetune(c: Grokking, model: GPT, params: dict, orders: list[np.ndarray], recipe: str) -> dict:
    """The grokked models, trained on by `recipe` on the first few of their own pairs."""
    params = jax.vmap(lambda p: peft.add_and_mask(p, recipe, jax.random.key(c.seed))[0])(params)
    mask = select.trainable_mask(params, recipe)
    made = optimizer(c, c.finetune_steps, c.rate)
    train_step = step.make_train_step(
        functools.partial(causal_lm.loss, model.apply), made, mask)
    runs = start(c, model, made, mask, params, [int(c.few * c.p**2)] * c.seeds, orders)
    series = train(c, make_rounds(c, train_step, model.apply), runs, c.finetune_steps,
                   f"{recipe} on {c.few:.0%} of the table")[1]
    print(f"  unseen pairs, every seed: {np.round(100 * series['test'][:, -1], 1)} %", flush=True)
    return series | {"trained": tree.count(tree.partition(params, mask)[0]) / tree.count(params)}


def first_above(steps: np.ndarray, accuracy: np.ndarray, least: float) -> list[float]:
    """The first look of each run at which it is that good; NaN if never."""
    reached = accuracy >= least
    return [float(steps[row.argmax()]) if row.any() else float("nan") for row in reached]


def critical_share(shares: tuple[float, ...], accuracy: np.ndarray) -> float:
    """Where the mean of the last accuracies crosses one half, between two shares of the sweep."""
    if accuracy[0] >= 0.5 or accuracy[-1] < 0.5:
        return float("nan")
    i = int((accuracy >= 0.5).argmax())
    part = (0.5 - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return shares[i - 1] + part * (shares[i] - shares[i - 1])


def run(c: Grokking) -> dict:
    if c.grokked not in c.shares or c.few >= c.grokked:
        raise ValueError(f"grokked is {c.grokked}; it must be one of the shares {c.shares}, and "
                         f"greater than few, {c.few}")
    model = make_model(c)
    params, series, orders = sweep(c, model)
    steps = series["step"]
    by_share = {share: slice(i * c.seeds, (i + 1) * c.seeds) for i, share in enumerate(c.shares)}
    rows = [{"share": share, "train": series["train"][runs, -1], "test": series["test"][runs, -1],
             "best_test": series["test"][runs].max(1),
             "steps_to_train": first_above(steps, series["train"][runs], 0.99),
             "steps_to_test": first_above(steps, series["test"][runs], 0.99)}
            for share, runs in by_share.items()]
    for row in rows:
        print(f"{row['share']:.0%} of the table: test accuracy {100 * row['test'].mean():.1f} %; "
              f"99 % of train after {row['steps_to_train']} steps, of test {row['steps_to_test']}",
              flush=True)
    critical = critical_share(c.shares, np.array([row["test"].mean() for row in rows]))
    chosen = by_share[c.grokked]
    ours, order = jax.tree.map(lambda x: x[chosen], params), orders[chosen]
    tuned = {recipe: finetune(c, model, ours, order, recipe) for recipe in c.recipes}
    picture(c, series, chosen, rows, critical, tuned)
    return {
        "sweep": rows, "critical_share": critical,
        "curves": {name: series[name][chosen] for name in ("train", "test")} | {"step": steps},
        "finetuning": {recipe: {"trained": found["trained"], "step": found["step"],
                                "train": found["train"], "test": found["test"]}
                       for recipe, found in tuned.items()},
    }


def band(x, values, **style) -> Line:
    """Mean and deviation over runs, in percent."""
    return Line(x, 100 * values.mean(0), 100 * values.std(0), **style)


def picture(c: Grokking, series, chosen, rows, critical, tuned) -> None:
    x = series["step"]
    last = np.array([row["test"] for row in rows])
    before = series["test"][chosen, -1:]
    after = {f"{recipe} ({100 * found['trained']:.3g} % trains)": band(
        np.concatenate([[0], found["step"]]),
        np.concatenate([before, found["test"]], axis=1),
        dashed=recipe == c.recipes[-1])  # else it would hide one that does as well
        for recipe, found in tuned.items()}
    wide = {"ylabel": "accuracy (%)", "ylim": (-3, 103)}
    show(c.out / "grokking.png", {
        f"Grokking: {c.grokked:.0%} of the table": Lines({
            "pairs it trains on": band(x, series["train"][chosen]),
            "unseen pairs": band(x, series["test"][chosen])}, xscale="log", **wide),
        f"The critical share: after {c.num_steps:,} steps": Lines({
            "unseen pairs": Line([100 * s for s in c.shares], 100 * last.mean(1),
                                 100 * last.std(1), points=True, color="C1")},
            xlabel="share of the table that is trained on (%)",
            mark=None if np.isnan(critical) else (100 * critical, f"{100 * critical:.0f} %"),
            **wide),
        f"Ungrokking: trained on, on {c.few:.0%} of it": Lines(
            after, xlabel="step of fine-tuning", **(wide | {"ylabel": "unseen pairs (%)"})),
    }, title=f"Addition modulo {c.p}, mean and deviation of {c.seeds} seeds")
