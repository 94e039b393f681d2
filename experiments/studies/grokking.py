"""Grokking: a model that has long known its examples by heart comes to understand them.

    python experiments/study.py grokking

Claims (Power et al. 2022, "Grokking"; Varma et al. 2023, "Explaining grokking through circuit
efficiency"): on modular addition the accuracy on unseen pairs rises to 100 % long after that on
the training pairs; below a critical share of the table it never does; and a model that has
grokked forgets the rule if it is trained on, on less than that share ("ungrokking"). What
fine-tuning leaves alone cannot be forgotten: masks that keep the rule are shown beside it.

TODO figures
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from transformer_jax import draw, presets
from transformer_jax.finetune import deltas, select
from transformer_jax.models import GPT, init_params
from transformer_jax.objectives import causal_lm
from transformer_jax.train import optim, step


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
    p: int = 53
    shares: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    seeds: int = 3
    num_steps: int = 8000
    every: int = 100
    batch_size: int = 512
    num_layers: int = 1
    d_model: int = 128
    rate: float = 1e-3
    weight_decay: float = 1.0
    grokked: float = 0.5
    few: float = 0.1
    recipes: tuple[str, ...] = ("full", "bitfit")
    finetune_steps: int = 3000
    seed: int = 0


def config() -> Grokking:
    return Grokking()


def large() -> Grokking:
    return Grokking(p=97, shares=(0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), seeds=8, num_layers=2,
                    num_steps=50_000, finetune_steps=20_000)


def smallest() -> Grokking:
    return Grokking(p=5, shares=(0.4, 0.8), seeds=2, num_steps=20, every=10, batch_size=8,
                    d_model=16, grokked=0.8, few=0.3, finetune_steps=20)


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
        share = lambda which: (right & which).sum() / which.sum()
        size = jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(state.params)))
        return state, {"loss": losses.mean(), "train": share(seen), "test": share(~seen),
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


def optimizer(c: Grokking):
    schedule = optim.make_schedule("constant", c.rate, 100, 10)
    return optim.make_optimizer(schedule, weight_decay=c.weight_decay, b2=0.98, clip_norm=None)


def start(c: Grokking, model: GPT, made: Any, mask: Any, params: dict, counts: list[int],
          orders: list[np.ndarray]) -> Runs:
    state = jax.jit(jax.vmap(lambda p: step.init_state(p, made, mask)))(params)
    return Runs(state, jnp.asarray(np.stack(orders)), jnp.asarray(counts))


def sweep(c: Grokking, model: GPT) -> tuple[dict, dict, list[np.ndarray]]:
    """All shares and seeds at once: (parameters and numbers by run, shares slowest; orders)."""
    made = optimizer(c)
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
    prepare = functools.partial(deltas.prepare, recipe=recipe)
    if recipe != "full":
        params, mask = jax.vmap(lambda p: prepare(p, rng=jax.random.key(c.seed))[0])(params), None
        mask = select.trainable_mask(params, recipe)
    else:
        mask = None
    made = optimizer(c)
    train_step = step.make_train_step(
        functools.partial(causal_lm.loss, model.apply), made, mask)
    runs = start(c, model, made, mask, params, [int(c.few * c.p**2)] * c.seeds, orders)
    return train(c, make_rounds(c, train_step, model.apply), runs, c.finetune_steps,
                 f"{recipe} on {c.few:.0%} of the table")[1]
