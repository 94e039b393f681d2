"""Encoder for token classification, which assigns a class to each word of a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax import metrics
from transformer_jax.objectives import token_classification
from transformer_jax.recipes.task_encoder import (
    InputConfig,
    Outputs,
    TaskEncoder,
    TaskInfo,
    example_id,
)


class WordEncoder(TaskEncoder):
    """Encodes the words of a text as subwords.

    The class of a word is predicted at its first subword; GPT predicts it at the last.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        # Byte-level BPE encodes the space before a word as part of its first token.
        self._add_space = tokenizer.encode(" a") != tokenizer.encode("a")

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        items = [{"words": token_classification.subword_ids(
                      e["words"], self.tokenizer, self._add_space), "tags": e["tags"]}
                 for e in examples]
        for i, n in enumerate(self.lengths(items)):
            if n > self.config.max_length:
                raise ValueError(
                    f"{split} example {example_id(examples[i], i)!r} has {n} tokens, more than "
                    f"max_length {self.config.max_length}, and truncation would drop tagged words; "
                    "raise max_length, or split the text")
        return items

    def lengths(self, items: Sequence[dict]) -> list[int]:
        return [2 * (not self.is_causal) + sum(map(len, e["words"])) for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        tokenizer = self.tokenizer
        return token_classification.prepare(
            item, length=length, num_classes=len(self.task.label_names),
            label_last_subword=self.is_causal, cls_id=None if self.is_causal else tokenizer.cls_id,
            sep_id=None if self.is_causal else tokenizer.sep_id, pad_id=tokenizer.pad_id or 0)

    def _predicted_tags(self, outputs: Outputs) -> list[list[str]]:
        names = self.task.label_names
        return [[names[t] for t in token_classification.word_predictions(p, w)]
                for p, w in zip(outputs["probabilities"], outputs["word_mask"])]

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"words": e["words"], "labels": tags,
                 "scores": [float(x) for x in p[np.asarray(w, bool)].max(-1)]}
                for e, tags, p, w in zip(examples, self._predicted_tags(outputs),
                                         outputs["probabilities"], outputs["word_mask"])]

    def report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        names, predicted = self.task.label_names, self._predicted_tags(outputs)
        true = [[names[t] for t in e["tags"]] for e in examples]
        correct = [a == b for t, c in zip(true, predicted) for a, b in zip(t, c)]
        lines = [{"id": example_id(e, i), "words": e["words"], "tags": c}
                 for i, (e, c) in enumerate(zip(examples, predicted))]
        scores = {"accuracy": float(np.mean(correct)), **metrics.entity_f1(true, predicted)}
        return {self.task.metric: scores[self.task.metric], **scores}, lines
