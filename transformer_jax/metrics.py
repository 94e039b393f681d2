"""How good a model is, in the numbers people report.

Shares and correlations (accuracy, F1 of classes and entities, Matthews, calibration) are at most 1;
scores of texts (BLEU, ROUGE, SQuAD) go to 100, as their scripts print them.
"""

import difflib
import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a token; inf where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def confusion_matrix(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Counts; row: true class, column: predicted class.

    Raises:
        ValueError: unlike numbers of labels and predictions, or a class out of range.
    """
    _check_pairs(labels, predictions)
    for name, found in (("labels", labels), ("predictions", predictions)):
        if len(found) and not 0 <= np.min(found) <= np.max(found) < num_classes:
            raise ValueError(f"{name} go from {np.min(found)} to {np.max(found)}, outside 0 to "
                             f"{num_classes - 1}; leave out what has no label")
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


def _check_pairs(labels: Sequence, predictions: Sequence) -> None:
    if len(labels) != len(predictions):
        raise ValueError(f"there are {len(predictions)} predictions for {len(labels)} labels; give "
                         "one for each")


def require_library(metric: str) -> None:
    """Nothing, if `metric` can be counted: to be asked before a training, not after it.

    Raises:
        ModuleNotFoundError: the library that counts BLEU or ROUGE is not installed.
    """
    library = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}.get(metric)
    if library is not None:
        _library(library)


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
    _check_pairs(a, b)
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:  # rounding would make a constant vary
        return math.nan
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (a, b))
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


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
    """F1, precision and recall of whole entities in BIO tags, as conlleval counts them: an I- of
    another kind, or after O, begins an entity. Of BILOU and IOBES, U- and S- are read as B-, L- and
    E- as I-. 0 where undefined.

    Raises:
        ValueError: unlike numbers of rows, or of tags in one.
    """
    _check_pairs(labels, predictions)
    for row, found in zip(labels, predictions):
        _check_pairs(row, found)
    true, found = ({(i, *span) for i, tags in enumerate(rows) for span in _entities(tags)}
                   for rows in (labels, predictions))
    hits = len(true & found)
    return {"f1": 2 * hits / max(len(true) + len(found), 1),
            "precision": hits / max(len(found), 1), "recall": hits / max(len(true), 1)}


_MARKS = {"U": "B", "S": "B", "L": "I", "E": "I"}


def _entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    spans: list[tuple[int, int, str]] = []
    begin, kind = 0, None
    for i, tag in enumerate([*tags, "O"]):
        mark, dash, new = tag.partition("-")
        mark = _MARKS.get(mark, mark) if dash else mark
        if kind is not None and (mark != "I" or new != kind):
            spans.append((begin, i, kind))
            kind = None
        if mark in ("B", "I") and kind is None:
            begin, kind = i, new
    return spans


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces: as SQuAD's script."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 over words and exact match, 0 to 100, each against the best of an example's gold answers
    (SQuAD's evaluation scripts, 1.1 and 2.0). An example without gold answers wants "".

    Where some have an answer and some have none, "has_answer_f1", "no_answer_f1" and so on are of
    these alone.

    Raises:
        ValueError: no questions, or unlike numbers of answers.
    """
    rows, has = _squad_rows(answers, gold)
    groups = {"": has | True, "has_answer_": has, "no_answer_": ~has}
    return {prefix + name: 100 * float(rows[chosen, k].mean())
            for prefix, chosen in groups.items() if not prefix or 0 < chosen.sum() < len(has)
            for k, name in enumerate(("f1", "exact_match"))}


def squad_thresholds(
    answers: Sequence[str], margins: Sequence[float], gold: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The best that `squad` could give if questions whose margin is above a threshold were left
    unanswered, and that threshold, for F1 and exact match apart (SQuAD 2.0's evaluation script).
    Chosen on the very set it is reported of, so an upper bound; choose it on another for use.

    Args:
        answers: of every question, also of those to be left unanswered.
        margins: the score of no answer less that of the answer.

    Raises:
        ValueError: no questions, or unlike numbers.
    """
    given, has = _squad_rows(answers, gold)
    if len(margins) != len(answers):
        raise ValueError(f"there are {len(margins)} margins of {len(answers)} answers; give one "
                         "for each")
    order = np.argsort(margins, kind="stable")
    sizes = np.asarray(margins, np.float64)[order]
    # Row k: the first k in order are answered. Equal margins go together.
    gain = np.where(has, 0.0, 1.0)[order, None] - given[order]
    means = given.mean(0) + np.concatenate([gain[::-1].cumsum(0)[::-1], [[0, 0]]]) / len(sizes)
    means[1:-1][sizes[1:] == sizes[:-1]] = -1
    best = means.argmax(0)
    lowest = np.concatenate([[sizes[0] - 1], sizes])
    return {f"best_{name}{end}": float(value) for k, name in enumerate(("f1", "exact_match"))
            for end, value in (("", 100 * means[best[k], k]), ("_threshold", lowest[best[k]]))}


def _squad_rows(answers, gold) -> tuple[np.ndarray, np.ndarray]:
    """(F1 and exact match of each question, 0 to 1; which have an answer)."""
    if len(answers) != len(gold) or not len(gold):
        raise ValueError(f"there are {len(answers)} answers to {len(gold)} questions; give one for "
                         "each, and at least one")
    rows, answerable = [], []
    for answer, found in zip(answers, gold):
        wanted = [g for g in map(normalize_answer, found) if g]  # as 2.0's script
        answer = normalize_answer(answer)
        rows.append([max(_word_f1(answer.split(), g.split()) for g in wanted or [""]),
                     answer in (wanted or [""])])
        answerable.append(bool(wanted))
    return np.array(rows, np.float64), np.array(answerable)


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

    Raises:
        ValueError: no rows, or unlike numbers of them.
    """
    _check_pairs(labels, probabilities)
    if not len(labels):
        raise ValueError("there are 0 labels; calibration needs at least 1")
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
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


class MeanStd(NamedTuple):
    """Of one number over seeds; `std` is the sample's (n - 1), nan for one seed."""

    mean: float
    std: float
    n: int


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and standard deviation over seeds.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("there are 0 values; a mean needs at least 1 seed")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return MeanStd(float(np.mean(values)), std, len(values))


# What people report for a metric, the main one first.
CLASS_SCORES: dict[str, dict[str, Callable]] = {
    "accuracy": {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews},
    "matthews": {"matthews": matthews, "accuracy": accuracy, "macro_f1": macro_f1},
    "macro_f1": {"macro_f1": macro_f1, "accuracy": accuracy, "matthews": matthews},
    "f1": {"f1": f1, "accuracy": accuracy, "matthews": matthews},
}


def class_scores(metric: str, table: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """The numbers of a confusion table, that of `metric` first.

    Raises:
        ValueError: an unknown metric, or F1 of class 1 where there is none.
    """
    _check_metric(metric, CLASS_SCORES)
    if metric == "f1" and len(table) < 2:
        raise ValueError(f"f1 is that of class 1, but there are {len(table)} classes; use accuracy")
    return {name: score(table) for name, score in CLASS_SCORES[metric].items()}


def correlations(scores: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"]) -> dict:
    """Pearson's and Spearman's, and their mean, which GLUE reports for STS-B."""
    found = {"pearson": pearson(scores, labels), "spearman": spearman(scores, labels)}
    return {"pearson_spearman": sum(found.values()) / 2, **found,
            "mse": float(np.mean(np.square(np.asarray(scores) - np.asarray(labels))))}


OTHER_SCORES: dict[str, Callable[[Sequence, Sequence], dict[str, float]]] = {
    "pearson_spearman": correlations,
    "squad": squad_scores,
    "entity_f1": lambda predictions, labels: entity_f1(labels, predictions),
}


def evaluate_predictions(
    metric: str, predictions: Sequence, labels: Sequence, num_classes: int | None = None
) -> dict[str, float]:
    """The numbers people report for a metric, the main one first.

    Args:
        metric: of `CLASS_SCORES`, for classes by number; "pearson_spearman", for scores; "squad",
            for answers and lists of gold ones; "entity_f1", for rows of BIO tags.
        num_classes: for classes; the largest that occurs, and at least 2, if not given.

    Raises:
        ValueError: an unknown metric, or predictions that do not fit the labels.
    """
    _check_metric(metric, [*CLASS_SCORES, *OTHER_SCORES])
    if metric in OTHER_SCORES:
        return OTHER_SCORES[metric](predictions, labels)
    if num_classes is None:
        num_classes = 1 + max(int(np.max(x, initial=1)) for x in (predictions, labels))
    return class_scores(metric, confusion_matrix(labels, predictions, num_classes))


def _check_metric(metric: str, known: Iterable[str]) -> None:
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        raise ValueError(f"unknown metric {metric!r}"
                         f"{f', did you mean {near[0]!r}?' if near else ';'} choose from "
                         f"{', '.join(known)}")
