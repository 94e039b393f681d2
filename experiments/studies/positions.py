"""Position encodings: fixed, learned and none, within and beyond the training length.

    python experiments/study.py positions

Claims: attention is invariant to the order of its inputs, so a model needs position encodings;
fixed sinusoids (Vaswani et al. 2017, section 3.5) are as good as a learned table, and "may allow
the model to extrapolate to sequence lengths longer than the ones encountered during training".

GPT and BERT of equal size are trained on the characters of the documentation of Python, in rows of
64, and evaluated on rows of 128. "None" is a frozen table of zeros. GPT without encodings tests
whether the causal mask alone provides position information (Haviv et al. 2022).

Hardware and time: one core of an AMD EPYC, 7 minutes.

Result: the claims hold in part. Losses in nats per character. GPT within the training length:
learned 1.57, fixed 1.71, none 2.17; beyond it: 3.70, 3.59 and 2.38. The model without encodings
degrades least, and neither encoding extrapolates. BERT: fixed 2.05 within and 3.27 beyond; learned
2.93 after 1,500 steps, the same as none. With sinusoids, one linear map relates the encodings of
neighboring positions, whatever the position; a learned table starts without such a relation.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from studies import training
from studies.figures import Image, Line, Lines, save_panels
from transformer_jax.finetuning import select
from transformer_jax.models import Model, build_model, init_params, presets
from transformer_jax.nn.layers import sinusoidal_positions
from transformer_jax.objectives import causal_lm, mlm_nsp
from transformer_jax.objectives.cross_entropy import cross_entropy
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.report import plots

FAMILIES = ("GPT", "BERT")
ENCODINGS = ("fixed", "learned", "none")
MASK_RATE = 0.3  # fraction of the characters that BERT predicts
GROUPS_PER_LENGTH = 8  # position groups within the training length, for the loss by position


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Settings of the study.

    Attributes:
        out: folder for the figures and the results.
        num_layers: layers of the models.
        d_model: width of the models.
        length: characters per row in training.
        test_length_factor: length of a test row, in multiples of `length`.
        batch_size: rows per step.
        num_steps: training steps.
        peak_lr: peak learning rate.
        encodings: position encodings: "fixed", "learned" and "none".
        test_rows: number of held-out rows.
        seed: seed of the initialization and the data.
    """

    out: Path = Path("runs/positions")
    num_layers: int = 2
    d_model: int = 64
    length: int = 64
    test_length_factor: int = 2
    batch_size: int = 32
    num_steps: int = 1500
    peak_lr: float = 3e-3
    encodings: tuple[str, ...] = ENCODINGS
    test_rows: int = 256
    seed: int = 0

    @property
    def test_length(self) -> int:
        return self.test_length_factor * self.length

    @property
    def num_groups(self) -> int:
        return self.test_length_factor * GROUPS_PER_LENGTH


SIZES = {
    "default": Positions(),
    "large": Positions(num_layers=6, d_model=512, length=512, batch_size=64, num_steps=10_000),
    "smallest": Positions(
        num_layers=1, d_model=16, length=8, batch_size=4, num_steps=4, test_rows=4,
        encodings=("learned", "none")),
}


def make_model(config: Positions, family: str, encoding: str, vocab_size: int) -> Model:
    size = {"num_layers": config.num_layers, "d_model": config.d_model, "num_heads": 4,
            "mlp_dim": 4 * config.d_model, "vocab_size": vocab_size,
            "max_length": config.test_length, "dropout_rate": 0.0, "attention_dropout_rate": 0.0,
            "init_std": 0.05, "positions": "sinusoidal" if encoding == "fixed" else "learned"}
    if family == "GPT":
        return build_model(presets.gpt2(**size))
    return build_model(presets.bert_tiny(**size, norm_first=True, num_segments=0))


