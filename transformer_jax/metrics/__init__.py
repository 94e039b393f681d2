"""Evaluation metrics, in NumPy.

Classification, regression, entity and calibration metrics are fractions or correlations of at most
1, except the mean squared error and the Brier score. BLEU, ROUGE and SQuAD metrics are percentages
from 0 to 100, as in their official scripts.

| module           | metrics                                                                   |
|------------------|---------------------------------------------------------------------------|
| `classification` | accuracy, F1, macro F1, Matthews correlation, calibration; F1 of entities |
| `statistics`     | Pearson and Spearman correlation; mean and standard deviation over seeds  |
| `text`           | perplexity, BLEU, ROUGE; F1 and exact match of answers (SQuAD)            |
| `by_name`        | `evaluate_predictions`: a metric by name, with related metrics            |

Every function is available from this package.

Example:
    >>> from transformer_jax import metrics
    >>> metrics.evaluate_predictions("accuracy", [0, 1, 1, 1], [0, 1, 1, 0])["accuracy"]
    0.75
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["by_name", "classification", "statistics", "text"],
    submod_attrs={
        "by_name": ["CLASSIFICATION_METRICS", "OTHER_METRICS", "classification_scores",
                    "evaluate_predictions"],
        "classification": ["accuracy", "calibration", "confusion_matrix", "entity_f1", "f1",
                           "macro_f1", "matthews"],
        "statistics": ["MeanStd", "mean_std", "pearson", "regression_scores", "spearman"],
        "text": ["BLEU", "bleu", "normalize_answer", "perplexity", "require_library", "rouge",
                 "squad_best_thresholds", "squad_scores"],
    },
)
