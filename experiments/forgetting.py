"""What a fine-tuned model forgot: its held-out pre-training loss, under the pre-trained heads."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from settings import Pretrain

from transformer_jax.data import packing, sources
from transformer_jax.models import BERT, Model
from transformer_jax.objectives import contrastive
from transformer_jax.pretrained.runs import is_run
from transformer_jax.train import step
from transformer_jax.tree import flatten_paths

LOSSES = common.LOSSES | {"contrastive": contrastive.loss}
OBJECTIVES = {"GPT": "causal_lm", "BERT": "mlm_nsp", "BART": "denoising",
              "Transformer": "denoising"}


class Memory(NamedTuple):
    """What is measured: an objective on batches that the base was not trained on."""

    model: Model
    base: dict
    objective: str
    batches: list[dict]

    def loss(self, finetuned: dict) -> float:
        """The loss of fine-tuned parameters where the pre-trained model has them, deltas included;
        of the base itself for {}."""
        merged = _put(self.base, finetuned)
        return step.evaluate(_eval_step(self.model, self.objective), merged, self.batches)["loss"]


def _put(base: dict, finetuned: dict) -> dict:
    """The pre-trained heads on the fine-tuned body."""
    return {**base, **{name: value for name, value in finetuned.items()
                       if name in base or name == "prompt"}}


@functools.cache
def _eval_step(model: Model, objective: str) -> Callable:
    return step.make_eval_step(functools.partial(LOSSES[objective], model.apply))


def measure(source: str | Path, base: common.LoadedRun, rows: int = 256,
            text: str = "python_docs/documents") -> Memory:
    """The memory of a run on what it held out, or of a checkpoint on some `text`.

    A checkpoint without the head of masked words is taken for a sentence encoder: it has to find
    the sentence that follows, among those of the batch.
    """
    batch_size = 32
    if is_run(source):
        objective = OBJECTIVES[type(base.model).__name__]
        batches = common.held_out_batches(Path(source), base.tokenizer, batch_size)
        return Memory(base.model, base.params, objective, batches[: max(rows // batch_size, 1)])
    objective = OBJECTIVES[type(base.model).__name__]
    if isinstance(base.model, BERT) and not any(
            path.startswith("mlm_head/") for path in flatten_paths(base.params)):
        objective = "contrastive"
    texts = (sources.text_files(text) if sources.is_local(text)
             else sources.load_source(text, "validation"))
    split = (_sentence_pairs(texts, base) if objective == "contrastive" else
             common.objective_rows(_settings(base, objective), texts, base.tokenizer))
    return Memory(base.model, base.params, objective,
                  split.evaluation(batch_size, limit=max(rows // batch_size, 1)))


def _settings(base: common.LoadedRun, objective: str) -> Pretrain:
    length = min(128, base.model.config.max_length)
    return Pretrain(model=base.model.config, objective=objective, tokenizer="", length=length,
                    batch_size=32, num_steps=1, out=Path())


def _sentence_pairs(texts, base: common.LoadedRun) -> common.Split:
    t, length = base.tokenizer, 64
    pairs = [{"tokens": a, "tokens_b": b}
             for i in range(len(texts)) for a, b in _neighbours(texts[i]["text"], t)]
    # Others in the batch should be of other documents.
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    transform = functools.partial(contrastive.prepare, length=length, cls_id=t.cls_id,
                                  sep_id=t.sep_id, pad_id=t.pad_id)
    return common.Split(pairs, transform, length)


def _neighbours(text: str, tokenizer):
    """Sentences of a document two by two, each in one pair only."""
    lines = packing.split_sentences(text)
    ids = tokenizer.encode_batch(lines)
    return [(a, b) for a, b in zip(ids[::2], ids[1::2]) if len(a) > 3 and len(b) > 3]
