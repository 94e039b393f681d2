"""The settings of a run, as `experiments/configs` fills them in and flags change them."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import supervised
import tyro

from transformer_jax import data as sets
from transformer_jax import sharding
from transformer_jax.models.config import Config
from transformer_jax.objectives.denoising import Noise
from transformer_jax.objectives.mlm_nsp import MASK_RATE
from transformer_jax.train import anomalies, optimizers


@dataclass(frozen=True)
class Mesh:
    """Devices by axis (`transformer_jax.sharding`); -1 takes the rest."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def make(self):
        return sharding.make_mesh(self.data, self.fsdp, self.sequence, self.tensor)


@dataclass(frozen=True)
class Optimizer:
    """AdamW under a schedule with warm-up."""

    schedule: str = "cosine"
    peak_lr: float = 1e-3
    end: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.01
    b2: float = 0.999
    eps: float = 1e-6
    clip_norm: float | None = 1.0

    def make(self, num_steps: int):
        schedule = optimizers.make_schedule(self.schedule, self.peak_lr, num_steps, self.warmup_steps,
                                       self.end)
        return optimizers.make_optimizer(schedule, weight_decay=self.weight_decay, b2=self.b2,
                                    eps=self.eps, clip_norm=self.clip_norm)


@dataclass(frozen=True)
class FinetuneOptimizer(Optimizer):
    """AdamW for a pre-trained model: what trains faster, later, or stays near where it began.

    Attributes:
        warmup_share: of the steps; in the place of warmup_steps.
        layer_decay: each layer's rate is this times that of the layer above it.
        head_lr_multiplier: factor of the rate of new heads.
        unfreeze_every: release a layer every so many steps, from the top down.
        l2_sp: strength of the pull toward the pre-trained point, in the place of weight decay.
        ema: decay of the average of what trains, which is evaluated and kept in its place.
    """

    schedule: str = "linear"
    warmup_share: float | None = 0.1
    layer_decay: float | None = None
    head_lr_multiplier: float = 1.0
    unfreeze_every: int | None = None
    l2_sp: float | None = None
    ema: float | None = None

    def make(self, num_steps: int):
        warmup = (self.warmup_steps if self.warmup_share is None
                  else int(self.warmup_share * num_steps))
        schedule = optimizers.make_schedule(self.schedule, self.peak_lr, num_steps, warmup, self.end)
        return optimizers.make_optimizer(
            schedule, weight_decay=self.weight_decay, b2=self.b2, eps=self.eps,
            clip_norm=self.clip_norm, layer_decay=self.layer_decay, head_lr_multiplier=self.head_lr_multiplier,
            unfreeze_every=self.unfreeze_every, l2_sp=self.l2_sp, ema=self.ema)


