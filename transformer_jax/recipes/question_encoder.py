"""Encoder for extractive question answering, with overlapping windows over long contexts."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax import metrics
from transformer_jax.objectives import classification, question_answering
from transformer_jax.recipes.task_encoder import (
    InputConfig,
    Outputs,
    TaskEncoder,
    TaskInfo,
    example_id,
    special_tokens,
)


class QuestionEncoder(TaskEncoder):
    """Encodes a question with each window over its context as one row.

    Raises:
        ValueError: the model is a GPT, and `gpt_special_tokens` is not set.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if self.is_causal and not config.gpt_special_tokens:
            raise ValueError("GPT needs a delimiter token between question and context; set "
                             "gpt_special_tokens (GPT paper, section 3.3)")
        self._special_tokens = special_tokens(model, config)
        self._make_windows = functools.partial(
            question_answering.make_windows, tokenizer=tokenizer, length=config.max_length,
            stride=config.stride, max_question_length=config.max_question_length)

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list:
        if split != "training":
            # Windows do not depend on the answers, which may be invalid in validation data.
            return self._make_windows([{**e, "answers": []} for e in examples])
        windows = self._make_windows(examples, strict=False)
        if dropped := len(examples) - len({window.example_index for window in windows}):
            print(f"{dropped} of {len(examples)} training questions are left out: no token "
                  "overlaps their answer", flush=True)
        return windows

    def lengths(self, items: Sequence) -> list[int]:
        return [3 + len(w.question_ids) + len(w.context_ids) for w in items]

    def make_row(self, item: Any, length: int) -> dict[str, np.ndarray]:
        pack_input = classification.make_input_packer(
            self.model, self.tokenizer, length, self._special_tokens)
        return question_answering.prepare(item, pack_input=pack_input, causal=self.is_causal)

    def _answers(self, examples, items, outputs: Outputs) -> list[question_answering.Answer]:
        return question_answering.decode_answers(
            examples, items, outputs, allow_no_answer=self.task.has_unanswerable)

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"answer": a.text, "start": a.start_char, "stop": a.end_char,
                 "score": float(a.probability)} for a in self._answers(examples, items, outputs)]

    def report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        answers = self._answers(examples, items, outputs)
        gold = [[g["text"] for g in e["answers"]] for e in examples]
        scores = metrics.squad_scores([a.text for a in answers], gold)
        if self.task.has_unanswerable:
            # The best non-empty span of each question, also if the prediction is "no answer".
            spans = [next((c for c in a.candidates if c.end_char), None) for a in answers]
            margins = [a.no_answer_score - (span.score if span else -np.inf)
                       for a, span in zip(answers, spans)]
            scores |= metrics.squad_best_thresholds(
                [span.text if span else "" for span in spans], margins, gold)
        lines = [{"id": example_id(e, i), "prediction": a.text, "start": a.start_char,
                  "stop": a.end_char, "score": a.score, "no_answer": a.no_answer_score,
                  "best": a.candidates[:5]} for i, (e, a) in enumerate(zip(examples, answers))]
        return {"f1": scores["f1"], "exact_match": scores["exact_match"], **scores}, lines
