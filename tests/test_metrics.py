"""Metrics, compared with values computed by hand, SciPy and scikit-learn."""

import math
import sys

import numpy as np
import pytest

from transformer_jax import metrics


def test_perplexity_is_exp_of_the_loss():
    assert metrics.perplexity(math.log(50)) == pytest.approx(50)
    assert metrics.perplexity(1e4) == math.inf


def test_confusion_matrix_and_its_metrics():
    # Two classes: 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    confusion = metrics.confusion_matrix(labels, predictions, 2)
    np.testing.assert_array_equal(confusion, [[4, 2], [1, 3]])
    assert metrics.accuracy(confusion) == pytest.approx(0.7)
    positive, negative = 2 * 3 / (2 * 3 + 2 + 1), 2 * 4 / (2 * 4 + 1 + 2)
    assert metrics.macro_f1(confusion) == pytest.approx((positive + negative) / 2)
    assert metrics.matthews(confusion) == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_undefined_and_perfect_metrics():
    assert math.isnan(metrics.accuracy(np.zeros((2, 2), int)))
    assert metrics.matthews(np.array([[5, 0], [5, 0]])) == 0  # only one class is predicted
    assert metrics.matthews(np.diag([3, 4, 5])) == pytest.approx(1)


def test_bleu_and_its_signature():
    texts = ["The cat sat on the mat.", "Two dogs ran in the park today."]
    assert metrics.bleu(texts, texts).score == pytest.approx(100)
    found = metrics.bleu([t.lower() for t in texts], texts)
    assert 50 < found.score < 100 and "tok:13a" in found.signature
    assert "case:mixed" in found.signature
    assert metrics.bleu([t.lower() for t in texts], texts, lowercase=True).score == pytest.approx(
        100)


@pytest.mark.slow
def test_rouge():
    # The longest common subsequence of "a b c d" and "b a c d" has three words.
    found = metrics.rouge(["a b c d"], ["b a c d"])
    assert found["rouge1"] == pytest.approx(100)
    assert found["rouge2"] == pytest.approx(100 / 3)
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(75)
    assert metrics.rouge(["x", "a"], ["y", "a"])["rouge1"] == pytest.approx(50)


@pytest.mark.parametrize("score", [metrics.bleu, metrics.rouge])
def test_invalid_texts(score):
    with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
    with pytest.raises(ValueError, match="give a list of texts"):
        score("abc", "abc")


@pytest.mark.parametrize(("score", "library"), [
    (metrics.bleu, "sacrebleu"), (metrics.rouge, "rouge_score")])
def test_a_missing_library_raises_with_its_name(score, library, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=rf"{library}.*pip install.*\[scores\]"):
        score(["a"], ["a"])


def test_f1_of_a_class():
    confusion = np.array([[5, 2], [1, 3]])
    assert metrics.f1(confusion) == pytest.approx(2 * 3 / (4 + 5))
    assert metrics.f1(confusion, positive=0) == pytest.approx(2 * 5 / (7 + 6))


def test_correlations():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    assert metrics.pearson(a, b) == pytest.approx(0.8)
    assert metrics.spearman(a, np.exp(b)) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert metrics.spearman([0, 7, 7, 9], a) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(metrics.pearson([1, 1, 1], [1, 2, 3]))
    assert np.isnan(metrics.pearson([0.1, 0.1, 0.1], [1, 2, 3]))  # their computed mean is not 0.1
    assert np.isnan(metrics.spearman([1, 2, 3], [2, 2, 2]))
    assert np.isnan(metrics.pearson([], []))
    assert np.isnan(metrics.spearman([np.nan, 1, 2], [1, 2, 3]))
    found = metrics.regression_scores(np.array(a), np.array(b))
    assert found["pearson_spearman"] == pytest.approx(0.8) and found["mse"] == pytest.approx(0.5)


