"""Settings shared by several recipes: device mesh, optimizer, labeled dataset and training."""

import dataclasses
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.data.known_datasets import DatasetConfig
from transformer_jax.errors import did_you_mean
from transformer_jax.recipes.task_encoder import InputConfig
from transformer_jax.train import anomalies, optimizers

__all__ = ["DatasetConfig", "FinetuneOptimizerConfig", "MeshConfig", "OptimizerConfig",
           "TrainingConfig", "check_options", "convert_paths"]


def convert_paths(config: Any, *fields: str) -> None:
    """Converts fields of a frozen dataclass from str to Path; called by its `__post_init__`."""
    for name in fields:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))


def check_options(names: Iterable[str], known: Collection[str], job: str) -> None:
    """Raises a ValueError that suggests known options if a name is unknown."""
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown option {name!r} of {job}; {did_you_mean(name, sorted(known))}")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis (`transformer_jax.sharding`).

    Attributes:
        data: number of replicas, each for a part of the batch; -1 for all remaining devices.
        fsdp: number of devices over which each replica and its part of the batch are sharded.
        sequence: number of devices over which the tokens of a row are sharded.
        tensor: number of devices over which attention heads, MLP and vocabulary are sharded.

    Example:
        >>> MeshConfig().make().axis_names
        ('data', 'fsdp', 'sequence', 'tensor')
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def make(self) -> Mesh:
        """Returns the mesh of the devices of all processes."""
        return sharding.make_mesh(self.data, self.fsdp, self.sequence, self.tensor)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a learning-rate schedule (`train.optimizers`).

    Attributes:
        schedule: decay after warm-up: "constant", "linear", "cosine" or "inverse_sqrt".
        peak_lr: learning rate at the end of warm-up.
        end_lr: learning rate at the end of the decay, or, for "inverse_sqrt", its limit after
            infinitely many steps; unused by "constant".
        warmup_steps: number of steps of linear warm-up; less than the number of steps of the run.
        weight_decay: rate of decoupled weight decay, which applies to matrices only.
        b2: decay rate of the second-moment estimate.
        eps: constant added to the denominator of the update.
        clip_norm: maximum global norm of the gradients; None disables clipping.

    Example:
        >>> import numpy as np
        >>> optimizer = OptimizerConfig(peak_lr=1e-3, warmup_steps=10).make(num_steps=100)
        >>> opt_state = optimizer.init({"kernel": np.ones((2, 3), np.float32)})
    """

    schedule: str = "cosine"
    peak_lr: float = 1e-3
    end_lr: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.01
    b2: float = 0.999
    eps: float = 1e-6
    clip_norm: float | None = 1.0

    def make(self, num_steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a run of `num_steps` updates."""
        return self._make(num_steps, self.warmup_steps)

    def _make(self, num_steps: int, warmup_steps: int,
              finetuning: optimizers.FinetuningOptions | None = None):
        schedule = optimizers.make_schedule(
            self.schedule, self.peak_lr, num_steps, warmup_steps, self.end_lr)
        return optimizers.make_optimizer(
            schedule, weight_decay=self.weight_decay, b2=self.b2, eps=self.eps,
            clip_norm=self.clip_norm, finetuning=finetuning)


@dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with options for fine-tuning (`train.transforms`).

    Attributes:
        warmup_fraction: fraction of the steps that are warm-up; None uses `warmup_steps` instead.
        layer_decay: ratio of the learning rate of each layer to that of the layer above it.
        head_lr_multiplier: factor that multiplies the learning rate of the classifier.
        unfreeze_every: number of updates after which gradual unfreezing makes the next layer, from
            the top down, trainable; None disables gradual unfreezing.
        l2_sp: rate of weight decay toward the pre-trained parameters, which replaces decay toward
            zero for all but new parameters; None disables it.
        ema: decay rate of an exponential moving average of the trainable parameters, which is
            evaluated and returned instead of their last values.
    """

    schedule: str = "linear"
    warmup_fraction: float | None = 0.1
    layer_decay: float | None = None
    head_lr_multiplier: float = 1.0
    unfreeze_every: int | None = None
    l2_sp: float | None = None
    ema: float | None = None

    def make(self, num_steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a run of `num_steps` updates."""
        warmup_steps = (self.warmup_steps if self.warmup_fraction is None
                        else int(self.warmup_fraction * num_steps))
        return self._make(num_steps, warmup_steps, optimizers.FinetuningOptions(
            layer_decay=self.layer_decay, head_lr_multiplier=self.head_lr_multiplier,
            unfreeze_every=self.unfreeze_every, l2_sp=self.l2_sp, ema=self.ema))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is fine-tuned, independent of the data.

    Runs with the same settings and the same trainable spec share compiled steps.

    Attributes:
        max_length: maximum number of tokens of a row; batches of shorter texts have shorter rows.
        batch_size: number of rows per step, over all devices.
        num_steps: number of updates.
        epochs: number of passes over the examples; overrides `num_steps`.
        min_steps: minimum number of updates if `epochs` is given.
        optimizer: AdamW and its learning-rate schedule.
        frozen_dtype: dtype of frozen kernels and embeddings: "float32", "bfloat16" or "int8".
        cache_features: if only the head is trained, compute the outputs of the body once, without
            dropout, instead of in every epoch.
        aux_lm_loss_weight: weight of the auxiliary language-model loss (GPT paper, section 3.2).
        gpt_special_tokens: add start, delimiter and extract tokens (GPT paper, section 3.3).
        both_orders: encode each pair of texts in both orders (GPT paper, section 3.3).
        stride: distance in tokens between the starts of consecutive windows over a long context.
        max_question_length: number of tokens to which longer questions are truncated.
        target_length: maximum number of tokens of a target text; for GPT, only of a generated one.
        num_beams: number of beams of the beam search that generates target texts.
        eval_every: number of updates between evaluations; 0 evaluates the result only.
        patience: number of evaluations without a better main metric after which to stop, if given.
        keep_best: return the parameters of the evaluation with the best main metric (of equal ones,
            the last). It is chosen on the validation examples and therefore optimistic.
        save_every: number of updates between checkpoints; 0 saves at the end only.
        allow_config_mismatch: resume from a checkpoint that was saved with other settings or data.
        anomaly_policy: action on non-finite losses and on loss spikes (`train.anomalies`).
    """

    max_length: int = 64
    batch_size: int = 16
    num_steps: int = 100
    epochs: float | None = None
    min_steps: int = 1
    optimizer: FinetuneOptimizerConfig = field(
        default_factory=lambda: FinetuneOptimizerConfig(peak_lr=1e-3, b2=0.99))
    frozen_dtype: str = "float32"
    cache_features: bool = True
    aux_lm_loss_weight: float = 0.0
    gpt_special_tokens: bool = False
    both_orders: bool = False
    stride: int = 128
    max_question_length: int = 64
    target_length: int = 64
    num_beams: int = 4
    eval_every: int = 0
    patience: int | None = None
    keep_best: bool = False
    save_every: int = 0
    allow_config_mismatch: bool = False
    anomaly_policy: anomalies.AnomalyPolicy = anomalies.DEFAULT_POLICY

    def input_config(self) -> InputConfig:
        """Returns the settings for converting an example to rows of token ids."""
        return InputConfig(**{name: getattr(self, name) for name in InputConfig._fields
                              if hasattr(self, name)})

    def with_num_steps(self, num_examples: int) -> "TrainingConfig":
        """Returns a copy in which `epochs` over `num_examples` is expressed as `num_steps`.

        Example:
            >>> TrainingConfig(epochs=2, batch_size=4).with_num_steps(10).num_steps
            5
        """
        if self.epochs is None:
            return self
        num_steps = math.ceil(self.epochs * num_examples / self.batch_size)
        return dataclasses.replace(self, epochs=None, num_steps=max(num_steps, self.min_steps))
