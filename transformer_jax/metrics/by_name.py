"""Metrics by name: each name selects a main metric and the metrics that are reported with it."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from transformer_jax.errors import did_you_mean
from transformer_jax.metrics.classification import (
    accuracy,
    confusion_matrix,
    entity_f1,
    f1,
    macro_f1,
    matthews,
)
from transformer_jax.metrics.statistics import regression_scores
from transformer_jax.metrics.text import squad_scores

CLASSIFICATION_METRICS: dict[str, dict[str, Callable]] = {
    "accuracy": {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews},
    "matthews": {"matthews": matthews, "accuracy": accuracy, "macro_f1": macro_f1},
    "macro_f1": {"macro_f1": macro_f1, "accuracy": accuracy, "matthews": matthews},
    "f1": {"f1": f1, "accuracy": accuracy, "matthews": matthews},
}
"""Name of a metric -> functions of a confusion matrix: the metric, then those reported with it."""


def classification_scores(metric: str, confusion: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """Computes a classification metric, and the metrics that are reported with it.

    Args:
        metric: a key of `CLASSIFICATION_METRICS`.
        confusion: a `confusion_matrix`.

    Raises:
        ValueError: unknown metric, or "f1" with a single class.
    """
    _check_metric(metric, CLASSIFICATION_METRICS)
    if metric == "f1" and len(confusion) < 2:
        raise ValueError(f"f1 is computed for class 1, but the number of classes is "
                         f"{len(confusion)}; use accuracy")
    return {name: fn(confusion) for name, fn in CLASSIFICATION_METRICS[metric].items()}


OTHER_METRICS: dict[str, Callable[[Sequence, Sequence], dict[str, float]]] = {
    "pearson_spearman": regression_scores,
    "squad": squad_scores,
    "entity_f1": lambda predictions, labels: entity_f1(labels, predictions),
}
"""Name of a metric -> `fn(predictions, labels)`, for metrics without a confusion matrix."""


def evaluate_predictions(
    metric: str, predictions: Sequence, labels: Sequence, num_classes: int | None = None
) -> dict[str, float]:
    """Computes a metric by its name, and the metrics that are reported with it.

    Args:
        metric: name of the metric, which determines the type of predictions and labels:

            - a key of `CLASSIFICATION_METRICS`: class ids;
            - "pearson_spearman": scores;
            - "squad": predictions are answers, and labels are lists of gold answers;
            - "entity_f1": lists of BIO tags, one list per text.
        predictions: the prediction for each example.
        labels: the label of each example.
        num_classes: number of classes. By default, the highest class id that occurs plus 1, but at
            least 2.

    Returns:
        Name -> value; the first entry is the main metric.

    Raises:
        ValueError: unknown metric, or the predictions do not match the labels.

    Example:
        >>> evaluate_predictions("f1", [1, 1, 0, 0], [1, 0, 0, 0])["accuracy"]
        0.75
    """
    _check_metric(metric, [*CLASSIFICATION_METRICS, *OTHER_METRICS])
    if metric in OTHER_METRICS:
        return OTHER_METRICS[metric](predictions, labels)
    if num_classes is None:
        num_classes = 1 + max(int(np.max(x, initial=1)) for x in (predictions, labels))
    return classification_scores(metric, confusion_matrix(labels, predictions, num_classes))


def _check_metric(metric: str, known: Iterable[str]) -> None:
    if metric not in known:
        raise ValueError(f"unknown metric {metric!r}; {did_you_mean(metric, known, show_all=True)}")
