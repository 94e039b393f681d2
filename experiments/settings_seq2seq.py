"""Settings of runs from sources to targets: translation, summarization, denoising before them."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from settings import Mesh, Optimizer, Pretrain

from transformer_jax.models.config import TransformerConfig
from transformer_jax.train import anomalies


@dataclass(frozen=True)
class Translate:
    """One run from sources to targets: translation, or summarization.

    Attributes:
        data: a folder with aligned files (train.de, train.en, val.de, ...), a .jsonl, .tsv or .csv
            file in it for each split, tfds:name or hf:name.
        source, target: endings of the files, or names of the columns.
        tokenizer: "bpe" or "unigram", trained on both sides together with the model's vocab_size;
            or a folder with a tokenizer.
        buckets: lengths that batches are padded to; each is compiled once.
        tokens_per_batch: rows times length, at most, over all devices.
        average: how many of the last checkpoints are averaged into the result; they are saved
            every `save_every` steps.
        num_beams, length_penalty: of the beam search.
        max_new_tokens: of a translation.
        eval_pairs: how many pairs of the held-out split are translated; all if not given.
        allow_config_mismatch, policy: as in `Pretrain`.
    """

    model: tyro.conf.AvoidSubcommands[TransformerConfig]
    source: str
    target: str
    num_steps: int
    out: Path
    data: str
    tokenizer: str = "bpe"
    train_split: str = "train"
    held_out_split: str = "val"
    buckets: tuple[int, ...] = (16, 32, 64)
    tokens_per_batch: int = 4096
    label_smoothing: float = 0.1
    accumulate: int = 1
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(
        schedule="inverse_sqrt", warmup_steps=1000, weight_decay=0.0, b2=0.98, eps=1e-9))
    mesh: Mesh = field(default_factory=Mesh)
    average: int = 5
    num_beams: int = 5
    length_penalty: float = 0.6
    max_new_tokens: int = 64
    eval_pairs: int | None = None
    eval_every: int = 250
    save_every: int = 250
    log_every: int = 50
    seed: int = 0
    allow_config_mismatch: bool = False
    policy: anomalies.AnomalyPolicy = anomalies.STOP


@dataclass(frozen=True)
class Pairs:
    """How a pre-trained encoder-decoder is fine-tuned from sources to targets.

    Attributes:
        data, source, target, train_split, held_out_split: as in `Translate`.
        source_length, target_length: tokens a row, special ones included; what is longer is cut.
        num_beams, length_penalty, no_repeat_ngram_size: of the search for the best target.
        eval_pairs: how many pairs of the held-out split get a target written; all if not given.
        allow_config_mismatch, policy: as in `Pretrain`.
    """

    source: str
    target: str
    num_steps: int
    data: str
    train_split: str = "train"
    held_out_split: str = "dev"
    source_length: int = 192
    target_length: int = 64
    batch_size: int = 16
    label_smoothing: float = 0.1
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(schedule="linear", b2=0.98))
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    eval_pairs: int | None = None
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 50
    seed: int = 0
    allow_config_mismatch: bool = False
    policy: anomalies.AnomalyPolicy = anomalies.STOP


@dataclass(frozen=True)
class Denoise:
    """Pre-training by denoising, then fine-tuning on pairs, with it and without.

    Attributes:
        pretrain: the first stage. Its model and mesh serve the second too, and so does its
            tokenizer, which is trained on the text and the pairs together; its `out` is
            `<out>/pretraining`.
        finetune: the second stage.
    """

    pretrain: Pretrain
    finetune: Pairs
    out: Path
