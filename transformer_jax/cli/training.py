"""Commands that train models: `pretrain` and `finetune`.

The common flags are parameters of the functions. All other flags are fields of the recipe's config;
they are passed as the parameter `flags` and parsed here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from transformer_jax.cli.command import PROGRAM, given, optional, parse_arguments

if TYPE_CHECKING:
    from transformer_jax.recipes.finetuning import FinetuneConfig
    from transformer_jax.recipes.pretraining import PretrainConfig

Flags = tyro.conf.Suppress[tuple[str, ...]]


def pretrain(
    preset: Annotated[str, tyro.conf.Positional,
                      tyro.conf.arg(metavar="PRESET", help_behavior_hint="(required)")] = "",
    /,
    data: str = "python_docs/documents",
    out: Annotated[Path | None, optional("PATH", "runs/PRESET")] = None,
    objective: Annotated[Literal["causal_lm", "mlm_nsp", "denoising"] | None,
                         optional("{causal_lm,mlm_nsp,denoising}", "by model family")] = None,
    tokenizer: Annotated[str | None, optional("STR", "by model family")] = None,
    num_steps: int = 10_000,
    batch_size: int = 32,
    max_length: Annotated[int | None, optional("INT", "that of the model")] = None,
    seed: int = 0,
    flags: Flags = (),
) -> None:
    """Pre-trains GPT, BERT, BART or the Transformer on plain text.

        transformer-jax pretrain bert_tiny --data corpus.txt --out runs/bert --num-steps 1000

    The same command resumes an interrupted run. --help-all lists all flags, such as those of the
    model (--model.num-layers), the optimizer (--optimizer.peak-lr) and the mesh (--mesh.fsdp).

    Args:
        preset: model preset: gpt1, gpt2, gpt2_medium, gpt2_large, gpt2_xl, bert_tiny, bert_mini,
            bert_small, bert_medium, bert_base, bert_large, bart_base, bart_large, transformer_base
            or transformer_big.
        data: plain text: python_docs/documents, tfds:NAME, hf:NAME, or a file or folder.
        out: folder of the run.
        objective: pre-training objective.
        tokenizer: bpe, wordpiece or chars, trained on the text; or the folder of a saved tokenizer.
        num_steps: number of updates.
        batch_size: rows per step, over all devices.
        max_length: tokens per row.
        seed: random seed of initialization, data order, masking and dropout.
        flags: further flags.
    """
    if not preset and "--help" not in flags:
        from transformer_jax.models.presets import PRESETS

        raise ValueError(f"PRESET is missing; choose one of {', '.join(PRESETS)}")
    from transformer_jax.recipes import pretrain as run_pretraining
    from transformer_jax.recipes.run_dir import setup

    config = parse_pretrain_flags(preset or "gpt2", given(
        data=data, out=out, objective=objective, tokenizer=tokenizer, num_steps=num_steps,
        batch_size=batch_size, max_length=max_length, seed=seed), flags)
    setup()
    run_pretraining(config)


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Flags of the training.

    Attributes:
        epochs: number of epochs; overrides --num-steps.
        num_steps: number of updates.
        batch_size: rows per step, over all devices.
        max_length: maximum number of tokens per row.
        peak_lr: learning rate at the end of warm-up.
    """

    epochs: Annotated[float | None, optional("FLOAT")] = None
    num_steps: int = 100
    batch_size: int = 16
    max_length: int = 64
    peak_lr: Annotated[float, tyro.conf.arg(name="optimizer.peak-lr")] = 1e-3


