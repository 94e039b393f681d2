"""Positions: fixed, learned and none, on the same text, also beyond the trained length.

    python experiments/study.py positions

Claims: attention alone sees a set of words, so a model has to be told their places; fixed sinusoids
(Vaswani et al. 2017, section 3.5) do as well as a learned table, and "may allow the model to
extrapolate to sequence lengths longer than the ones encountered during training".

GPT and BERT of equal size read the characters of Python's documentation, 64 at a time, and are
asked about 128. "None" is a table of zeros that a mask keeps from training. A causal mask alone
says something of places (Haviv et al. 2022): GPT without positions is the test of that.

One core of an AMD EPYC: 7 minutes, nats a character. GPT: learned 1.57, fixed 1.71, none 2.17
within the trained length; beyond it 3.70, 3.59 and 2.38: what has no positions loses least, and
neither table goes on to where it was not trained. BERT: fixed 2.05 within and 3.27 beyond; learned
2.93, no better than none (2.93) after 1,500 steps: under sinusoids the neighbour of every place is
one linear map away, and a table has to be learnt first.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from studies import small
from studies.pictures import Image, Line, Lines, show
from transformer_jax.finetuning import select
from transformer_jax.models import Model, build_model, init_params, presets
from transformer_jax.nn.positions import sinusoidal_positions
from transformer_jax.objectives import causal_lm, mlm_nsp
from transformer_jax.objectives.cross_entropy import cross_entropy
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.report import plots

KINDS = ("fixed", "learned", "none")
HIDDEN = 0.3  # of the characters that BERT reads


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Attributes:
        length: characters that are trained on; `beyond` times as many are asked about.
        test_rows: rows of that length, of the held-out text.
    """

    out: Path = Path("runs/positions")
    num_layers: int = 2
    d_model: int = 64
    length: int = 64
    beyond: int = 2
    batch_size: int = 32
    num_steps: int = 1500
    peak_lr: float = 3e-3
    kinds: tuple[str, ...] = KINDS
    test_rows: int = 256
    seed: int = 0


def config() -> Positions:
    return Positions()


def large() -> Positions:
    return Positions(num_layers=6, d_model=512, length=512, batch_size=64, num_steps=10_000)


def smallest() -> Positions:
    return Positions(num_layers=1, d_model=16, length=8, batch_size=4, num_steps=4, test_rows=4,
                     kinds=("learned", "none"))


def make_model(c: Positions, family: str, kind: str, vocab_size: int) -> Model:
    shape = {"num_layers": c.num_layers, "d_model": c.d_model, "num_heads": 4,
             "mlp_dim": 4 * c.d_model, "vocab_size": vocab_size, "max_length": c.beyond * c.length,
             "dropout_rate": 0.0, "attention_dropout_rate": 0.0, "init_std": 0.05,
             "positions": "sinusoidal" if kind == "fixed" else "learned"}
    if family == "GPT":
        return build_model(presets.gpt2(**shape))
    return build_model(presets.bert_tiny(**shape, norm_first=True, num_segments=0))


