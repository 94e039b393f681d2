"""Measurement of catastrophic forgetting: the pre-training loss before and after fine-tuning."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformer_jax.data import packing, sources
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import BERT, Model, config_from_dict
from transformer_jax.objectives import contrastive
from transformer_jax.objectives.seq2seq import Noise
from transformer_jax.pretrained import LoadedRun, is_run
from transformer_jax.recipes import pretraining, run_dir
from transformer_jax.train import step
from transformer_jax.tree import flatten_paths

LOSSES = pretraining.LOSSES | {"contrastive": contrastive.loss}
OBJECTIVES = {"GPT": "causal_lm", "BERT": "mlm_nsp", "BART": "denoising",
              "Transformer": "denoising"}
"""Class name of a model -> its pre-training objective."""
BATCH_SIZE = 32


class RetentionEval(NamedTuple):
    """Evaluation of a pre-training objective on fixed rows.

    The fine-tuned body is evaluated with the pre-trained heads. The increase of the loss, compared
    with that of the pre-trained parameters, measures forgetting.
    """

    model: Model
    params: dict  # pre-trained
    objective: str
    batches: list[dict]

    def metrics(self, finetuned: dict | None = None) -> dict[str, float]:
        """Returns the "loss" in nats and the metrics of the objective.

        They are those of fine-tuned parameters, including PEFT parameters, if given, and else those
        of the pre-trained parameters.
        """
        params = {**self.params, **{name: value for name, value in (finetuned or {}).items()
                                    if name in self.params or name == "prompt"}}
        return step.evaluate(_make_eval_step(self.model, self.objective), params, self.batches)

    def loss(self, finetuned: dict | None = None) -> float:
        """Returns the loss in nats; see `metrics`."""
        return self.metrics(finetuned)["loss"]


@functools.cache
def _make_eval_step(model: Model, objective: str) -> Callable:
    return step.make_eval_step(functools.partial(LOSSES[objective], model.apply))


def make_retention_eval(
    source: str | Path | tuple, base: LoadedRun, data: str = "python_docs/documents",
    num_rows: int = 256,
) -> RetentionEval:
    """Returns the evaluation of a model, `base`, that was loaded from `source`, on its objective.

    A pre-training run of this library is evaluated on its held-out rows, and any other model on
    `data`, a text file or folder, or the name of a text dataset. A BERT without a
    masked-language-model head is treated as a sentence encoder, whose objective is to identify the
    next sentence among those of the batch (`objectives.contrastive`).
    """
    if isinstance(source, (str, Path)) and is_run(source) and (
            # A run of `pretrain`, whose rows can be made again.
            {"objective", "document_separator"} <= run_dir.load_results(source)["config"].keys()):
        batches = held_out_batches(source, base.tokenizer, BATCH_SIZE)
        return RetentionEval(base.model, base.params, OBJECTIVES[type(base.model).__name__],
                             batches[: max(num_rows // BATCH_SIZE, 1)])
    return make_text_eval(base, data, num_rows)


def make_text_eval(
    base: LoadedRun, data: str | Path | Sequence[dict], num_rows: int
) -> RetentionEval:
    """Returns the evaluation on rows of at most 128 tokens of a text (64 for sentence encoders)."""
    config = base.model.config
    objective = OBJECTIVES[type(base.model).__name__]
    if isinstance(base.model, BERT) and not any(
            path.startswith("mlm_head/") for path in flatten_paths(base.params)):
        objective = "contrastive"
    if not isinstance(data, (str, Path)):
        texts = data
    elif sources.is_local(str(data)):
        texts = sources.load_text_files(data)
    else:
        texts = sources.load_source(str(data), "validation")
    if objective == "contrastive":
        rows = _sentence_pairs(texts, base.tokenizer, min(64, config.max_length))
    else:
        rows = pretraining.make_objective_rows(pretraining.PretrainConfig(
            model=config, objective=objective, tokenizer="", max_length=min(128, config.max_length),
            batch_size=BATCH_SIZE, num_steps=1, out=Path()), texts, base.tokenizer)
    return RetentionEval(base.model, base.params, objective,
                         rows.evaluation_batches(BATCH_SIZE, max(num_rows // BATCH_SIZE, 1)))


def held_out_batches(
    folder: str | Path, tokenizer: Tokenizer, batch_size: int = 64
) -> list[dict]:
    """Returns the held-out rows of a pre-training run, with the same masks as during that run."""
    saved = run_dir.load_results(folder)["config"]
    saved["model"] = config_from_dict(saved["model"])
    saved["noise"] = Noise(**saved["noise"])
    # Fields that the saved config does not have are newer; their defaults do not change the rows.
    names = {f.name for f in dataclasses.fields(pretraining.PretrainConfig)} - {
        "optimizer", "mesh", "out", "anomaly_policy", "tokenized_cache_dir"}
    config = pretraining.PretrainConfig(
        out=Path(folder), **{name: saved[name] for name in names & saved.keys()})
    texts = pretraining.load_texts(config)[1]
    return pretraining.make_objective_rows(config, texts, tokenizer).evaluation_batches(batch_size)


def _sentence_pairs(
    texts: Sequence[dict], tokenizer: Tokenizer, length: int
) -> pretraining.ObjectiveRows:
    """Returns pairs of consecutive sentences, as rows of the contrastive objective."""
    def consecutive(text: str) -> Iterator[tuple]:
        """Yields the ids of sentences 1 and 2, 3 and 4, ..., if both have more than 3 tokens."""
        ids = tokenizer.encode_batch(packing.split_sentences(text))
        return ((a, b) for a, b in zip(ids[::2], ids[1::2]) if len(a) > 3 and len(b) > 3)

    pairs = [{"tokens": a, "tokens_b": b} for i in range(len(texts))
             for a, b in consecutive(texts[i]["text"])]
    # Shuffled, so that the pairs of a batch come from different documents.
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    transform = functools.partial(
        contrastive.prepare, length=length, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id)
    return pretraining.ObjectiveRows(pairs, transform)
