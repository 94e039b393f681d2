"""Evaluation metrics, in NumPy.

Metrics of classes, scores, entities and calibration are fractions or correlations of at most 1,
except the mean squared error and the Brier score. BLEU, ROUGE and SQuAD metrics are percentages
from 0 to 100, as in their official scripts. `evaluate_predictions` computes a metric by its name.
All functions raise ValueError if predictions and labels differ in number, or labels are invalid.

Shapes: n examples, C classes.
"""

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from transformer_jax.errors import did_you_mean


def _check_one_each(
    given: Sequence, expected: Sequence, names: str = "predictions labels", min_count: int = 0
) -> None:
    """Raises ValueError unless there is one of `given` for each of `expected`."""
    a, b = names.split()
    if isinstance(given, str) or isinstance(expected, str):
        raise ValueError(f"{a} or {b} is one str; give a list of texts")
    if len(given) != len(expected) or len(expected) < min_count:
        raise ValueError(f"there are {len(given)} {a} for {len(expected)} {b}; give one for each"
                         + (", and at least one" if min_count else ""))


def confusion_matrix(
    labels: Int[np.ndarray, "n"], predictions: Int[np.ndarray, "n"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Number of examples for each true class (rows) and predicted class (columns).

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    _check_one_each(predictions, labels)
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
    """F1 = 2 TP / (2 TP + FP + FN) of one class, as GLUE for MRPC and QQP; 0 where undefined."""
    num_labels, num_predictions = confusion[positive].sum(), confusion[:, positive].sum()
    return float(2 * confusion[positive, positive] / max(num_labels + num_predictions, 1))


def macro_f1(confusion: Int[np.ndarray, "C C"]) -> float:
    """Unweighted mean of the F1 of all classes. A class that never occurs has an F1 of 0."""
    return float(np.mean([f1(confusion, c) for c in range(len(confusion))]))


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
    """Calibration of class probabilities (Guo et al. 2017, "On Calibration of Modern Neural
    Networks", section 2).

    Predictions are grouped by confidence, the probability of the predicted class, into bins of
    equal width.

    Returns:
        ece: expected calibration error, the mean of |accuracy - confidence| of the bins, by size.
        brier: Brier score, the mean squared distance of the probabilities to one-hot labels.
        confidence, accuracy, count: `[num_bins]`, the mean confidence, the accuracy and the number
            of predictions of each bin; the first two are nan for empty bins.
    """
    _check_one_each(probabilities, labels, min_count=1)
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


def entity_f1(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The "f1", "precision" and "recall" of entities in BIO tags, as in the script conlleval.

    Labels and predictions are the tags of the words of each text. A predicted entity is correct if
    its first word, last word and type equal those of a true entity. An I- tag after O or after
    another type begins an entity. BILOU and IOBES tags are converted: U- and S- to B-, and L- and
    E- to I-. Undefined values are 0.

    Example:
        >>> entity_f1([["B-PER", "I-PER", "O"]], [["B-PER", "I-PER", "B-LOC"]])["precision"]
        0.5
    """
    _check_one_each(predictions, labels)
    for text_labels, text_predictions in zip(labels, predictions):
        _check_one_each(text_predictions, text_labels)
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


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Pearson correlation coefficient cov(a, b) / (std(a) std(b)); nan if an array is constant."""
    return _correlation("pearsonr", a, b)


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman rank correlation: `pearson` of the ranks; equal values have their mean rank."""
    return _correlation("spearmanr", a, b)


def _correlation(name: str, a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    from scipy import stats  # takes about a second

    _check_one_each(a, b)
    # Constant arrays are detected by their range: rounding errors can give them a variance.
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(getattr(stats, name)(*(np.asarray(x, np.float64) for x in (a, b))).statistic)


def regression_scores(
    predictions: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"]
) -> dict[str, float]:
    """Scores "pearson_spearman" (the mean of both correlations, which GLUE reports for STS-B),
    "pearson", "spearman" and "mse" (the mean squared error)."""
    scores = {"pearson": pearson(predictions, labels), "spearman": spearman(predictions, labels)}
    return {"pearson_spearman": sum(scores.values()) / 2, **scores,
            "mse": float(np.mean(np.square(np.asarray(predictions) - np.asarray(labels))))}


class MeanStd(NamedTuple):
    """Mean of a metric over `n` seeds, and sample standard deviation (nan for one seed)."""

    mean: float
    std: float
    n: int


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation (divided by n - 1) of a metric over seeds."""
    if not len(values):
        raise ValueError("there are 0 values; a mean needs at least 1")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return MeanStd(float(np.mean(values)), std, len(values))


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token; inf on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


class BLEU(NamedTuple):
    """A BLEU score, and sacreBLEU's description of tokenization and options. Report both: scores
    with different signatures are not comparable."""

    score: float
    signature: str


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool = False,
    tokenize: str = "13a",
) -> BLEU:
    """Corpus BLEU by sacreBLEU (Post 2018, "A Call for Clarity in Reporting BLEU Scores").

    There is one reference per hypothesis; both are detokenized.

    Raises:
        ValueError: hypotheses and references differ in number, or there are none.
        ModuleNotFoundError: sacreBLEU is not installed.
    """
    _check_one_each(hypotheses, references, "hypotheses references", min_count=1)
    metric = require_library("bleu").BLEU(lowercase=lowercase, tokenize=tokenize)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return BLEU(score, str(metric.get_signature()))


def rouge(
    hypotheses: Sequence[str], references: Sequence[str], *, use_stemmer: bool = True
) -> dict[str, float]:
    """ROUGE by the library rouge-score (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
    Summaries"): "rouge1", "rouge2", "rougeL" and "rougeLsum", F1 averaged over texts, 0 to 100.

    There is one reference per hypothesis; "rougeLsum" expects one sentence per line. `use_stemmer`
    compares stems of words (Porter stemmer).

    Raises:
        ValueError: hypotheses and references differ in number, or there are none.
        ModuleNotFoundError: rouge-score is not installed.
    """
    _check_one_each(hypotheses, references, "hypotheses references", min_count=1)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = require_library("rouge").RougeScorer(names, use_stemmer=use_stemmer)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references)]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


