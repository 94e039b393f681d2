"""How good a model is, in the numbers people report."""

import math

import numpy as np
from jaxtyping import Int


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a token; inf where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def confusion(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Counts; row: true class, column: predicted class."""
    table = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(table, (np.asarray(labels), np.asarray(predictions)), 1)
    return table


def accuracy(table: Int[np.ndarray, "C C"]) -> float:
    """Share of examples on the diagonal of a confusion table; nan for an empty one."""
    return float(np.trace(table) / table.sum()) if table.sum() else math.nan


def macro_f1(table: Int[np.ndarray, "C C"]) -> float:
    """F1 averaged over classes; a class neither present nor predicted counts 0."""
    hits, predicted, true = np.diag(table), table.sum(0), table.sum(1)
    return float(np.mean(2 * hits / np.maximum(predicted + true, 1)))


def matthews(table: Int[np.ndarray, "C C"]) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where undefined."""
    table = np.asarray(table, np.float64)
    n, hits, predicted, true = table.sum(), np.trace(table), table.sum(0), table.sum(1)
    spread = (n**2 - predicted @ predicted) * (n**2 - true @ true)
    return float((n * hits - predicted @ true) / math.sqrt(spread)) if spread > 0 else 0.0
