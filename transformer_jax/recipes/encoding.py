"""Task encoders for texts, words, questions and target texts."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax import metrics
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.errors import did_you_mean
from transformer_jax.finetuning import peft
from transformer_jax.generation.api import generate_texts
from transformer_jax.models import BART, BERT, GPT, Model
from transformer_jax.objectives import causal_lm, classification, question_answering, seq2seq
from transformer_jax.recipes.task_encoder import (
    EncodedDataset,
    InputConfig,
    Outputs,
    TaskEncoder,
    TaskInfo,
)

TEXT_TASK_TYPES = ("classification", "regression", "multiple_choice")
GENERATE_BATCH_SIZE = 16


class TextEncoder(TaskEncoder):
    """Encodes a text, a pair of texts, or a text with choices as one row of token ids."""

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if self.is_causal and not config.gpt_special_tokens and tokenizer.eos_id is None:
            raise ValueError("GPT classifies a text at its end-of-text token, but the tokenizer "
                             "has none; set gpt_special_tokens")
        options: dict[str, Any] = {
            "classification": {"num_classes": len(task.label_names),
                               "both_orders": config.both_orders},
            "regression": {"label_range": task.label_range, "both_orders": config.both_orders},
            "multiple_choice": {"num_choices": task.num_choices},
        }[task.task_type]
        self._prepare = functools.partial(
            classification.TASK_TYPES[task.task_type].prepare, **options)

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        if self.is_causal and not self.config.gpt_special_tokens and any(
                "text_b" in e for e in examples):
            raise ValueError("GPT needs a delimiter token between the two texts of a pair; set "
                             "gpt_special_tokens (GPT paper, section 3.3)")
        texts = [text for e in examples
                 for text in [e["text"], *e.get("choices", ()), *filter(None, [e.get("text_b")])]]
        ids = (np.asarray(x, np.int32) for x in self.tokenizer.encode_batch(texts))
        items = []
        for e in examples:
            item: dict[str, Any] = {"tokens": next(ids), "label": e["label"]}
            if "choices" in e:
                item["choices"] = [next(ids) for _ in e["choices"]]
            if "text_b" in e:
                item["tokens_b"] = next(ids)
            items.append(item)
        return items

    def lengths(self, items: Sequence[dict]) -> list[int]:
        return [len(e["tokens"]) + len(e.get("tokens_b", ())) + (3 if "tokens_b" in e else 2)
                + (max(map(len, e["choices"])) + 1 if "choices" in e else 0) for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        return self._prepare(item, pack_input=self.input_packer(length))

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

    def _report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        labels = np.array([e["label"] for e in examples])
        if self.task.task_type == "regression":
            scores = self._scores(outputs)
            return metrics.regression_scores(scores, labels), [
                {"prediction": round(float(s), 4), "label": e["label"]}
                for e, s in zip(examples, scores)]
        probabilities = outputs["probabilities"]
        num_classes = probabilities.shape[1]
        predicted, names = probabilities.argmax(-1), self._names(num_classes)
        table = metrics.confusion_matrix(labels, predicted, num_classes)
        lines = [{"prediction": names[c], "label": names[e["label"]],
                  **{f"p({name})": round(float(x), 6) for name, x in zip(names, p)}}
                 for e, c, p in zip(examples, predicted, probabilities)]
        return {**metrics.classification_scores(self.task.metric, table), "confusion": table,
                "calibration": metrics.calibration(probabilities, labels)}, lines


class WordEncoder(TaskEncoder):
    """Encodes the words of a text as subwords.

    The class of a word is predicted at its first subword; GPT predicts it at the last.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        # Byte-level BPE encodes the space before a word as part of its first token.
        self._add_space = tokenizer.encode(" a") != tokenizer.encode("a")

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        items = [{"words": classification.subword_ids(
                      e["words"], self.tokenizer, self._add_space), "tags": e["tags"]}
                 for e in examples]
        for i, n in enumerate(self.lengths(items)):
            if n > self.config.max_length:
                raise ValueError(
                    f"{split} example {examples[i].get('id', i)!r} has {n} tokens, more than "
                    f"max_length {self.config.max_length}, and truncation would drop tagged words; "
                    "raise max_length, or split the text")
        return items

    def lengths(self, items: Sequence[dict]) -> list[int]:
        return [2 * (not self.is_causal) + sum(map(len, e["words"])) for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        tokenizer = self.tokenizer
        return classification.prepare_token_classification(
            item, length=length, num_classes=len(self.task.label_names),
            label_last_subword=self.is_causal, cls_id=None if self.is_causal else tokenizer.cls_id,
            sep_id=None if self.is_causal else tokenizer.sep_id, pad_id=tokenizer.pad_id or 0)

    def _predicted_tags(self, outputs: Outputs) -> list[list[str]]:
        names = self.task.label_names
        return [[names[t] for t in p[np.asarray(w, bool)].argmax(-1)]
                for p, w in zip(outputs["probabilities"], outputs["word_mask"])]

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"words": e["words"], "labels": tags,
                 "scores": [float(x) for x in p[np.asarray(w, bool)].max(-1)]}
                for e, tags, p, w in zip(examples, self._predicted_tags(outputs),
                                         outputs["probabilities"], outputs["word_mask"])]

    def _report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        names, predicted = self.task.label_names, self._predicted_tags(outputs)
        true = [[names[t] for t in e["tags"]] for e in examples]
        correct = [a == b for t, c in zip(true, predicted) for a, b in zip(t, c)]
        scores = {"accuracy": float(np.mean(correct)), **metrics.entity_f1(true, predicted)}
        return {self.task.metric: scores[self.task.metric], **scores}, [
            {"words": e["words"], "tags": c} for e, c in zip(examples, predicted)]