def rows_of(family: str, tokens: np.ndarray, rng: np.random.Generator, mask_id: int
            ) -> dict[str, np.ndarray]:
    """A batch of windows [B, T + 1] as the family trains on them."""
    if family == "GPT":
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
                "weights": np.ones(tokens[:, 1:].shape, np.float32)}
    length = tokens.shape[1] - 1
    rows = [mlm_nsp.mask_tokens(
        row[:-1], rng, maskable=np.ones(length, bool), vocab_size=mask_id, mask_id=mask_id,
        max_predictions=round(HIDDEN * length), mask_rate=HIDDEN)
        for row in tokens]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def by_place(model: Model, family: str, params, batches, length: int, groups: int) -> np.ndarray:
    """Mean loss of the predictions in each of `groups` equal parts of the row, in nats."""

    @jax.jit
    def losses(batch):
        if family == "GPT":
            logits = model.apply({"params": params}, batch["tokens"]).logits
            at = jnp.broadcast_to(jnp.arange(length), batch["tokens"].shape)
            return cross_entropy(logits, batch["targets"]), at
        out = model.apply({"params": params}, batch["tokens"],
                          masked_positions=batch["masked_positions"])
        return cross_entropy(out.mlm_logits, batch["masked_targets"]), batch["masked_positions"]

    sums, counts = np.zeros(groups), np.zeros(groups)
    for batch in batches:
        found, at = (np.asarray(x) for x in losses(batch))
        group = (at * groups // length).ravel()
        sums += np.bincount(group, found.ravel(), groups)
        counts += np.bincount(group, minlength=groups)
    return sums / np.maximum(counts, 1)


def run(c: Positions) -> dict:
    corpus = small.read(PretrainConfig(
        model=presets.gpt2(), objective="causal_lm", tokenizer="chars", max_length=c.length,
        batch_size=c.batch_size, num_steps=c.num_steps, out=c.out))
    # One more id than there are characters, for [MASK].
    mask_id, vocab_size = corpus.tokenizer.vocab_size, corpus.tokenizer.vocab_size + 1
    train, test = (np.asarray(split.rows.corpus.tokens) for split in (corpus.train,
                                                                      corpus.held_out))
    rng = np.random.default_rng(c.seed)
    whole, groups = c.beyond * c.length, 8 * c.beyond

    def batches(family: str, tokens, length: int) -> Iterator[dict]:
        for window in small.windows(tokens, length + 1, c.batch_size, c.seed):
            yield rows_of(family, window, rng, mask_id)

    found, tables = {}, {}
    for family in ("GPT", "BERT"):
        endless = batches(family, test, whole)
        tests = [next(endless) for _ in range(-(-c.test_rows // c.batch_size))]
        objective = causal_lm.loss if family == "GPT" else mlm_nsp.loss
        for kind in c.kinds:
            model = make_model(c, family, kind, vocab_size)
            params, mask = init_params(model, jax.random.key(c.seed)), None
            if kind == "none":
                params["position_embed"]["embedding"] *= 0
                mask = select.trainable_mask(params, "regex:^(?!position_embed)")
            trained = small.train(
                f"{family}, {kind}", functools.partial(objective, model.apply), params,
                batches(family, train, c.length), c.num_steps,
                OptimizerConfig(peak_lr=c.peak_lr, warmup_steps=c.num_steps // 10), mask=mask, seed=c.seed)
            loss = by_place(model, family, trained.params, tests, whole, groups)
            half = groups // c.beyond
            found[f"{family}, {kind}"] = {
                "by_place": loss, "within": loss[:half].mean(), "beyond": loss[half:].mean(),
                "training": trained.history[-1]["loss"]}
            print(f"  within the trained length {loss[:half].mean():.3f}, beyond "
                  f"{loss[half:].mean():.3f}", flush=True)
            if kind == "learned":
                tables[family] = np.asarray(trained.params["position_embed"]["embedding"])
    picture(c, found, tables, groups, whole)
    return found


def similarity(table: np.ndarray) -> np.ndarray:
    """Cosine of every position with every other."""
    rows = table / np.linalg.norm(table, axis=1, keepdims=True)
    return rows @ rows.T


def picture(c: Positions, found, tables, groups: int, whole: int) -> None:
    x = (np.arange(groups) + 0.5) * whole / groups
    fixed = sinusoidal_positions(whole, c.d_model)
    panels = {f"{family}: loss by place": Lines(
        {kind: Line(x, found[f"{family}, {kind}"]["by_place"], points=True) for kind in c.kinds},
        xlabel="place in the row", ylabel="loss (nats a character)",
        mark=(c.length, "trained length")) for family in ("GPT", "BERT")}
    axis = {"xlabel": "position", "ylabel": "position"}
    panels |= {"Similarity of fixed positions": Image(similarity(fixed), **axis)}
    panels |= {f"Similarity of {name}'s learned ones": Image(
        similarity(table[: c.length]), **axis) for name, table in tables.items()}
    show(c.out / "positions.png", panels,
         title=f"Trained on {c.length} characters a row, asked about {whole}")
    plots.positions(c.out / "tables.png", {
        "fixed (sinusoidal)": fixed, **{f"learned by {n}": t for n, t in tables.items()}})
