"""How good a model is, in the numbers people report."""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

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


class BLEU(NamedTuple):
    """`signature` says what was measured: quote it with the score."""

    score: float  # 0 to 100
    signature: str


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> BLEU:
    """Corpus BLEU of plain, untokenized texts by sacreBLEU (Post 2018), one reference each.

    Raises:
        ValueError: no texts, or unlike numbers of them.
    """
    _check_texts(hypotheses, references)
    metric = _library("sacrebleu.metrics").BLEU(lowercase=lowercase, tokenize=tokenize)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return BLEU(score, str(metric.get_signature()))


def rouge(
    hypotheses: Sequence[str], references: Sequence[str], *, use_stemmer: bool = True
) -> dict[str, float]:
    """Mean F1 of "rouge1", "rouge2", "rougeL" and "rougeLsum", 0 to 100, by rouge-score (Lin 2004).

    rougeLsum takes lines for sentences.

    Raises:
        ValueError: no texts, or unlike numbers of them.
    """
    _check_texts(hypotheses, references)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=use_stemmer)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references)]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


def _library(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed, which counts this score: "
                                  'pip install "transformer_jax[scores]"') from None


def _check_texts(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses or references is one str; give a list of texts")
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(f"there are {len(hypotheses)} hypotheses for {len(references)} "
                         "references; give one for each, and at least one")
