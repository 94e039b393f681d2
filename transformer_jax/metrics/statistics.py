"""Correlations of predicted scores, and the mean and standard deviation over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from transformer_jax.metrics.classification import check_same_length


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Pearson correlation coefficient cov(a, b) / (std(a) std(b)); nan if an array is constant.

    Example:
        >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
        1.0
    """
    return _correlation("pearsonr", a, b)


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman rank correlation: `pearson` of the ranks; equal values have their mean rank."""
    return _correlation("spearmanr", a, b)


def _correlation(name: str, a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    from scipy import stats  # takes about a second

    check_same_length(labels=b, predictions=a)
    # Constant arrays are detected by their range: rounding errors can give them a variance.
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(getattr(stats, name)(*(np.asarray(x, np.float64) for x in (a, b))).statistic)


def regression_scores(
    predictions: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"]
) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error of predicted scores.

    Returns:
        "pearson_spearman", the mean of the two correlations, which GLUE reports for STS-B;
        "pearson"; "spearman"; and "mse", the mean squared error.

    Raises:
        ValueError: predictions and labels differ in number.
    """
    scores = {"pearson": pearson(predictions, labels), "spearman": spearman(predictions, labels)}
    return {"pearson_spearman": sum(scores.values()) / 2, **scores,
            "mse": float(np.mean(np.square(np.asarray(predictions) - np.asarray(labels))))}


class MeanStd(NamedTuple):
    """Mean and standard deviation of one metric over `n` seeds.

    `std` is the sample standard deviation (divided by n - 1), nan for one seed.
    """

    mean: float
    std: float
    n: int


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation of a metric over seeds.

    Raises:
        ValueError: there are no values.

    Example:
        >>> mean_std([1.0, 2.0, 3.0])
        MeanStd(mean=2.0, std=1.0, n=3)
    """
    if not len(values):
        raise ValueError("there are 0 values; a mean needs at least 1")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return MeanStd(float(np.mean(values)), std, len(values))