@pytest.mark.parametrize(("true", "found", "f1"), [
    ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1.0),
    ("B-PER I-PER O B-LOC", "B-PER O O B-LOC", 0.5),
    ("B-PER I-PER O B-LOC", "B-PER I-LOC O B-LOC", 0.4),  # three are predicted, one is correct
    ("I-PER I-PER O", "B-PER I-PER O", 1.0),
    ("B-PER B-PER", "B-PER I-PER", 0.0),
    ("O O", "O O", 0.0),
    ("O I-PER B-PER I-PER", "O B-PER B-PER I-PER", 1.0),
    ("B-A-X I-A-X", "B-A-X I-A-Y", 0.0),
    ("B I O B", "B I O O", 2 / 3),  # one type without a name
    ("U-PER O B-LOC I-LOC L-LOC", "O O B-LOC I-LOC L-LOC", 2 / 3),  # BILOU
    ("S-PER S-PER B-LOC E-LOC", "S-PER S-PER B-LOC E-LOC", 1.0),  # IOBES
    ("B-LOC E-LOC", "B-LOC S-LOC", 0.0),
])
def test_entity_f1(true, found, f1):
    assert metrics.entity_f1([true.split()], [found.split()])["f1"] == pytest.approx(f1)


def test_entity_f1_of_several_texts():
    """Two entities in each of two texts; three are predicted, two of them are correct."""
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "B-ORG"]]
    found = [["B-PER", "I-PER", "O", "O"], ["B-ORG", "I-PER"]]
    assert metrics.entity_f1(true, found) == pytest.approx(
        {"f1": 4 / 7, "precision": 2 / 3, "recall": 1 / 2})
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        metrics.entity_f1([["O", "O"]], [["O"]])


@pytest.mark.parametrize(("answer", "gold", "exact", "f1"), [
    ("The Cat.", ["a cat"], 100, 100),
    ("", ["the"], 100, 100),  # the gold answer is empty after normalization
    ("cat", ["a", "cat"], 100, 100),
    ("black cat", ["cat", "dog"], 0, 200 / 3),
    ("", [], 100, 100),
    ("cat", [], 0, 0),
    ("the", ["cat"], 0, 0),
    ("a cat cat", ["cat"], 0, 200 / 3),
])
def test_squad_scores(answer, gold, exact, f1):
    found = metrics.squad_scores([answer], [gold])
    assert (found["exact_match"], found["f1"]) == (exact, pytest.approx(f1))


def test_squad_scores_of_questions_with_and_without_an_answer():
    found = metrics.squad_scores(["black cat", "", "dog", "dog"], [["cat"], ["cat"], [], ["dog"]])
    assert found == pytest.approx({
        "f1": (200 / 3 + 100) / 4, "exact_match": 25,
        "has_answer_f1": (200 / 3 + 100) / 3, "has_answer_exact_match": 100 / 3,
        "no_answer_f1": 0, "no_answer_exact_match": 0})
    assert metrics.squad_scores(["cat"], [["cat"]]) == {"f1": 100, "exact_match": 100}


def test_squad_best_thresholds():
    found = metrics.squad_best_thresholds(["black cat", "dog", "cow"], [-1.0, 0.5, 3.0],
                                      [["cat"], ["dog"], []])
    assert found == pytest.approx({
        "best_f1": (200 / 3 + 200) / 3, "best_f1_threshold": 0.5,
        "best_exact_match": 200 / 3, "best_exact_match_threshold": 0.5})
    rng = np.random.default_rng(0)
    for _ in range(20):
        answers = [str(w) for w in rng.choice(["a cat", "dog", "black cat"], 9)]
        gold = [[str(w) for w in rng.choice(["cat", "dog"], rng.integers(3))] for _ in answers]
        margins = rng.integers(-3, 3, 9).astype(float)  # with ties
        found = metrics.squad_best_thresholds(answers, margins, gold)
        for name in ("f1", "exact_match"):
            scores = {t: metrics.squad_scores(
                [a if m <= t else "" for a, m in zip(answers, margins)], gold)[name]
                for t in (-9.0, *margins)}
            assert found[f"best_{name}"] == pytest.approx(max(scores.values()))
            threshold = found[f"best_{name}_threshold"]
            assert scores.get(threshold, scores[-9.0]) == pytest.approx(max(scores.values()))
    with pytest.raises(ValueError, match="1 margins for 2 answers"):
        metrics.squad_best_thresholds(["a", "b"], [0.0], [["a"], ["b"]])


