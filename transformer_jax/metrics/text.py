"""Metrics of language models, of generated texts, and of answers to questions."""

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token; inf on overflow.

    Example:
        >>> round(perplexity(math.log(50)), 6)
        50.0
    """
    return math.exp(loss) if loss < 700 else math.inf


class BLEU(NamedTuple):
    """A BLEU score.

    Attributes:
        score: from 0 to 100.
        signature: sacreBLEU's description of the tokenization and options; report it with the
            score, because scores with different signatures are not comparable.
    """

    score: float
    signature: str


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> BLEU:
    """Corpus BLEU by sacreBLEU (Post 2018, "A Call for Clarity in Reporting BLEU Scores").

    Args:
        hypotheses: predicted texts, detokenized.
        references: one reference per hypothesis, detokenized.
        lowercase: whether to ignore case.
        tokenize: name of sacreBLEU's tokenizer.

    Raises:
        ValueError: hypotheses and references differ in number, or there are none.
        ModuleNotFoundError: sacreBLEU is not installed.
    """
    _check_texts(hypotheses, references)
    metric = _import_library("sacrebleu.metrics").BLEU(lowercase=lowercase, tokenize=tokenize)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return BLEU(score, str(metric.get_signature()))


def rouge(
    hypotheses: Sequence[str], references: Sequence[str], *, use_stemmer: bool = True
) -> dict[str, float]:
    """ROUGE (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    Computed by the library rouge-score.

    Args:
        hypotheses: predicted texts, with one sentence per line for "rougeLsum".
        references: one reference per hypothesis, likewise.
        use_stemmer: whether to compare the stems of words (Porter stemmer).

    Returns:
        "rouge1", "rouge2", "rougeL" and "rougeLsum": F1, averaged over the texts, 0 to 100.

    Raises:
        ValueError: hypotheses and references differ in number, or there are none.
        ModuleNotFoundError: rouge-score is not installed.
    """
    _check_texts(hypotheses, references)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = _import_library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=use_stemmer)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references)]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


def require_library(metric: str) -> None:
    """Checks that the library of a metric ("bleu", "rouge") is installed; other metrics need none.

    Call it before a training run, whose evaluation would fail otherwise.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    module = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}.get(metric)
    if module is not None:
        _import_library(module)


def _import_library(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name}, which computes this metric, is not installed; "
                                  'run pip install "transformer_jax[scores]"') from None


def _check_texts(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses or references is one str; give a list of texts")
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(f"there are {len(hypotheses)} hypotheses for {len(references)} "
                         "references; give one for each, and at least one")


# Answers (SQuAD 1.1 and 2.0, Rajpurkar et al. 2016 and 2018) --------------------------------------


def normalize_answer(text: str) -> str:
    """Lowercases and removes punctuation, articles and extra white space, as SQuAD's script does.

    Example:
        >>> normalize_answer("The  Cat.")
        'cat'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(answers: Sequence[str], gold_answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 over words and exact match, as SQuAD's evaluation scripts (1.1 and 2.0) compute them.

    Answers are normalized (`normalize_answer`). The score of a question is the highest over its
    gold answers, and the result is the mean over questions.

    Args:
        answers: the answer to each question; "" for no answer.
        gold_answers: the correct answers to each question. A question without any has no answer,
            and "" is correct.

    Returns:
        "f1" and "exact_match", 0 to 100. If only some questions have an answer, also the same
        metrics over the questions with an answer ("has_answer_f1", "has_answer_exact_match") and
        without ("no_answer_f1", "no_answer_exact_match").

    Raises:
        ValueError: answers and questions differ in number, or there are none.

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
    """The highest F1 and exact match over all thresholds of the no-answer margin.

    Also returns the thresholds of the highest scores, as SQuAD 2.0's evaluation script does. A
    question whose margin is above the threshold gets no answer. The thresholds are chosen on the
    same questions that are evaluated, so the scores are upper bounds; choose the threshold of a
    deployed model on other data.

    Args:
        answers: the best non-empty answer to each question, even if "no answer" has a higher score.
        no_answer_margins: for each question, the score of "no answer" minus that of the answer.
        gold_answers: see `squad_scores`.

    Returns:
        "best_f1" and "best_exact_match", 0 to 100, "best_f1_threshold" and
        "best_exact_match_threshold".

    Raises:
        ValueError: answers, margins and questions differ in number, or there are none.
    """
    scores, has_answer = _question_scores(answers, gold_answers)
    if len(no_answer_margins) != len(answers):
        raise ValueError(f"there are {len(no_answer_margins)} margins for {len(answers)} answers; "
                         "give one for each")
    order = np.argsort(no_answer_margins, kind="stable")
    margins = np.asarray(no_answer_margins, np.float64)[order]
    # means[k] are the mean scores if the k questions with the lowest margins are answered.
    no_answer_gains = np.where(has_answer, 0.0, 1.0)[order, None] - scores[order]
    gain_sums = np.concatenate([no_answer_gains[::-1].cumsum(0)[::-1], [[0, 0]]])
    means = scores.mean(0) + gain_sums / len(margins)
    means[1:-1][margins[1:] == margins[:-1]] = -1  # no threshold separates equal margins
    best = means.argmax(0)
    thresholds = np.concatenate([[margins[0] - 1], margins])
    result = {}
    for k, name in enumerate(("f1", "exact_match")):
        result[f"best_{name}"] = float(100 * means[best[k], k])
        result[f"best_{name}_threshold"] = float(thresholds[best[k]])
    return result


def _question_scores(answers, gold_answers) -> tuple[np.ndarray, np.ndarray]:
    """F1 and exact match `[n, 2]` of each question, 0 to 1, and whether it has an answer `[n]`."""
    if len(answers) != len(gold_answers) or not len(gold_answers):
        raise ValueError(f"there are {len(answers)} answers for {len(gold_answers)} questions; "
                         "give one for each, and at least one")
    scores, has_answer = [], []
    for answer, question_gold in zip(answers, gold_answers):
        # As in SQuAD 2.0's script, gold answers that are empty after normalization are ignored.
        gold = [g for g in map(normalize_answer, question_gold) if g]
        answer = normalize_answer(answer)
        scores.append([max(_word_f1(answer.split(), g.split()) for g in gold or [""]),
                       answer in (gold or [""])])
        has_answer.append(bool(gold))
    return np.array(scores, np.float64), np.array(has_answer)


def _word_f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    num_common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * num_common / (len(answer) + len(gold))
