"""Task encoder for sequence-to-sequence tasks, whose model is an encoder-decoder or a GPT."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax import metrics
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.finetuning import peft
from transformer_jax.generation import generate, transpose_kernels_for_decoding
from transformer_jax.models import BART, BERT, GPT, Model
from transformer_jax.objectives import causal_lm, seq2seq
from transformer_jax.recipes.task_encoder import (
    InputConfig,
    Outputs,
    TaskEncoder,
    TaskInfo,
    example_id,
)

GENERATE_BATCH_SIZE = 16


class Seq2SeqEncoder(TaskEncoder):
    """Encodes sources and targets; predicts targets by beam search.

    A GPT continues the source; its end-of-text token separates source and target.

    Raises:
        ValueError: the model is a BERT, the tokenizer of a GPT has no end-of-text token, or
            `max_length` or `target_length` is out of range.
    """

    def __init__(self, task: TaskInfo, model, tokenizer, config: InputConfig):
        super().__init__(task, model, tokenizer, config)
        if isinstance(model, BERT):
            raise ValueError("BERT does not generate text; fine-tune a GPT or an encoder-decoder "
                             "for seq2seq")
        # A row of a causal model contains both the source and the target.
        num_reserved = config.target_length if self.is_causal else 2
        self._source_length = config.max_length - num_reserved
        if self._source_length < 1:
            raise ValueError(f"max_length {config.max_length} leaves no tokens for the source; "
                             f"raise it above {num_reserved}")
        if not self.is_causal and config.target_length > model.config.max_length:
            raise ValueError(f"target_length is {config.target_length}, but the model has only "
                             f"{model.config.max_length} positions; lower target_length")
        if self.is_causal and tokenizer.eos_id is None:
            raise ValueError("the tokenizer has no end-of-text token to separate source and "
                             "target; use a GPT whose tokenizer has one")
        self._prepare = self._make_prepare()

    def _make_prepare(self):
        tokenizer, c = self.tokenizer, self.model.config
        if self.is_causal:
            return functools.partial(causal_lm.prepare_continuation, eos_id=tokenizer.eos_id,
                                     delimiter_id=tokenizer.eos_id)
        # The start token that `generation.generate` uses by default.
        start_id = next(i for i in (c.decoder_start_token_id, c.bos_token_id, tokenizer.sep_id)
                        if i is not None)
        return functools.partial(
            seq2seq.prepare, start_id=start_id, eos_id=tokenizer.sep_id, pad_id=tokenizer.pad_id,
            bos_id=tokenizer.cls_id if isinstance(self.model, BART) else None,
            target_length=self.config.target_length)

    def encode(self, examples: Sequence[dict], split: str = "validation") -> list[dict]:
        sides = [self.tokenizer.encode_batch([e[side] for e in examples])
                 for side in ("source", "target")]
        return [{"source": s, "target": t} for s, t in zip(*sides)]

    def lengths(self, items: Sequence[dict]) -> list[int]:
        if self.is_causal:
            return [len(e["source"]) + len(e["target"]) + 2 for e in items]
        return [len(e["source"]) + 2 for e in items]

    def make_row(self, item: dict, length: int) -> dict[str, np.ndarray]:
        return self._prepare(item, **{"length" if self.is_causal else "source_length": length})

    def predict(self, params: dict, items: Sequence[dict]) -> Outputs:
        """Returns the generated target of each item, as `{"texts": array of str}`."""
        tokenizer, model = self.tokenizer, self.model
        prefix = [tokenizer.cls_id] if isinstance(model, BART) else []
        eos_id = tokenizer.eos_id if self.is_causal else tokenizer.sep_id
        if self.is_causal and "prompt" in params:
            # Decoding with a KV cache supports trained prefixes, but not trained prompts.
            params = peft.fold_prompt(model, params)
        rows = [[*prefix, *item["source"][: self._source_length], eos_id] for item in items]
        texts = generate_texts(
            model, params, tokenizer, rows, max_new_tokens=self.config.target_length - 1,
            num_beams=self.config.num_beams, eos_token_id=eos_id)
        return {"texts": np.array(texts, dtype=object)}

    def predictions(self, examples, items, outputs) -> list[dict]:
        return [{"text": text} for text in outputs["texts"]]

    def report(self, examples, items, outputs) -> tuple[dict[str, Any], list[dict]]:
        texts, references = list(outputs["texts"]), [e["target"] for e in examples]
        if self.task.metric == "bleu":
            bleu = metrics.bleu(texts, references)
            scores = {"bleu": bleu.score, "signature": bleu.signature}
        else:
            rouge = metrics.rouge(texts, references)
            scores = {"rouge": rouge["rougeL"], **rouge}
        lines = [{"id": example_id(e, i), "prediction": text, "target": e["target"]}
                 for i, (e, text) in enumerate(zip(examples, texts))]
        return scores, lines


def generate_texts(
    model: Model, params: dict, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], *,
    batch_size: int = GENERATE_BATCH_SIZE, **options: Any,
) -> list[str]:
    """Generates a text for each row of token ids: the target of an encoder-decoder, or the
    continuation of a GPT.

    Args:
        batch_size: number of rows, of similar lengths, that are decoded together.
        options: options of `generation.generate`, such as num_beams.
    """
    params = transpose_kernels_for_decoding(model, params)
    texts: dict[int, str] = {}
    for members, batch in length_sorted_batches(rows, batch_size):
        start = max(map(len, batch)) if isinstance(model, GPT) else 0
        for i, row in zip(members, generate(model, params, batch, **options)):
            texts[i] = tokenizer.decode(row[start:]).strip()
    return [texts[i] for i in range(len(rows))]


def length_sorted_batches(rows: Sequence[Sequence[int]], batch_size: int):
    """Yields batches of rows of similar lengths, as (indices, rows).

    The last batch is padded with copies of its last row, so that all batches have the same size,
    which avoids a recompilation.

    Example:
        >>> list(length_sorted_batches([[1, 2, 3], [4], [5, 6]], batch_size=2))
        [([1, 2], [[4], [5, 6]]), ([0], [[1, 2, 3], [1, 2, 3]])]
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    for k in range(0, len(order), batch_size):
        members = [int(i) for i in order[k : k + batch_size]]
        yield members, [rows[i] for i in members] + (
            [rows[members[-1]]] * (batch_size - len(members)))
