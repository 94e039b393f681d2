"""All flags of `pretrain` and `finetune`: the recipe configs with tyro annotations."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from transformer_jax.cli.command import PROGRAM, parse_arguments
from transformer_jax.recipes.config import DatasetConfig, TrainingConfig
from transformer_jax.recipes.finetuning import FinetuneConfig, finetune_config
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain_config


def parse_pretrain_flags(
    preset: str, given: Mapping[str, Any], arguments: Sequence[str]
) -> PretrainConfig:
    """Returns the config of a pre-training run.

    Rows have the model's max_length, unless `given` has a max_length.

    Args:
        preset: name of a model preset.
        given: fields of `PretrainConfig`.
        arguments: flags of further fields, such as `["--model.num-layers", "2"]`.

    Raises:
        ValueError: an unknown preset or flag, or a value that is out of range.

    Example:
        >>> config = parse_pretrain_flags(
        ...     "bert_tiny", {"num_steps": 50}, ["--model.max-length", "32"])
        >>> config.objective, config.max_length, config.optimizer.warmup_steps
        ('mlm_nsp', 32, 5)
    """
    config = parse_arguments(
        PretrainConfig, arguments, default=pretrain_config(preset, **given),
        prog=f"{PROGRAM} pretrain {preset}")
    if "max_length" in given:
        return config
    return dataclasses.replace(config, max_length=config.model.max_length)


@dataclass(frozen=True, kw_only=True)
class FinetuneFlags(FinetuneConfig):
    """`FinetuneConfig` whose flags for the data set and the training have no prefix."""

    trainable: Annotated[str, tyro.conf.arg(aliases=("--train",))] = "full"
    dataset: Annotated[DatasetConfig, tyro.conf.arg(name="")] = field(
        default_factory=DatasetConfig)
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(
        default_factory=TrainingConfig)


def parse_finetune_flags(
    pretrained: str, given: Mapping[str, Any], arguments: Sequence[str]
) -> FinetuneConfig:
    """Returns the config of a fine-tuning run.

    Args:
        pretrained: the pre-trained model; see `FinetuneConfig`.
        given: options of `recipes.finetune_config`.
        arguments: flags of further options, such as `["--stride", "64"]`.

    Raises:
        ValueError: an unknown flag, or a value that is out of range.

    Example:
        >>> config = parse_finetune_flags(
        ...     "gpt2", {"peak_lr": 1e-4}, ["--optimizer.schedule", "cosine", "--stride", "64"])
        >>> config.training.optimizer.peak_lr, config.training.stride
        (0.0001, 64)
    """
    config = finetune_config(pretrained, **given)
    default = FinetuneFlags(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    return parse_arguments(FinetuneFlags, arguments, default=default, prog=f"{PROGRAM} finetune")