class QuestionEncoder(TaskEncoder):
    """Encodes a question with each window over its context as one row."""

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if self.is_causal and not config.gpt_special_tokens:
            raise ValueError("GPT needs a delimiter token between question and context; set "
                             "gpt_special_tokens (GPT paper, section 3.3)")
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
        return question_answering.prepare(
            item, pack_input=self.input_packer(length), causal=self.is_causal)

    def _answers(self, examples, items, outputs: Outputs) -> list[question_answering.Answer]:
        return question_answering.decode_answers(
            examples, items, outputs, allow_no_answer=self.task.has_unanswerable)

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"answer": a.text, "start": a.start_char, "stop": a.end_char,
                 "score": float(a.probability)} for a in self._answers(examples, items, outputs)]

    def _report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
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
        lines = [{"prediction": a.text, "start": a.start_char, "stop": a.end_char,
                  "score": a.score, "no_answer": a.no_answer_score, "best": a.candidates[:5]}
                 for a in answers]
        return {"f1": scores["f1"], "exact_match": scores["exact_match"], **scores}, lines


class Seq2SeqEncoder(TaskEncoder):
    """Encodes sources and targets; predicts targets by beam search.

    A GPT continues the source; its end-of-text token separates source and target.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if isinstance(model, BERT):
            raise ValueError("BERT does not generate text; fine-tune a GPT or an encoder-decoder "
                             "for seq2seq")
        # A row of a causal model contains both the source and the target. Other rows end with
        # eos_id, and those of a BART start with cls_id.
        self._bos_id = tokenizer.cls_id if isinstance(model, BART) else None
        num_reserved = config.target_length if self.is_causal else 1 + isinstance(model, BART)
        self._source_length = config.max_length - num_reserved
        if self._source_length < 1:
            raise ValueError(f"max_length {config.max_length} leaves no tokens for the source; "
                             f"raise it above {num_reserved}")
        if not self.is_causal and config.target_length > model.config.max_length:
            raise ValueError(f"target_length is {config.target_length}, but the model has only "
                             f"{model.config.max_length} positions; lower target_length")
        if self.is_causal:
            if tokenizer.eos_id is None:
                raise ValueError("the tokenizer has no end-of-text token to separate source and "
                                 "target; use a GPT whose tokenizer has one")
            self._prepare = functools.partial(
                causal_lm.prepare_continuation, eos_id=tokenizer.eos_id,
                delimiter_id=tokenizer.eos_id)
            return
        # The start token that `generation.generate` uses by default.
        c = model.config
        start_id = next(i for i in (c.decoder_start_token_id, c.bos_token_id, tokenizer.sep_id)
                        if i is not None)
        self._prepare = functools.partial(
            seq2seq.prepare, start_id=start_id, eos_id=tokenizer.sep_id, pad_id=tokenizer.pad_id,
            bos_id=self._bos_id, target_length=config.target_length)

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        sides = [self.tokenizer.encode_batch([e[side] for e in examples])
                 for side in ("source", "target")]
        return [{"source": s, "target": t} for s, t in zip(*sides)]

    def lengths(self, items: Sequence[dict]) -> list[int]:
        return [len(e["source"]) + len(e["target"]) * self.is_causal + 2 for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        return self._prepare(item, **{"length" if self.is_causal else "source_length": length})

    def predict(self, params: dict, items: Sequence[dict]) -> Outputs:
        """Returns the generated target of each item, as `{"texts": array of str}`."""
        tokenizer, config = self.tokenizer, self.config
        prefix = [] if self._bos_id is None else [self._bos_id]
        eos_id = tokenizer.eos_id if self.is_causal else tokenizer.sep_id
        if self.is_causal and "prompt" in params:
            # Decoding with a KV cache supports trained prefixes, but not trained prompts.
            params = peft.fold_prompt(self.model, params)
        rows = [[*prefix, *item["source"][: self._source_length], eos_id] for item in items]
        beams = {"length_penalty": config.length_penalty} if config.num_beams > 1 else {}
        texts = generate_texts(
            self.model, params, tokenizer, rows, batch_size=GENERATE_BATCH_SIZE, **beams,
            max_new_tokens=config.target_length - 1, num_beams=config.num_beams,
            eos_token_id=eos_id)
        return {"texts": np.array(texts, dtype=object)}

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"text": text} for text in outputs["texts"]]

    def _report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        texts, references = list(outputs["texts"]), [e["target"] for e in examples]
        if self.task.metric == "bleu":
            bleu = metrics.bleu(texts, references)
            scores = {"bleu": bleu.score, "signature": bleu.signature}
        else:
            rouge = metrics.rouge(texts, references)
            scores = {"rouge": rouge["rougeL"], **rouge}
        return scores, [{"prediction": text, "target": e["target"]}
                        for e, text in zip(examples, texts)]


ENCODERS: dict[str, type[TaskEncoder]] = {
    **dict.fromkeys(TEXT_TASK_TYPES, TextEncoder),
    "token_classification": WordEncoder,
    "question_answering": QuestionEncoder,
    "seq2seq": Seq2SeqEncoder,
}
"""Task type -> class of its encoder."""


def make_encoder(
    task: TaskInfo, model: Model, tokenizer: Tokenizer, config: InputConfig
) -> TaskEncoder:
    """Returns the encoder of a task for a model.

    Raises:
        ValueError: the task type is unknown, an option of GPT is set for another model, or the
            model or its tokenizer does not support the task.
    """
    if task.task_type not in ENCODERS:
        raise ValueError(f"unknown task type {task.task_type!r}; "
                         f"{did_you_mean(task.task_type, ENCODERS)}")
    if config.both_orders and task.task_type not in ("classification", "regression"):
        raise ValueError(f"both_orders is for pairs of texts, but the task is {task.task_type}; "
                         "remove the option")
    if not isinstance(model, GPT):
        for name in ("both_orders", "gpt_special_tokens"):
            if getattr(config, name):
                raise ValueError(f"{name} is for GPT, but the model is a {type(model).__name__}; "
                                 "remove the option")
    return ENCODERS[task.task_type](task, model, tokenizer, config)


def encode_dataset(
    dataset: LabeledDataset, model: Model, tokenizer: Tokenizer, config: InputConfig
) -> EncodedDataset:
    """Tokenizes a labeled dataset for a model; raises as `make_encoder`, or if a text with tagged
    words is longer than a row, or the library that computes the metric is not installed."""
    encoder = make_encoder(TaskInfo.of(dataset), model, tokenizer, config)
    metrics.require_library(dataset.metric)
    return EncodedDataset(dataset, encoder, encoder.encode(dataset.train, "training"),
                          encoder.encode(dataset.validation))