_LIBRARIES = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}


def require_library(metric: str) -> Any:
    """The library of "bleu" or "rouge"; None for other metrics, which need none.

    Call it before a training run: the evaluation would otherwise fail with ModuleNotFoundError.
    """
    try:
        return importlib.import_module(_LIBRARIES[metric]) if metric in _LIBRARIES else None
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name}, which computes this metric, is not installed; "
                                  'run pip install "transformer_jax[scores]"') from None


def normalize_answer(text: str) -> str:
    """Lowercases and removes punctuation, articles and extra white space, as in SQuAD's script."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(answers: Sequence[str], gold_answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores "f1" (over words) and "exact_match", 0 to 100, as in SQuAD's evaluation scripts 1.1
    and 2.0 (Rajpurkar et al. 2016 and 2018).

    Answers are normalized (`normalize_answer`); "" is no answer, and correct for a question without
    gold answers. The score of a question is the highest over its gold answers, and the result is
    the mean over questions. If only some questions have an answer, the result also has the metrics
    of the questions with an answer ("has_answer_f1", ...) and without ("no_answer_f1", ...).

    Example:
        >>> squad_scores(["the black cat"], [["black cat", "cat"]])
        {'f1': 100.0, 'exact_match': 100.0}
    """
    scores, has_answer = _question_scores(answers, gold_answers)
    groups = {"": has_answer | True, "has_answer_": has_answer, "no_answer_": ~has_answer}
    return {prefix + name: 100 * float(scores[group, k].mean())
            for prefix, group in groups.items() if not prefix or 0 < group.sum() < len(has_answer)
            for k, name in enumerate(("f1", "exact_match"))}


