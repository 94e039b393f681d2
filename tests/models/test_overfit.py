"""Models overfit one batch with Adam, and every parameter is updated."""

import jax
import numpy as np
import optax
import pytest
from small_models import BERT, GPT2, build, random_params, random_tokens

from transformer_jax.objectives import causal_lm, classification, cross_entropy, mlm_nsp

TOKENS = random_tokens(4, 17, seed=5)
MASKED = np.array([[2, 5], [1, 9], [3, 4], [7, 12]], np.int32)
LABELS = np.array([0, 1, 1, 0], np.int32)


def fit(config, loss_fn, batch, num_classes=0, steps=60):
    """Returns the losses of `steps` steps, and the paths of parameters that did not change."""
    model, initial = build(config.replace(num_layers=1), num_classes)
    initial = random_params(initial, std=0.02)

    def mean_loss(params):
        return cross_entropy.mean_loss(*loss_fn(model.apply, params, batch)[:2])

    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(mean_loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return params, values

    final, losses = run(initial)
    is_unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), initial, final)
    unchanged = [jax.tree_util.keystr(path)
                 for path, same in jax.tree.leaves_with_path(is_unchanged) if same]
    return np.asarray(losses), unchanged


def test_gpt_overfits_a_batch():
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:],
             "weights": np.ones((4, 16), np.float32)}
    losses, unchanged = fit(GPT2, causal_lm.loss, batch)
    np.testing.assert_allclose(losses[0], np.log(GPT2.vocab_size), rtol=0.02)  # uniform predictions
    assert losses[-1] < 0.1
    assert unchanged == []


def test_bert_overfits_a_batch():
    tokens = TOKENS[:, :16].copy()
    targets = np.take_along_axis(tokens, MASKED, axis=1)
    np.put_along_axis(tokens, MASKED, 0, axis=1)
    batch = {
        "tokens": tokens,
        "segment_ids": np.tile(np.arange(16) >= 8, (4, 1)).astype(np.int32),
        "masked_positions": MASKED,
        "masked_targets": targets,
        "masked_weights": np.ones((4, 2), np.float32),
        "nsp_labels": LABELS,
        "nsp_weights": np.ones(4, np.float32),
    }
    losses, unchanged = fit(BERT, mlm_nsp.loss, batch)
    np.testing.assert_allclose(losses[0], np.log(BERT.vocab_size) + np.log(2), rtol=0.02)
    assert losses[-1] < 0.1
    assert unchanged == []


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt", "bert"])
def test_classifiers_overfit_a_batch(config):
    batch = {"tokens": TOKENS, "labels": LABELS, "weights": np.ones(4, np.float32)}
    losses, unchanged = fit(config, classification.classification_loss,
                        batch, num_classes=2, steps=30)
    assert losses[-1] < 0.05
    assert unchanged == []