@dataclass(frozen=True)
class Data:
    """An annotated set.

    Attributes:
        data: tfds:NAME, hf:NAME, python_docs/topics, a .tsv, .csv or .jsonl file, or a folder with
            a file of each split.
        validation: the file, or the name of the split, to evaluate on.
        kind: classification, regression, multiple_choice, token_classification,
            question_answering or seq2seq; told by the columns if not given.
        columns: what the columns are: `--columns text sentence label label`; several as "a+b",
            joined for a text, one for each of the choices.
        header: names of columns of files without a header line; validation_header if the file to
            evaluate on has others.
        label_names: in order, where the data does not name its classes.
        like: the named set whose columns this one has.
        metric: what the table shows: of classes accuracy, f1, macro_f1 or matthews, of texts rouge
            or bleu.
        label_range: the least and the greatest label of a regression; those of train if not given.
        allow_empty_classes: accept a class that no training example has.
        held_out: values of the column `fold` that are evaluated on; validation_share: or the share
            of train that is.
        limit: draw at most so many examples of each split.
        on_bad: "drop" or "error" for empty texts and misplaced answers.
    """

    data: str = "python_docs/topics"
    validation: str | None = None
    kind: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    validation_header: tuple[str, ...] = ()
    label_names: dict[str, str] = field(default_factory=dict)
    validation_label_names: dict[str, str] = field(default_factory=dict)
    like: str | None = None
    metric: str | None = None
    label_range: tuple[float, float] | None = None
    allow_empty_classes: bool = False
    held_out: tuple[int, ...] = ()
    validation_share: float | None = None
    limit: int | None = None
    on_bad: str | None = None

    def load(self) -> sets.LabeledDataset:
        """The set, read and checked: `data.load_annotated`."""
        options = {name: getattr(self, name) or None for name in (
            "validation", "kind", "header", "validation_header", "label_names",
            "validation_label_names", "like", "metric", "label_range", "validation_share", "limit",
            "on_bad")}
        options["columns"] = {name: tuple(column.split("+")) if "+" in column else column
                              for name, column in self.columns.items()} or None
        options["allow_empty_classes"] = self.allow_empty_classes
        if self.data.startswith("python_docs/"):
            options["validation"] = self.validation or "test"
        if self.held_out:
            options["held_out"] = {"fold": self.held_out}
        return sets.load_dataset(self.data, **options)


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the data. Runs with equal settings and recipe share compiled steps.

    Attributes:
        length: tokens a row, at most; batches of short texts are padded to less.
        num_steps: updates; or `epochs` over the examples, but at least `min_steps`.
        frozen: float32, bfloat16 or int8, of kernels and embeddings that do not train.
        cache_features: where only the head trains, compute the body once, without dropout.
        aux_lm_loss_weight: of GPT's language-model loss beside the task's.
        new_tokens: GPT's start, delimiter and extract tokens, as in its paper.
        both_orders: read a pair in both orders (GPT).
        stride: how far a window of a long context begins after the one before.
        max_question: tokens of a question; what is longer is cut.
        target_length, num_beams: of a text to write.
        save_every: updates between checkpoints; the last only if 0.
        allow_config_mismatch: go on from a checkpoint that was saved with other settings or data.
        policy: what to do about losses that are not finite, or spike (`train.anomalies`).
    """

    length: int = 64
    batch_size: int = 16
    num_steps: int = 100
    epochs: float | None = None
    min_steps: int = 1
    optimizer: FinetuneOptimizer = field(default_factory=lambda: FinetuneOptimizer(
        peak_lr=1e-3, b2=0.99))
    frozen: str = "float32"
    cache_features: bool = True
    aux_lm_loss_weight: float = 0.0
    new_tokens: bool = False
    both_orders: bool = False
    stride: int = 128
    max_question: int = 64
    target_length: int = 64
    num_beams: int = 4
    save_every: int = 0
    allow_config_mismatch: bool = False
    policy: anomalies.AnomalyPolicy = anomalies.STOP

    def reading(self) -> supervised.Reading:
        return supervised.Reading(
            self.length, self.new_tokens, self.both_orders, self.stride, self.max_question,
            target_length=self.target_length, num_beams=self.num_beams)

    def for_examples(self, count: int) -> "Settings":
        """The same with epochs as steps."""
        if self.epochs is None:
            return self
        steps = max(math.ceil(self.epochs * count / self.batch_size), self.min_steps)
        return dataclasses.replace(self, epochs=None, num_steps=steps)


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """What is fine-tuned, and on what.

    Attributes:
        pretrained: the --out folder of a pretrain.py run; a checkpoint in the Hugging Face format:
            a folder, an id on the hub, or package:NAME/FOLDER.
        dropout_rate: of the model, if not its own.
        pooling: what BERT classifies of a text: "first", the pooled first token, its own way, or
            "mean", the mean of all tokens, for which sentence encoders were trained.
        remember: text on which forgetting of a checkpoint is measured.
    """

    pretrained: str
    out: Path
    data: Annotated[Data, tyro.conf.arg(name="")] = field(default_factory=Data)
    dropout_rate: float | None = None
    pooling: str | None = None
    remember: str = "python_docs/documents"
    settings: Settings = field(default_factory=Settings)


SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class Sweep(Downstream):
    """Recipes side by side.

    Attributes:
        recipes: what trains; "scratch" trains all of a model of the same size from new parameters.
        peak_lrs: the highest learning rate of each recipe.
        epochs: how often each recipe sees an example.
        aux_lm_loss_weights: weight of the language model's loss beside each recipe's (GPT).
        examples: how many training examples, as balanced as the classes allow; all if empty.
        seeds: runs of each cell: examples, new parameters, order and dropout.
    """

    recipes: tuple[str, ...] = ("full", "lora:8", "bitfit", "last_k:2", "head")
    peak_lrs: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    aux_lm_loss_weights: tuple[float, ...] = ()
    examples: tuple[int, ...] = ()
    seeds: int = 3
    quiet: bool = False

    def __post_init__(self):
        for name in ("peak_lrs", "epochs", "aux_lm_loss_weights"):
            given = getattr(self, name)
            if given and len(given) != len(self.recipes):
                raise ValueError(f"there are {len(given)} {name} for {len(self.recipes)} recipes; "
                                 "give one for each")

    @property
    def rows(self) -> dict[str, tuple[str, Settings]]:
        """Name of each row of the table -> its recipe and settings."""
        rows = {}
        for k, recipe in enumerate(self.recipes):
            name, settings = recipe, self.settings
            if self.peak_lrs:
                optimizer = dataclasses.replace(settings.optimizer, peak_lr=self.peak_lrs[k])
                settings = dataclasses.replace(settings, optimizer=optimizer)
            if self.epochs:
                settings = dataclasses.replace(settings, epochs=self.epochs[k])
            if self.aux_lm_loss_weights:
                name = f"{recipe}, LM loss x {self.aux_lm_loss_weights[k]:g}"
                settings = dataclasses.replace(settings, aux_lm_loss_weight=self.aux_lm_loss_weights[k])
            rows[name] = ("full" if recipe == SCRATCH else recipe, settings)
        return rows


@dataclass(frozen=True)
class Pretrain:
    """One pre-training run.

    Attributes:
        data: python_docs/documents, tfds:name, hf:name, or a text file or folder.
        unit: how files are read: "document" (blank line between, one sentence a line) or "file"
            (exactly as they stand).
        prepared: keep the tokenized corpus in this folder, or use the one that is there; texts that
            memory does not hold are then read by need, and preparing goes on where it was cut off.
        tokenizer: "bpe", "wordpiece" or "chars", trained on the training text with the model's
            vocab_size; or a folder with a tokenizer.
        length: tokens a row.
        batch_size: rows a step over all devices; accumulate splits them into microbatches.
        objective: "causal_lm", "mlm_nsp" or "denoising".
        mask_rate, whole_words: of masked words; denoising has whole_words too.
        noise: of denoising.
        sentence_end: what ends a sentence within a line, such as " . " in tokenized text, for
            denoising; lines alone if empty.
        allow_config_mismatch: go on from a checkpoint that was saved with other settings or data.
        profile: write a trace of so many steps to `<out>/trace`.
        policy: what to do about losses that are not finite, or spike (`train.anomalies`).
        replay: do this step again, from the last checkpoint before it, and print its numbers.
        scan_layers: stack the layers while training and scan over them, which compiles one in the
            place of all: for deep models on accelerators.
    """

    model: tyro.conf.AvoidSubcommands[Config]
    objective: str
    tokenizer: str
    length: int
    batch_size: int
    num_steps: int
    out: Path
    data: str = "python_docs/documents"
    prepared: Path | None = None
    unit: str = "document"
    validation_share: float = 0.1
    mask_rate: float = MASK_RATE
    whole_words: bool = False
    noise: Noise = field(default_factory=Noise)
    sentence_end: str = ""
    accumulate: int = 1
    scan_layers: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    eval_every: int = 250
    eval_batches: int | None = None
    save_every: int = 500
    log_every: int = 50
    seed: int = 0
    profile: int = 0
    allow_config_mismatch: bool = False
    policy: anomalies.AnomalyPolicy = anomalies.STOP
    replay: int | None = None