def squad_best_thresholds(
    answers: Sequence[str], no_answer_margins: Sequence[float],
    gold_answers: Sequence[Sequence[str]],
) -> dict[str, float]:
    """The highest "best_f1" and "best_exact_match" over all thresholds of the no-answer margin, and
    their thresholds "best_f1_threshold", ..., as in SQuAD 2.0's evaluation script.

    A question whose margin, the score of "no answer" minus that of the answer, is above the
    threshold gets no answer. `answers` are the best non-empty ones, even if "no answer" has a
    higher score. The thresholds are chosen on the questions that are evaluated, so the scores are
    upper bounds; choose the threshold of a deployed model on other data.
    """
    scores, has_answer = _question_scores(answers, gold_answers)
    _check_one_each(no_answer_margins, answers, "margins answers")
    order = np.argsort(no_answer_margins, kind="stable")
    margins = np.asarray(no_answer_margins, np.float64)[order]
    # means[k] are the mean scores if the k questions with the lowest margins are answered.
    no_answer_gains = np.where(has_answer, 0.0, 1.0)[order, None] - scores[order]
    gain_sums = np.concatenate([no_answer_gains[::-1].cumsum(0)[::-1], [[0, 0]]])
    means = scores.mean(0) + gain_sums / len(margins)
    means[1:-1][margins[1:] == margins[:-1]] = -1  # no threshold separates equal margins
    best = means.argmax(0)
    thresholds = np.concatenate([[margins[0] - 1], margins])
    return {f"best_{name}{suffix}": float(value)
            for k, name in enumerate(("f1", "exact_match")) for suffix, value in (
                ("", 100 * means[best[k], k]), ("_threshold", thresholds[best[k]]))}


def _question_scores(answers, gold_answers) -> tuple[np.ndarray, np.ndarray]:
    """F1 and exact match `[n, 2]` of each question, 0 to 1, and whether it has an answer `[n]`."""
    _check_one_each(answers, gold_answers, "answers questions", min_count=1)
    scores, has_answer = [], []
    for answer, question_gold in zip(answers, gold_answers):
        # As in SQuAD 2.0's script, gold answers that are empty after normalization are ignored.
        gold = [g for g in map(normalize_answer, question_gold) if g]
        has_answer.append(bool(gold))
        gold, answer = gold or [""], normalize_answer(answer)
        scores.append([max(_word_f1(answer.split(), g.split()) for g in gold), answer in gold])
    return np.array(scores, np.float64), np.array(has_answer)


def _word_f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    num_common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * num_common / (len(answer) + len(gold))


CLASSIFICATION_METRICS: dict[str, dict[str, Callable]] = {
    "accuracy": {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews},
    "matthews": {"matthews": matthews, "accuracy": accuracy, "macro_f1": macro_f1},
    "macro_f1": {"macro_f1": macro_f1, "accuracy": accuracy, "matthews": matthews},
    "f1": {"f1": f1, "accuracy": accuracy, "matthews": matthews},
}
"""Name of a metric -> functions of a confusion matrix: the metric, then those reported with it."""

OTHER_METRICS: dict[str, Callable[[Sequence, Sequence], dict[str, float]]] = {
    "pearson_spearman": regression_scores,
    "squad": squad_scores,
    "entity_f1": lambda predictions, labels: entity_f1(labels, predictions),
}
"""Name of a metric -> `fn(predictions, labels)`, for metrics without a confusion matrix."""


def classification_scores(metric: str, confusion: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """A metric of `CLASSIFICATION_METRICS`, and those reported with it, of a `confusion_matrix`."""
    _check_metric(metric, CLASSIFICATION_METRICS)
    if metric == "f1" and len(confusion) < 2:
        raise ValueError(f"f1 is computed for class 1, but the number of classes is "
                         f"{len(confusion)}; use accuracy")
    return {name: fn(confusion) for name, fn in CLASSIFICATION_METRICS[metric].items()}


def evaluate_predictions(
    metric: str, predictions: Sequence, labels: Sequence, num_classes: int | None = None
) -> dict[str, float]:
    """Computes a metric by its name, and the metrics that are reported with it.

    Args:
        metric: a key of `CLASSIFICATION_METRICS` (predictions and labels are class ids),
            "pearson_spearman" (scores), "squad" (answers, and lists of gold answers) or "entity_f1"
            (lists of BIO tags, one list per text).
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