def make_batch(
    family: str, windows: np.ndarray, rng: np.random.Generator, mask_id: int
) -> dict[str, np.ndarray]:
    """Converts windows `[B, T + 1]` to a batch for the objective of a family."""
    if family == "GPT":
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:],
                "weights": np.ones(windows[:, 1:].shape, np.float32)}
    length = windows.shape[1] - 1
    rows = [mlm_nsp.mask_tokens(
        window[:-1], rng, maskable=np.ones(length, bool), vocab_size=mask_id, mask_id=mask_id,
        max_predictions=round(MASK_RATE * length), mask_rate=MASK_RATE)
        for window in windows]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def loss_by_position(
    model: Model, family: str, params: dict, batches: Iterable[dict], length: int, num_groups: int
) -> np.ndarray:
    """Returns the mean loss, in nats, for each of `num_groups` equal groups of consecutive
    positions.
    """

    @jax.jit
    def losses_and_positions(batch):
        if family == "GPT":
            logits = model.apply({"params": params}, batch["tokens"]).logits
            positions = jnp.broadcast_to(jnp.arange(length), batch["tokens"].shape)
            return cross_entropy(logits, batch["targets"]), positions
        output = model.apply({"params": params}, batch["tokens"],
                             masked_positions=batch["masked_positions"])
        losses = cross_entropy(output.mlm_logits, batch["masked_targets"])
        return losses, batch["masked_positions"]

    sums, counts = np.zeros(num_groups), np.zeros(num_groups)
    for batch in batches:
        losses, positions = (np.asarray(x) for x in losses_and_positions(batch))
        groups = (positions * num_groups // length).ravel()
        sums += np.bincount(groups, losses.ravel(), num_groups)
        counts += np.bincount(groups, minlength=num_groups)
    return sums / np.maximum(counts, 1)


def run(config: Positions) -> dict[str, Any]:
    corpus = training.load_characters(config.length, config.batch_size, config.num_steps)
    mask_id = corpus.tokenizer.vocab_size  # a character vocabulary has no [MASK]
    train, test = (np.asarray(part.rows.corpus.tokens)
                   for part in (corpus.train, corpus.held_out))
    rng = np.random.default_rng(config.seed)

    def batches(family: str, tokens: np.ndarray, length: int) -> Iterator[dict]:
        for windows in training.random_windows(
                tokens, length + 1, config.batch_size, config.seed):
            yield make_batch(family, windows, rng, mask_id)

    metrics, tables = {}, {}
    for family in FAMILIES:
        test_batches = batches(family, test, config.test_length)
        test_batches = [next(test_batches)
                        for _ in range(-(-config.test_rows // config.batch_size))]
        for encoding in config.encodings:
            name = f"{family}, {encoding}"
            model = make_model(config, family, encoding, mask_id + 1)
            result = train_encoding(
                config, name, family, model, batches(family, train, config.length))
            losses = loss_by_position(model, family, result.params, test_batches,
                                      config.test_length, config.num_groups)
            within, beyond = losses[:GROUPS_PER_LENGTH], losses[GROUPS_PER_LENGTH:]
            metrics[name] = {
                "loss_by_position": losses, "within": within.mean(), "beyond": beyond.mean(),
                "training": result.history[-1]["loss"]}
            print(f"  within the trained length {within.mean():.3f}, beyond it "
                  f"{beyond.mean():.3f}", flush=True)
            if encoding == "learned":
                tables[family] = np.asarray(result.params["position_embed"]["embedding"])
    save_figures(config, metrics, tables)
    return metrics


def train_encoding(
    config: Positions, name: str, family: str, model: Model, batches: Iterator[dict]
) -> training.TrainingResult:
    """Trains a model; for "none", the position table is zero and frozen."""
    params, mask = init_params(model, jax.random.key(config.seed)), None
    if name.endswith("none"):
        params["position_embed"]["embedding"] *= 0
        mask = select.trainable_mask(params, "regex:^(?!position_embed)")
    loss = causal_lm.loss if family == "GPT" else mlm_nsp.loss
    return training.train(
        name, functools.partial(loss, model.apply), params, batches, config.num_steps,
        OptimizerConfig(peak_lr=config.peak_lr, warmup_steps=config.num_steps // 10),
        mask=mask, seed=config.seed)


def cosine_similarity(table: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of each pair of positions, [n, n]."""
    rows = table / np.linalg.norm(table, axis=1, keepdims=True)
    return rows @ rows.T


def save_figures(
    config: Positions, metrics: dict[str, dict], tables: dict[str, np.ndarray]
) -> None:
    centers = (np.arange(config.num_groups) + 0.5) * config.test_length / config.num_groups
    fixed = sinusoidal_positions(config.test_length, config.d_model)
    axis = {"xlabel": "position", "ylabel": "position"}
    panels: dict[str, Any] = {
        f"{family}: loss by position": Lines(
            {encoding: Line(centers, metrics[f"{family}, {encoding}"]["loss_by_position"],
                            markers=True) for encoding in config.encodings},
            xlabel="position", ylabel="loss (nats per character)",
            vertical=(config.length, "trained length")) for family in FAMILIES}
    panels["Similarity of fixed positions"] = Image(cosine_similarity(fixed), **axis)
    for family, table in tables.items():
        panels[f"Similarity of {family}'s learned positions"] = Image(
            cosine_similarity(table[: config.length]), **axis)
    save_panels(config.out / "positions.png", panels,
                title=f"Trained on rows of {config.length} characters, evaluated on rows of "
                      f"{config.test_length}")
    plots.positions(config.out / "tables.png", {
        "fixed (sinusoidal)": fixed,
        **{f"learned by {family}": table for family, table in tables.items()}})
