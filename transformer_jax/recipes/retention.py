"""Measurement of catastrophic forgetting: the pre-training loss before and after fine-tuning.

The fine-tuned body is evaluated with the pre-trained heads, on the held-out rows of the
pre-training run or on a given text. The increase of the loss measures forgetting.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformer_jax.data import packing, sources
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import BERT, Model, config_from_dict
from transformer_jax.models.config import Config
from transformer_jax.objectives import contrastive
from transformer_jax.objectives.seq2seq import Noise
from transformer_jax.pretrained import LoadedRun, is_run
from transformer_jax.recipes import corpus, run_dir
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.train import step
from transformer_jax.tree import flatten_paths

LOSSES = corpus.LOSSES | {"contrastive": contrastive.loss}
OBJECTIVES = {"GPT": "causal_lm", "BERT": "mlm_nsp", "BART": "denoising",
              "Transformer": "denoising"}
"""Class name of a model -> its pre-training objective."""
BATCH_SIZE = 32


class RetentionEval(NamedTuple):
    """Evaluation of a pre-training objective on fixed rows.

    Attributes:
        model: the model with its pre-trained heads.
        params: its pre-trained parameters.
        objective: name of the objective.
        batches: batches to evaluate on.
    """

    model: Model
    params: dict
    objective: str
    batches: list[dict]

    def metrics(self, finetuned: dict | None = None) -> dict[str, float]:
        """Returns the "loss" in nats and the metrics of the objective.

        Args:
            finetuned: fine-tuned parameters, including PEFT parameters, which are evaluated with
                the pre-trained heads; None evaluates the pre-trained parameters.
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
    """Returns the evaluation of a pre-trained model on its objective.

    A pre-training run of this library is evaluated on its held-out rows, and any other model on
    `data`. A BERT without a masked-language-model head is treated as a sentence encoder, whose
    objective is to identify the next sentence among those of the batch (`objectives.contrastive`).

    Args:
        source: a run's folder, a checkpoint, or a loaded model.
        base: the model that was loaded from `source`.
        data: text file or folder, or name of a text dataset; unused if `source` is a
            pre-training run.
        num_rows: number of rows to evaluate on.

    Raises:
        FileNotFoundError: the text does not exist.
    """
    if isinstance(source, (str, Path)) and is_run(source) and _is_pretraining_run(source):
        batches = held_out_batches(Path(source), base.tokenizer, BATCH_SIZE)
        return RetentionEval(base.model, base.params, OBJECTIVES[type(base.model).__name__],
                             batches[: max(num_rows // BATCH_SIZE, 1)])
    return make_text_eval(base, data, num_rows)


def make_text_eval(
    base: LoadedRun, data: str | Path | Sequence[dict], num_rows: int = 256
) -> RetentionEval:
    """Returns the evaluation of a pre-trained model on its objective, for a given text.

    Args:
        base: the model.
        data: text file or folder, name of a text dataset, or a sequence of `{"text": str}`.
        num_rows: number of rows to evaluate on.

    Raises:
        FileNotFoundError: the text does not exist.
    """
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
    rows = (_sentence_pairs(texts, base.tokenizer, min(64, base.model.config.max_length))
            if objective == "contrastive" else corpus.make_objective_rows(
                rows_config(base.model.config, objective), texts, base.tokenizer))
    return RetentionEval(base.model, base.params, objective,
                         rows.evaluation_batches(BATCH_SIZE, max(num_rows // BATCH_SIZE, 1)))


def held_out_batches(
    folder: str | Path, tokenizer: Tokenizer, batch_size: int = 64
) -> list[dict]:
    """Returns the held-out rows of a pre-training run, with the same masks as during that run.

    Raises:
        FileNotFoundError: the run is incomplete, or its data does not exist.
    """
    saved = run_dir.load_results(folder)["config"]
    saved["model"] = config_from_dict(saved["model"])
    saved["noise"] = Noise(**saved["noise"])
    # Fields that the saved config does not have are newer; their defaults do not change the rows.
    names = {f.name for f in dataclasses.fields(PretrainConfig)} - {
        "optimizer", "mesh", "out", "anomaly_policy", "tokenized_cache_dir"}
    config = PretrainConfig(
        out=Path(folder), **{name: saved[name] for name in names & saved.keys()})
    return corpus.make_objective_rows(
        config, corpus.load_texts(config)[1], tokenizer).evaluation_batches(batch_size)


def _is_pretraining_run(folder: str | Path) -> bool:
    """Returns whether a finished run is one of `recipes.pretrain`, whose rows can be made again."""
    return {"objective", "document_separator"} <= run_dir.load_results(folder)["config"].keys()


def rows_config(model: Config, objective: str) -> PretrainConfig:
    """Returns settings for `corpus.make_objective_rows`: rows of at most 128 tokens."""
    return PretrainConfig(
        model=model, objective=objective, tokenizer="", max_length=min(128, model.max_length),
        batch_size=BATCH_SIZE, num_steps=1, out=Path())


def _sentence_pairs(
    texts: Sequence[dict], tokenizer: Tokenizer, length: int
) -> corpus.ObjectiveRows:
    """Returns pairs of consecutive sentences, as rows of the contrastive objective."""
    pairs = [{"tokens": a, "tokens_b": b} for i in range(len(texts))
             for a, b in _consecutive_sentences(texts[i]["text"], tokenizer)]
    # Shuffled, so that the pairs of a batch come from different documents.
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    transform = functools.partial(
        contrastive.prepare, length=length, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id)
    return corpus.ObjectiveRows(pairs, transform, length)


def _consecutive_sentences(text: str, tokenizer: Tokenizer) -> Iterator[tuple]:
    """Yields the ids of sentences 1 and 2, 3 and 4, ..., if both have more than three tokens."""
    ids = tokenizer.encode_batch(packing.split_sentences(text))
    return ((a, b) for a, b in zip(ids[::2], ids[1::2]) if len(a) > 3 and len(b) > 3)