def finetune(
    pretrained: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = "",
    data: str = "python_docs/topics",
    validation: Annotated[str | None, optional("STR")] = None,
    columns: Annotated[dict[str, str] | None, optional("FIELD COLUMN ...")] = None,
    trainable: Annotated[str, tyro.conf.arg(aliases=("--train",))] = "full",
    training: Annotated[TrainingFlags, tyro.conf.arg(name="")] = TrainingFlags(),
    seed: int = 0,
    out: Annotated[Path | None,
                   tyro.conf.arg(metavar="PATH", help_behavior_hint="(required)")] = None,
    flags: Flags = (),
) -> None:
    """Fine-tunes a copy of a pre-trained model on labeled data and evaluates it.

        transformer-jax finetune --pretrained runs/gpt --data train.tsv --validation dev.tsv
            --columns text sentence label label --trainable lora:8 --epochs 3 --out runs/topics

    The task type is inferred from the columns: classification, regression, multiple_choice,
    token_classification, question_answering or seq2seq. --help-all lists all flags.

    Args:
        pretrained: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        data: labeled data: python_docs/topics, tfds:NAME, hf:NAME, a .tsv, .csv or .jsonl file, or
            a folder.
        validation: file or split to evaluate on.
        columns: pairs of an example field (text, text_b, label, choices, words, tags, question,
            context, answers, source or target) and its column in the data.
        trainable: parameters to train: full, head, last_k:LAYERS, bitfit, lora:RANK,
            lora:RANK:dora, ia3, adapter:WIDTH, prefix:LENGTH, ..., joined by "+".
        training: flags of the training.
        seed: random seed of new parameters, data order and dropout.
        out: folder of the run.
        flags: further flags.
    """
    if "--help" not in flags:
        for name, value in {"--pretrained": pretrained, "--out": out}.items():
            if not value:
                raise ValueError(f"{name} is missing; see the example in `transformer-jax finetune "
                                 "--help`")
    from transformer_jax.recipes import finetune as run_finetuning
    from transformer_jax.recipes.run_dir import setup

    config = parse_finetune_flags(pretrained, given(
        data=data, validation=validation, columns=columns, trainable=trainable, **vars(training),
        seed=seed, out=out), flags)
    setup()
    run_finetuning(config)


# All flags ----------------------------------------------------------------------------------------


def parse_pretrain_flags(
    preset: str, given: Mapping[str, Any], arguments: Sequence[str]
) -> "PretrainConfig":
    """Returns the config of a pre-training run; rows have the model's max_length by default.

    Example:
        >>> config = parse_pretrain_flags(
        ...     "bert_tiny", {"num_steps": 50}, ["--model.max-length", "32"])
        >>> config.objective, config.max_length, config.optimizer.warmup_steps
        ('mlm_nsp', 32, 5)
    """
    from transformer_jax.recipes.pretraining import PretrainConfig, pretrain_config

    config = parse_arguments(
        PretrainConfig, arguments, default=pretrain_config(preset, **given),
        prog=f"{PROGRAM} pretrain {preset}")
    if "max_length" in given:
        return config
    return dataclasses.replace(config, max_length=config.model.max_length)


def parse_finetune_flags(
    pretrained: str, given: Mapping[str, Any], arguments: Sequence[str]
) -> "FinetuneConfig":
    """Returns the config of a fine-tuning run; flags of the data and the training have no prefix.

    Example:
        >>> config = parse_finetune_flags(
        ...     "gpt2", {"peak_lr": 1e-4}, ["--optimizer.schedule", "cosine", "--stride", "64"])
        >>> config.training.optimizer.peak_lr, config.training.stride
        (0.0001, 64)
    """
    from transformer_jax.recipes.config import DatasetConfig, TrainingConfig
    from transformer_jax.recipes.finetuning import FinetuneConfig, finetune_config

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FinetuneFlags(FinetuneConfig):
        trainable: Annotated[str, tyro.conf.arg(aliases=("--train",))] = "full"
        dataset: Annotated[DatasetConfig, tyro.conf.arg(name="")] = dataclasses.field(
            default_factory=DatasetConfig)
        training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = dataclasses.field(
            default_factory=TrainingConfig)

    config = finetune_config(pretrained, **given)
    default = FinetuneFlags(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    return parse_arguments(FinetuneFlags, arguments, default=default, prog=f"{PROGRAM} finetune")
