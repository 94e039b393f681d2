import math

import numpy as np
import pytest

from transformer_jax import evaluate


def test_perplexity_is_exp_of_the_loss():
    assert evaluate.perplexity(math.log(50)) == pytest.approx(50)
    assert evaluate.perplexity(1e4) == math.inf


def test_metrics_by_hand():
    # Two classes: 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    table = evaluate.confusion(labels, predictions, 2)
    np.testing.assert_array_equal(table, [[4, 2], [1, 3]])
    assert evaluate.accuracy(table) == pytest.approx(0.7)
    positive, negative = 2 * 3 / (2 * 3 + 2 + 1), 2 * 4 / (2 * 4 + 1 + 2)
    assert evaluate.macro_f1(table) == pytest.approx((positive + negative) / 2)
    assert evaluate.matthews(table) == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_edges():
    assert math.isnan(evaluate.accuracy(np.zeros((2, 2), int)))
    assert evaluate.matthews(np.array([[5, 0], [5, 0]])) == 0  # one class predicted: undefined
    assert evaluate.matthews(np.diag([3, 4, 5])) == pytest.approx(1)
