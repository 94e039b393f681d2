"""Metrics of predicted classes and entities, and the calibration of class probabilities.

Shape suffixes: n examples, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def check_same_length(labels: Sequence, predictions: Sequence) -> None:
    """Raises ValueError if labels and predictions differ in number."""
    if len(labels) != len(predictions):
        raise ValueError(f"there are {len(predictions)} predictions for {len(labels)} labels; give "
                         "one prediction for each label")


def confusion_matrix(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Number of examples for each true class (rows) and predicted class (columns).

    Raises:
        ValueError: labels and predictions differ in number, or a class is out of range.

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    check_same_length(labels, predictions)
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if len(classes) and not 0 <= np.min(classes) <= np.max(classes) < num_classes:
            raise ValueError(f"{name} range from {np.min(classes)} to {np.max(classes)}; they must "
                             f"be from 0 to {num_classes - 1}. Leave out examples without a label")
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (np.asarray(labels), np.asarray(predictions)), 1)
    return confusion


def accuracy(confusion: Int[np.ndarray, "C C"]) -> float:
    """Fraction of correct predictions, from a confusion matrix; nan without examples."""
    return float(np.trace(confusion) / confusion.sum()) if confusion.sum() else math.nan


def f1(confusion: Int[np.ndarray, "C C"], positive: int = 1) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of the class `positive`; 0 where undefined.

    GLUE reports it for MRPC and QQP.
    """
    true_positives = confusion[positive, positive]
    num_labels, num_predictions = confusion[positive].sum(), confusion[:, positive].sum()
    return float(2 * true_positives / max(num_labels + num_predictions, 1))


def macro_f1(confusion: Int[np.ndarray, "C C"]) -> float:
    """Unweighted mean of the F1 of all classes. A class that never occurs has an F1 of 0."""
    true_positives = np.diag(confusion)
    num_predictions, num_labels = confusion.sum(0), confusion.sum(1)
    return float(np.mean(2 * true_positives / np.maximum(num_predictions + num_labels, 1)))


def matthews(confusion: Int[np.ndarray, "C C"]) -> float:
    """Matthews correlation coefficient of any number of classes (Gorodkin 2004, "Comparing two
    K-category assignments by a K-category correlation coefficient"); 0 where undefined."""
    confusion = np.asarray(confusion, np.float64)
    n, num_correct = confusion.sum(), np.trace(confusion)
    num_predictions, num_labels = confusion.sum(0), confusion.sum(1)
    variances = (n**2 - num_predictions @ num_predictions) * (n**2 - num_labels @ num_labels)
    if variances <= 0:
        return 0.0
    return float((n * num_correct - num_predictions @ num_labels) / math.sqrt(variances))


def calibration(
    probabilities: Float[np.ndarray, "n C"], labels: Int[np.ndarray, "n"], num_bins: int = 10
) -> dict[str, Any]:
    """Calibration of predicted class probabilities (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 2).

    The confidence of a prediction is the probability of the predicted class. Predictions are
    grouped by confidence into bins of equal width.

    Args:
        probabilities: predicted probabilities of the classes.
        labels: true classes.
        num_bins: number of bins.

    Returns:
        ece: expected calibration error, the mean of |accuracy - confidence| over bins, weighted by
            their number of predictions.
        brier: Brier score, the mean squared distance of the probabilities to one-hot labels.
        confidence, accuracy, count: `[num_bins]`, the mean confidence, the accuracy and the number
            of predictions of each bin; the first two are nan for empty bins.

    Raises:
        ValueError: labels and probabilities differ in number, or there are none.

    Example:
        >>> result = calibration(np.array([[1.0, 0.0], [0.2, 0.8]]), np.array([0, 1]), num_bins=2)
        >>> round(result["ece"], 3), result["count"].tolist()
        (0.1, [0, 2])
    """
    check_same_length(labels, probabilities)
    if not len(labels):
        raise ValueError("there are 0 labels; calibration needs at least 1")
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    confidences, is_correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.bincount(bins, x, num_bins) / count for x in (confidences, is_correct))
    gaps = np.abs(np.nan_to_num(confidence) - np.nan_to_num(accuracy))
    one_hot = np.eye(probabilities.shape[1])[labels]
    return {"ece": float(gaps @ count / count.sum()),
            "brier": float(np.square(probabilities - one_hot).sum(1).mean()),
            "confidence": confidence, "accuracy": accuracy, "count": count}


# Entities -----------------------------------------------------------------------------------------


def entity_f1(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """F1, precision and recall of entities in BIO tags, as in the script conlleval.

    A predicted entity is correct if its first word, last word and type equal those of a true
    entity. An I- tag after O or after another type begins an entity. BILOU and IOBES tags are
    converted: U- and S- to B-, and L- and E- to I-.

    Args:
        labels: true tags of the words of each text.
        predictions: predicted tags, likewise.

    Returns:
        "f1", "precision" and "recall", 0 where undefined.

    Raises:
        ValueError: labels and predictions differ in the number of texts, or of tags of a text.

    Example:
        >>> entity_f1([["B-PER", "I-PER", "O"]], [["B-PER", "I-PER", "B-LOC"]])["precision"]
        0.5
    """
    check_same_length(labels, predictions)
    for text_labels, text_predictions in zip(labels, predictions):
        check_same_length(text_labels, text_predictions)
    true, predicted = ({(i, *entity) for i, tags in enumerate(texts) for entity in _entities(tags)}
                       for texts in (labels, predictions))
    num_correct = len(true & predicted)
    return {"f1": 2 * num_correct / max(len(true) + len(predicted), 1),
            "precision": num_correct / max(len(predicted), 1),
            "recall": num_correct / max(len(true), 1)}


_BIO_PREFIXES = {"U": "B", "S": "B", "L": "I", "E": "I"}


def _entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities `(first word, last word + 1, type)` of one text."""
    entities: list[tuple[int, int, str]] = []
    start, entity_type = 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, dash, tag_type = tag.partition("-")
        prefix = _BIO_PREFIXES.get(prefix, prefix) if dash else prefix
        if entity_type is not None and (prefix != "I" or tag_type != entity_type):
            entities.append((start, i, entity_type))
            entity_type = None
        if prefix in ("B", "I") and entity_type is None:
            start, entity_type = i, tag_type
    return entities
