"""Metrics of language models and of generated texts."""

import importlib
import math
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
