"""How good a model is, in the numbers people report."""

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


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


# Annotated tasks ----------------------------------------------------------------------------------


def f1(table: Int[np.ndarray, "C C"], positive: int = 1) -> float:
    """F1 of one class of a confusion table, as GLUE reports MRPC and QQP; 0 where undefined."""
    hits = table[positive, positive]
    return float(2 * hits / max(table[positive].sum() + table[:, positive].sum(), 1))


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; nan where one side does not vary."""
    a, b = (np.asarray(x, np.float64) - np.mean(x) for x in (a, b))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 0 else math.nan


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def entity_f1(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities in BIO tags, as conlleval counts them: an I- of
    another kind, or after O, begins an entity."""
    true, found = ({(i, *span) for i, tags in enumerate(rows) for span in _entities(tags)}
                   for rows in (labels, predictions))
    hits = len(true & found)
    return {"precision": hits / max(len(found), 1), "recall": hits / max(len(true), 1),
            "f1": 2 * hits / max(len(true) + len(found), 1)}


def _entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    spans, begin, kind = [], 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, new = tag.partition("-")
        if kind and (mark != "I" or new != kind):
            spans.append((begin, i, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            begin, kind = i, new
    return spans


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces: as SQuAD's script."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 over words, 0 to 100, each against the best of an example's gold answers
    (SQuAD's evaluation scripts, 1.1 and 2.0). An example without gold answers wants ""."""
    if len(answers) != len(gold) or not len(gold):
        raise ValueError(f"there are {len(answers)} answers to {len(gold)} questions; give one for "
                         "each, and at least one")
    pairs = [[(normalize_answer(answer), normalize_answer(g)) for g in (found or [""])]
             for answer, found in zip(answers, gold)]
    exact = [max(a == g for a, g in found) for found in pairs]
    overlap = [max(_word_f1(a.split(), g.split()) for a, g in found) for found in pairs]
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def _word_f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


def calibration(
    probabilities: Float[np.ndarray, "n C"], labels: Int[np.ndarray, "n"], bins: int = 10
) -> dict[str, Any]:
    """How far to believe the probability of the chosen class (Guo et al. 2017, section 2).

    Returns:
        "ece", the expected calibration error; "brier", the mean squared distance from the truth;
        "confidence", "accuracy" and "count" of each bin of equal width, nan in an empty one.
    """
    probabilities = np.asarray(probabilities, np.float64)
    sure, hit = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (np.bincount(place, x, bins) / count for x in (sure, hit))
    gaps = np.abs(np.nan_to_num(confidence) - np.nan_to_num(accuracy))
    truth = np.eye(probabilities.shape[1])[labels]
    return {"ece": float(gaps @ count / count.sum()),
            "brier": float(np.square(probabilities - truth).sum(1).mean()),
            "confidence": confidence, "accuracy": accuracy, "count": count}


class Spread(NamedTuple):
    """Of one number over seeds; `std` is the sample's, nan for one seed."""

    mean: float
    std: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), std, len(values))


# What people report for a metric, the main one first.
CLASS_SCORES: dict[str, dict[str, Callable]] = {
    "accuracy": {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews},
    "matthews": {"matthews": matthews, "accuracy": accuracy, "macro_f1": macro_f1},
    "f1": {"f1": f1, "accuracy": accuracy, "matthews": matthews},
}


def class_scores(metric: str, table: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """The numbers of a confusion table, that of `metric` first."""
    return {name: score(table) for name, score in CLASS_SCORES[metric].items()}


def correlations(scores: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"]) -> dict:
    """Pearson's and Spearman's, and their mean, which GLUE reports for STS-B."""
    found = {"pearson": pearson(scores, labels), "spearman": spearman(scores, labels)}
    return {"pearson_spearman": sum(found.values()) / 2, **found,
            "mse": float(np.mean(np.square(np.asarray(scores) - np.asarray(labels))))}
