"""Contrastive loss of sentence embeddings."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.models import BERT
from transformer_jax.objectives import contrastive


@pytest.mark.slow
def test_loss_of_known_embeddings():
    """The second texts of rows with weight 0 are not negatives."""
    embeddings = np.array([[[1, 0], [1, 0]], [[0, 2], [3, 3]], [[1, 0], [0, 1]]], np.float32)

    def apply(variables, tokens, *, method, padding_mask, **options):
        assert method == "encode" and hasattr(BERT, method)
        return SimpleNamespace(hidden=jnp.asarray(embeddings.reshape(6, 1, 2)))

    batch = {"tokens": np.zeros((3, 2, 1), np.int32), "padding_mask": np.ones((3, 2, 1), bool),
             "weights": np.array([1, 1, 0], np.float32)}
    total, weight, metrics = contrastive.loss(apply, {}, batch)
    cosines = np.array([[1, 0.5**0.5], [0, 0.5**0.5]])
    log_probs = 20 * cosines - np.log(np.exp(20 * cosines).sum(1, keepdims=True))
    assert float(total) == pytest.approx(-np.trace(log_probs), rel=1e-3) and weight == 2
    assert metrics["accuracy"] == (2, 2)