def test_calibration():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [1.0, 0.0]])
    found = metrics.calibration(probabilities, np.array([0, 1, 1, 0]), num_bins=5)
    assert found["count"].tolist() == [0, 0, 1, 0, 3]
    np.testing.assert_allclose(found["confidence"][[2, 4]], [0.55, 0.9])
    np.testing.assert_allclose(found["accuracy"][[2, 4]], [1, 2 / 3])
    assert found["ece"] == pytest.approx((0.45 + 3 * (0.9 - 2 / 3)) / 4)
    assert found["brier"] == pytest.approx((0.02 + 1.28 + 0.405 + 0) / 4)


def test_mean_std_and_classification_scores():
    assert metrics.mean_std([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)), 2)
    assert np.isnan(metrics.mean_std([1.0]).std)
    scores = metrics.classification_scores("matthews", np.eye(2, dtype=int))
    assert next(iter(scores)) == "matthews"


EXPECTED = {
    "accuracy": ([1, 1, 0], [1, 0, 0], {"accuracy": 2 / 3, "macro_f1": 2 / 3, "matthews": 0.5}),
    "macro_f1": ([1, 1, 0], [1, 0, 0], {"macro_f1": 2 / 3, "accuracy": 2 / 3, "matthews": 0.5}),
    "matthews": ([0, 0], [0, 0], {"matthews": 0, "accuracy": 1, "macro_f1": 0.5}),
    "f1": ([1, 1, 0, 0], [1, 0, 0, 0], {"f1": 2 / 3, "accuracy": 3 / 4, "matthews": 3**-0.5}),
    "pearson_spearman": ([1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0], {
        "pearson_spearman": 0.8, "pearson": 0.8, "spearman": 0.8, "mse": 0.5}),
    "squad": (["a cat"], [["cat"]], {"f1": 100, "exact_match": 100}),
    "entity_f1": ([["B-X", "B-X"]], [["B-X", "O"]], {
        "f1": 2 / 3, "precision": 1 / 2, "recall": 1}),
}


@pytest.mark.parametrize("metric", EXPECTED)
def test_evaluate_predictions(metric):
    predictions, labels, expected = EXPECTED[metric]
    found = metrics.evaluate_predictions(metric, predictions, labels)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)


def test_macro_f1_includes_classes_that_never_occur():
    scores = metrics.evaluate_predictions("macro_f1", [0, 1], [0, 1], num_classes=4)
    assert scores["macro_f1"] == 0.5


def test_invalid_predictions():
    with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean accuracy"):
        metrics.evaluate_predictions("acuracy", [0], [0])
    with pytest.raises(ValueError, match="unknown metric 'squad'"):
        metrics.classification_scores("squad", np.eye(2))
    with pytest.raises(ValueError, match="labels range from -1 to 1; they must be from 0 to 1"):
        metrics.confusion_matrix(np.array([1, -1]), np.array([0, 0]), 2)
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        metrics.evaluate_predictions("accuracy", [0], [0, 1])
    with pytest.raises(ValueError, match="f1 is computed for class 1, but the number"):
        metrics.classification_scores("f1", np.eye(1))
    with pytest.raises(ValueError, match="0 values"):
        metrics.mean_std([])
    with pytest.raises(ValueError, match="0 labels"):
        metrics.calibration(np.zeros((0, 2)), np.zeros(0, int))


def test_correlations_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 40))
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
    assert metrics.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])


def test_classification_metrics_equal_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    a, b = np.random.default_rng(0).integers(0, 3, (2, 60))
    confusion = metrics.confusion_matrix(a, b, 3)
    assert metrics.macro_f1(confusion) == pytest.approx(
        sklearn_metrics.f1_score(a, b, average="macro"))
    assert metrics.matthews(confusion) == pytest.approx(sklearn_metrics.matthews_corrcoef(a, b))
    assert metrics.f1(confusion) == pytest.approx(sklearn_metrics.f1_score(a == 1, b == 1))


def test_errors_of_correlations_count_predictions_and_labels():
    for score in (metrics.pearson, metrics.spearman):
        with pytest.raises(ValueError, match="3 predictions for 2 labels"):
            score(np.arange(3.0), np.arange(2.0))
