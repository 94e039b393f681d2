"""Sums and weights are additive over any split of a batch, and rows of zeros contribute nothing."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, TRANSFORMER, build, random_tokens

from transformer_jax.data import packing
from transformer_jax.objectives import (
    causal_lm,
    classification,
    cross_entropy,
    mlm_nsp,
    question_answering,
    seq2seq,
)

B, T, P = 6, 9, 3
RNG = np.random.default_rng(0)
TOKENS = random_tokens(B, T + 1)
MASK = (np.arange(T) < np.array([9, 7, 4, 9, 2, 5])[:, None])
CAUSAL = {**packing.shift_tokens(TOKENS, np.pad(MASK, ((0, 0), (1, 0)), constant_values=True))}
MASKED = {
    "tokens": TOKENS[:, :T] * MASK,
    "segment_ids": (np.arange(T) > 3) * MASK.astype(np.int32),
    "padding_mask": MASK,
    "masked_positions": RNG.integers(0, 2, (B, P)).astype(np.int32),
    "masked_targets": random_tokens(B, P, seed=1),
    "masked_weights": (np.arange(P) < np.array([3, 1, 2, 0, 1, 3])[:, None]).astype(np.float32),
    "nsp_labels": np.array([0, 1, 1, 0, 1, 0], np.int32),
    "nsp_weights": np.ones(B, np.float32),
}
CLASSES = {
    "tokens": TOKENS[:, :T] * MASK, "segment_ids": np.zeros((B, T), np.int32),
    "padding_mask": MASK, "labels": np.array([0, 2, 1, 1, 0, 2], np.int32),
    "weights": np.ones(B, np.float32),
}
SEQ2SEQ = {
    "tokens": TOKENS[:, :T] * MASK, "padding_mask": MASK, "decoder_tokens": TOKENS[:, :T],
    "targets": TOKENS[:, 1:], "weights": MASK[::-1].astype(np.float32),
}
REGRESSION = CLASSES | {"labels": np.linspace(0, 1, B, dtype=np.float32)}
ORDERS = CLASSES | {name: np.stack([CLASSES[name], CLASSES[name][::-1]], axis=1)
                    for name in ("tokens", "segment_ids", "padding_mask")}
CHOICES = ORDERS | {"labels": np.array([0, 1, 1, 0, 0, 1], np.int32),
                    "choices": np.arange(2) < np.array([2, 2, 2, 1, 2, 2])[:, None]}
TAGS = {"tokens": TOKENS[:, :T] * MASK, "padding_mask": MASK, "labels": TOKENS[:, 1:] % 3,
        "weights": (MASK & (TOKENS[:, :T] % 2 > 0)).astype(np.float32)}
SPANS = CLASSES | {"context_mask": MASK & (np.arange(T) > 0),
                   "no_answer_position": np.zeros(B, np.int32),
                   "start_positions": np.array([3, 0, 1, 2, 0, 1], np.int32),
                   "end_positions": np.array([8, 0, 3, 2, 0, 4], np.int32)}
with_lm = functools.partial(classification.classification_loss, aux_lm_loss_weight=0.5)
CASES = {
    "causal_lm": (GPT2.replace(num_layers=1), 0, causal_lm.loss, CAUSAL),
    "mlm_nsp": (BERT.replace(num_layers=1), 0, mlm_nsp.loss, MASKED),
    "seq2seq": (TRANSFORMER.replace(num_layers=1), 0, seq2seq.loss, SEQ2SEQ),
    "classification": (GPT2.replace(num_layers=1), 3, classification.classification_loss, CLASSES),
    "regression": (GPT2.replace(num_layers=1), 1, classification.regression_loss, REGRESSION),
    "multiple_choice": (BERT.replace(num_layers=1), 1, classification.classification_loss,
                        CHOICES),
    "both_orders_lm": (GPT2.replace(num_layers=1), 3, with_lm, ORDERS),
    "token_classification": (BART.replace(num_layers=1), 3,
                             classification.token_classification_loss, TAGS),
    "question_answering": (BERT.replace(num_layers=1), 2, question_answering.loss, SPANS),
}


def padded(batch, rows: slice):
    """Some rows of a batch, padded with rows of zeros like the last evaluation batch."""
    part = {name: np.zeros_like(values) for name, values in batch.items()}
    for name, values in batch.items():
        part[name][: len(values[rows])] = values[rows]
    return part


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_of_split_and_padded_batches_add_up(name):
    config, num_classes, loss_fn, batch = CASES[name]
    model, params = build(config, num_classes)

    @jax.jit
    def value_and_grad(params, batch):
        def total(params):
            sums, weights, metrics = loss_fn(model.apply, params, batch)
            return sum(jax.tree.leaves(sums)), (sums, weights, metrics)

        (_, totals), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return totals, gradient

    whole = value_and_grad(params, batch)
    parts = [value_and_grad(params, padded(batch, rows))
             for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(0, 0))]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[1]))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(added)):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * scale)
    # A batch of zero rows only: every sum, weight and gradient is exactly 0.
    for leaf in jax.tree.leaves(parts[-1]):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    assert cross_entropy.mean_loss(*parts[-1][0][:2]) == 0
    # Weights are counts, and metrics are fractions of weights.
    sums, weights, metrics = whole[0]
    expected = {"causal_lm": MASK.sum(), "mlm_nsp": {"mlm": 10, "nsp": 6}, "classification": 6,
                "seq2seq": MASK.sum(), "regression": 6, "multiple_choice": 6,
                "question_answering": 6,
                "both_orders_lm": {"task": 6, "lm": 2 * MASK[:, 1:].sum()},
                "token_classification": TAGS["weights"].sum()}[name]
    assert jax.tree.map(float, weights) == jax.tree.map(float, expected)
    for metric, (total, weight) in metrics.items():
        assert total >= 0 and (total <= weight or metric in ("nll", "lm_nats", "squared_error"))
    assert jax.tree.structure(sums) == jax.tree.structure(weights)


def test_a_batch_without_nsp_labels_has_only_the_mlm_term():
    scores = RNG.normal(size=(B, P, 70)).astype(np.float32)
    out = SimpleNamespace(mlm_logits=scores, nsp_logits=scores[:, 0, :2])
    both = mlm_nsp.loss(lambda *args, **options: out, {}, MASKED)
    mlm_batch = {name: values for name, values in MASKED.items() if not name.startswith("nsp")}
    alone = mlm_nsp.loss(lambda *args, **options: out, {}, mlm_batch)
    for two, one in zip(both[:2], alone[:2]):
        assert set(two) == {"mlm", "nsp"}
        assert one == {"mlm": two["mlm"]}
    assert set(both[2]) == {"mlm_accuracy", "nsp_accuracy"}
    assert set(alone[2]) == {"mlm_accuracy"}


@pytest.mark.parametrize("name", ["causal_lm", "mlm_nsp"])
def test_losses_pass_their_rng_to_the_model(name):
    loss_fn, batch = CASES[name][2:]
    received = {}

    def apply(variables, tokens, *, deterministic, rngs, **options):
        received.update(deterministic=deterministic, rngs=rngs)
        raise StopIteration

    key = jax.random.key(3)
    for rng, expected in ((None, (True, None)), (key, (False, {"dropout": key}))):
        with pytest.raises(StopIteration):
            loss_fn(apply, {}, batch, rng)
        assert (received["deterministic"], received["rngs"]) == expected
