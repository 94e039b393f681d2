"""Plain Adam learns one batch by heart: every part that must learn is in the gradient."""

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
    """Losses of `steps` steps, and the leaves that never moved."""
    model, start = build(config.replace(num_layers=1), num_classes)
    start = random_params(start, std=0.02)

    def total(params):
        return cross_entropy.mean(*loss_fn(model.apply, params, batch)[:2])

    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(total)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return params, values

    end, values = run(start)
    still = jax.tree.map(lambda a, b: bool((a == b).all()), start, end)
    paths = [jax.tree_util.keystr(path) for path, same in jax.tree.leaves_with_path(still) if same]
    return np.asarray(values), paths


def test_gpt_learns_a_batch_by_heart():
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:],
             "weights": np.ones((4, 16), np.float32)}
    values, still = fit(GPT2, causal_lm.loss, batch)
    np.testing.assert_allclose(values[0], np.log(GPT2.vocab_size), rtol=0.02)  # knows nothing
    assert values[-1] < 0.1
    assert still == []


def test_bert_learns_a_batch_by_heart():
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
    values, still = fit(BERT, mlm_nsp.loss, batch)
    np.testing.assert_allclose(values[0], np.log(BERT.vocab_size) + np.log(2), rtol=0.02)
    assert values[-1] < 0.1
    assert still == []


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt", "bert"])
def test_classifiers_learn_a_batch_by_heart(config):
    batch = {"tokens": TOKENS, "labels": LABELS, "weights": np.ones(4, np.float32)}
    values, still = fit(config, classification.classification_loss,
                        batch, num_classes=2, steps=30)
    assert values[-1] < 0.05
    assert still == []
