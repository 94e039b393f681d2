"""Tasks whose answer is a text: summarization and translation by encoder-decoders, continuation by
GPT. What `supervised` is to classes, for generated texts."""

import functools
from collections.abc import Sequence

import numpy as np
from supervised import Predictions, Reading, Task

from transformer_jax import metrics
from transformer_jax.data import LabeledDataset
from transformer_jax.finetuning import peft
from transformer_jax.generation import generate, transpose_kernels_for_decoding
from transformer_jax.models import BART, BERT, GPT, Model
from transformer_jax.objectives import causal_lm, seq2seq


def read(data: LabeledDataset, model: Model, tokenizer, how: Reading) -> Task:
    """Pairs of texts in ids. GPT's end-of-text token stands between source and target.

    Raises:
        ValueError: the model is a BERT, or rows have no room for a source beside a target.
        ModuleNotFoundError: the library that scores is not installed.
    """
    if isinstance(model, BERT):
        raise ValueError("BERT writes no texts; fine-tune a GPT or an encoder-decoder on pairs of "
                         "source and target")

    metrics.require_library(data.metric)
    room = _room(model, how)
    if room < 1:
        raise ValueError(f"a row of {how.length} tokens has no room for a source beside a target "
                         f"of {how.target_length}; raise the length")
    if not isinstance(model, GPT) and how.target_length > model.config.max_length:
        raise ValueError(f"target_length is {how.target_length}, and the model has "
                         f"{model.config.max_length} positions; lower it")
    if isinstance(model, GPT) and tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end-of-text token to part source and target; give "
                         "a GPT whose tokenizer has one")

    def items(examples: Sequence[dict]) -> list[dict]:
        sides = [tokenizer.encode_batch([e[side] for e in examples])
                 for side in ("source", "target")]
        return [{"source": s, "target": t} for s, t in zip(*sides)]

    if isinstance(model, GPT):
        prepare = functools.partial(causal_lm.prepare_continuation, eos_id=tokenizer.eos_id,
                                    delimiter_id=tokenizer.eos_id)

        def lengths(found):
            return [len(e["source"]) + len(e["target"]) + 2 for e in found]
    else:
        c = model.config
        bos = tokenizer.cls_id if isinstance(model, BART) else None
        start = next(i for i in (c.decoder_start_token_id, c.bos_token_id, tokenizer.sep_id)
                     if i is not None)  # as `generate` begins
        prepare = functools.partial(
            seq2seq.prepare, start_id=start, bos_id=bos,
            eos_id=tokenizer.sep_id, pad_id=tokenizer.pad_id, target_length=how.target_length)

        def lengths(found):
            return [len(e["source"]) + 2 for e in found]

    def make_row(item: dict, length: int) -> dict:
        return prepare(item, **{"length" if isinstance(model, GPT) else "source_length": length})

    def report(found: Predictions) -> tuple[dict, list[dict]]:
        written = list(found["texts"])
        references = [e["target"] for e in data.validation]
        if data.metric == "bleu":
            bleu = metrics.bleu(written, references)
            scores = {"bleu": bleu.score, "signature": bleu.signature}
        else:
            rouge = metrics.rouge(written, references)
            scores = {"rouge": rouge["rougeL"], **rouge}
        lines = [{"id": e.get("id", i), "prediction": text, "target": e["target"]}
                 for i, (e, text) in enumerate(zip(data.validation, written))]
        return scores, lines

    return Task(data, items(data.train), items(data.validation), lengths, make_row, report)


def _room(model: Model, how: Reading) -> int:
    """Tokens of a source: a causal model's row holds the target too."""
    return how.length - (how.target_length if isinstance(model, GPT) else 2)


def write(model: Model, params: dict, tokenizer, task: Task, how: Reading,
          batch_size: int = 16) -> Predictions:
    """A text for every validation item."""
    causal, room = isinstance(model, GPT), _room(model, how)
    front = [tokenizer.cls_id] if isinstance(model, BART) else []
    end = [tokenizer.eos_id if causal else tokenizer.sep_id]
    if causal and "prompt" in params:
        params = peft.fold_prompt(model, params)  # a cache has no place for it
    rows = [[*front, *item["source"][:room], *end] for item in task.validation]
    order = np.argsort([len(row) for row in rows], kind="stable")
    texts: dict[int, str] = {}
    params = transpose_kernels_for_decoding(model, params)
    for k in range(0, len(order), batch_size):
        members = [int(i) for i in order[k : k + batch_size]]
        # The last batch is filled up, so that its shape is compiled already.
        batch = [rows[i] for i in members] + [rows[members[-1]]] * (batch_size - len(members))
        found = generate(model, params, batch, max_new_tokens=how.target_length - 1,
                         num_beams=how.num_beams, eos_token_id=end[0])
        start = max(map(len, batch)) if causal else 0
        for i, row in zip(members, found):
            texts[i] = tokenizer.decode(row[start:]).strip()
    return {"texts": np.array([texts[i] for i in range(len(rows))], dtype=object)}
