"""Encoder for tasks on whole texts: classification, regression and multiple choice."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax import metrics
from transformer_jax.objectives import classification
from transformer_jax.recipes.task_encoder import (
    InputConfig,
    Outputs,
    TaskEncoder,
    TaskInfo,
    example_id,
    special_tokens,
)

TASK_TYPES = ("classification", "regression", "multiple_choice")


class TextEncoder(TaskEncoder):
    """Encodes a text, a pair of texts, or a text with choices as one row of token ids.

    Raises:
        ValueError: the model is a GPT, `gpt_special_tokens` is not set, and the tokenizer has no
            end-of-text token.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if self.is_causal and not config.gpt_special_tokens and tokenizer.eos_id is None:
            raise ValueError("GPT classifies a text at its end-of-text token, but the tokenizer "
                             "has none; set gpt_special_tokens")
        self._special_tokens = special_tokens(model, config)
        self._prepare = classification.TASK_TYPES[task.task_type].prepare
        self._options: dict[str, Any] = {
            "classification": {"num_classes": len(task.label_names),
                               "both_orders": config.both_orders},
            "regression": {"label_range": task.label_range, "both_orders": config.both_orders},
            "multiple_choice": {"num_choices": task.num_choices},
        }[task.task_type]

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        if self.is_causal and not self.config.gpt_special_tokens and any(
                "text_b" in e for e in examples):
            raise ValueError("GPT needs a delimiter token between the two texts of a pair; set "
                             "gpt_special_tokens (GPT paper, section 3.3)")
        texts = [text for e in examples
                 for text in [e["text"], *e.get("choices", ()), *filter(None, [e.get("text_b")])]]
        ids = iter(self.tokenizer.encode_batch(texts))
        items = []
        for e in examples:
            item: dict[str, Any] = {"tokens": np.asarray(next(ids), np.int32), "label": e["label"]}
            if "choices" in e:
                item["choices"] = [np.asarray(next(ids), np.int32) for _ in e["choices"]]
            if "text_b" in e:
                item["tokens_b"] = np.asarray(next(ids), np.int32)
            items.append(item)
        return items

    def lengths(self, items: Sequence[dict]) -> list[int]:
        return [len(e["tokens"]) + len(e.get("tokens_b", ())) + (3 if "tokens_b" in e else 2)
                + (max(map(len, e["choices"])) + 1 if "choices" in e else 0) for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        pack_input = classification.make_input_packer(
            self.model, self.tokenizer, length, self._special_tokens)
        return self._prepare(item, pack_input=pack_input, **self._options)

    def _scores(self, outputs: Outputs) -> np.ndarray:
        """Returns the predicted scores `[n]`, in the units of the labels."""
        low, high = self.task.label_range
        return low + (high - low) * outputs["scores"]

    def _names(self, num_classes: int) -> tuple[str, ...]:
        return self.task.label_names or tuple(map(str, range(num_classes)))

    def predictions(self, examples, items, outputs) -> list[dict]:
        if self.task.task_type == "regression":
            return [{"score": float(s)} for s in self._scores(outputs)]
        predictions = []
        for e, p in zip(examples, outputs["probabilities"]):
            best = int(p.argmax())
            if self.task.task_type == "multiple_choice":
                p = p[: len(e["choices"])]
                named = {"label": best, "choice": e["choices"][best]}
                probabilities = [float(x) for x in p]
            else:
                names = self._names(len(p))
                named = {"label": names[best]}
                probabilities = {name: float(x) for name, x in zip(names, p)}
            predictions.append(
                {**named, "score": float(p[best]), "probabilities": probabilities})
        return predictions

    def report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        labels = np.array([e["label"] for e in examples])
        if self.task.task_type == "regression":
            scores = self._scores(outputs)
            lines = [{"id": example_id(e, i), "prediction": round(float(s), 4),
                      "label": e["label"]} for i, (e, s) in enumerate(zip(examples, scores))]
            return metrics.regression_scores(scores, labels), lines
        probabilities = outputs["probabilities"]
        num_classes = probabilities.shape[1]
        predicted, names = probabilities.argmax(-1), self._names(num_classes)
        table = metrics.confusion_matrix(labels, predicted, num_classes)
        lines = [{"id": example_id(e, i), "prediction": names[c], "label": names[e["label"]],
                  **{f"p({name})": round(float(x), 6) for name, x in zip(names, p)}}
                 for i, (e, c, p) in enumerate(zip(examples, predicted, probabilities))]
        return {**metrics.classification_scores(self.task.metric, table), "confusion": table,
                "calibration": metrics.calibration(probabilities, labels)}, lines
