"""One fine-tuning run: initial parameters, compiled step, training loop and evaluation.

`finetuning.finetune` adds the loading of model and data and the writing of files; `sweep` and
`quickstart` call `finetune_params` repeatedly. Runs with the same settings share compiled steps.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import tree
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.finetuning import frozen, peft, select
from transformer_jax.models import GPT, Model, config_to_dict, init_params
from transformer_jax.objectives import causal_lm, classification, seq2seq
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.base_model import include_new_modules, load_report
from transformer_jax.recipes.config import TrainingConfig
from transformer_jax.recipes.encoding import TEXT_TASK_TYPES, encode_dataset
from transformer_jax.recipes.task_encoder import EncodedDataset, cache_features, feature_batches
from transformer_jax.train import loop, step, transforms
from transformer_jax.train.callbacks import EarlyStopping, KeepBest, Logging, Progress
from transformer_jax.train.checkpointer import Checkpointer
from transformer_jax.train.run import Callback

NUM_SPECIAL_TOKENS = 3  # GPT's start, delimiter and extract tokens


class FinetunedParams(NamedTuple):
    """The result of one fine-tuning run.

    Attributes:
        params: fine-tuned parameters, PEFT parameters included.
        mask: True for trainable parameters.
        metrics: scores on the validation examples, the main metric first, and statistics of the
            run: "labels" (number of training examples), "steps", "trained" and "share_trained"
            (number and fraction of trainable parameters), "cut" and "cut_validation" (numbers of
            truncated rows), "seconds" of training, "seconds_per_step" (median); with
            `keep_best`, "best_step", the step that `params` is from; and "stopped_early", the
            reason, if the run was stopped early.
        predictions: one line of the prediction file for each validation example.
        history: history of `train.loop.fit`.
    """

    params: dict
    mask: dict
    metrics: dict[str, Any]
    predictions: list[dict]
    history: list[dict]


class FinetuneStep(NamedTuple):
    """The mask, the optimizer and the train step of a fine-tuning run."""

    mask: dict
    optimizer: Any
    train_step: Callable


def encode_for_training(
    dataset: LabeledDataset, model: Model, tokenizer: Tokenizer, training: TrainingConfig
) -> EncodedDataset:
    """Tokenizes a labeled dataset for a fine-tuning run.

    Raises:
        ValueError: the settings do not fit the model or the task; see also
            `encoding.encode_dataset`.
    """
    check_training_config(training, dataset, model)
    return encode_dataset(dataset, model, tokenizer, training.input_config())


def check_training_config(training: TrainingConfig, dataset: LabeledDataset, model: Model) -> None:
    """Checks that the settings fit the model and the task.

    Raises:
        ValueError: they do not.
    """
    if training.max_length > model.config.max_length:
        raise ValueError(f"max_length is {training.max_length}, but the model has only "
                         f"{model.config.max_length} positions; lower max_length")
    if training.aux_lm_loss_weight and not (
            isinstance(model, GPT) and dataset.task_type in TEXT_TASK_TYPES):
        raise ValueError(
            f"aux_lm_loss_weight is for GPT on {', '.join(TEXT_TASK_TYPES)}, but this is a "
            f"{type(model).__name__} on {dataset.task_type}; remove the option")
    if not training.eval_every and (training.patience is not None or training.keep_best):
        raise ValueError(f"eval_every is 0, but patience is {training.patience} and keep_best is "
                         f"{training.keep_best}, which need evaluations; set eval_every")


def init_finetune_params(
    model: Model, trainable: str, training: TrainingConfig, rng: jax.Array,
    pretrained: dict | None = None,
) -> dict:
    """Returns the parameters before the first step.

    These are the pre-trained parameters, initial values for all others, and the PEFT parameters of
    the trainable spec. Frozen kernels and embeddings have `training.frozen_dtype`.
    """
    rngs = jax.random.split(rng, 3)
    params = init_params(model, rngs[0])
    if pretrained is not None:
        params = tree.restore_partial(params, pretrained)[0]
    if training.gpt_special_tokens:
        params = peft.add_tokens(params, NUM_SPECIAL_TOKENS, rngs[1])
    params, mask = peft.add_and_mask(params, trainable, rngs[2])
    return frozen.quantize_frozen(params, mask, training.frozen_dtype)[0]


_jitted_init = functools.partial(
    jax.jit, static_argnames=("model", "trainable", "training"))(init_finetune_params)


@functools.cache
def make_finetune_step(
    model: Model, trainable: str, training: TrainingConfig, task_type: str, cached_features: bool
) -> FinetuneStep:
    """Returns the mask, optimizer and train step of a trainable spec.

    Calls with equal arguments return the same object, so that the step is compiled only once.

    Args:
        cached_features: whether the batches contain cached features instead of tokens.
    """
    init = functools.partial(init_finetune_params, model, trainable, training)
    mask = select.trainable_mask(jax.eval_shape(init, jax.random.key(0)), trainable)
    optimizer = training.optimizer.make(training.num_steps)
    apply = frozen.make_features_apply(model.apply) if cached_features else model.apply
    options = ({"aux_lm_loss_weight": training.aux_lm_loss_weight}
               if training.aux_lm_loss_weight else {})
    loss_fn = functools.partial(task_loss(model, task_type), apply, **options)
    return FinetuneStep(mask, optimizer, step.make_train_step(loss_fn, optimizer, mask))


def task_loss(model: Model, task_type: str) -> Callable:
    """Returns the loss function of a task type for a model."""
    if task_type == "seq2seq":
        return causal_lm.loss if isinstance(model, GPT) else seq2seq.loss
    return classification.TASK_TYPES[task_type].loss


def finetune_params(
    data: EncodedDataset, pretrained: dict | None, trainable: str, training: TrainingConfig,
    seed: int = 0, *, quiet: bool = False, checkpoint_dir: Path | None = None,
    mesh: Mesh | None = None,
) -> FinetunedParams:
    """Trains the parameters that the spec selects and evaluates them on all validation examples.

    Args:
        data: the dataset, encoded for the model with its task head.
        pretrained: pre-trained parameters, which are copied; None trains from scratch.
        trainable: trainable spec, such as "lora:8" (`finetuning.select`).
        training: settings of the run.
        seed: seed of new parameters, data order and dropout.
        quiet: whether to suppress the progress display and the table of trainable parameters.
        checkpoint_dir: folder of checkpoints, from which the same run resumes; None saves none.
        mesh: device mesh; None trains on the default device.

    Raises:
        ValueError: a setting is out of range, or the checkpoints belong to another run.
    """
    model, task_type = data.encoder.model, data.dataset.task_type
    training = training.with_num_steps(len(data.train))
    if pretrained is not None:
        trainable = include_new_modules(model, pretrained, trainable)
    params = _jitted_init(model, trainable, training, jax.random.key(seed), pretrained)
    total_count = tree.count(params)
    mask = select.trainable_mask(params, trainable)
    cached = (training.cache_features and frozen.is_head_only(mask)
              and task_type in TEXT_TASK_TYPES and not training.aux_lm_loss_weight)
    finetune_step = make_finetune_step(model, trainable, training, task_type, cached)
    truncated = [sum(n > training.max_length for n in data.encoder.lengths(items))
                 for items in (data.train, data.validation)]
    if not quiet:
        report = "new parameters" if pretrained is None else load_report(model, pretrained)
        print(report, select.describe(params, mask), sep="\n", flush=True)
        if any(truncated):
            print(f"{truncated[0]} of {len(data.train)} training rows and {truncated[1]} of "
                  f"{len(data.validation)} validation rows have more than {training.max_length} "
                  "tokens and are truncated", flush=True)
    began = time.perf_counter()
    metadata = None if checkpoint_dir is None else {
        "model": config_to_dict(model.config), "recipe": trainable, "seed": seed,
        **run_dir.run_metadata(training, data.train, params)}
    batches = (
        feature_batches(cache_features(params, data), training.batch_size, seed, mesh)
        if cached else data.encoder.batches(
            data.train, batch_size=training.batch_size, seed=seed, num_steps=training.num_steps,
            mesh=mesh))
    params, history, statistics = _fit(
        data, training, finetune_step, step.init_state(
            params, finetune_step.optimizer, finetune_step.mask), batches.loader(), seed, mesh,
        run_dir.make_checkpointer(
            training, metadata, checkpoint_dir, keep=2,
            keep_best=(main_metric(data.dataset), "max") if training.keep_best else None), quiet)
    seconds = time.perf_counter() - began
    scores, lines = data.evaluate(params)
    step_times = [h["seconds_per_step"] for h in history if "seconds_per_step" in h]
    trained = tree.count(tree.partition(params, finetune_step.mask)[0])
    return FinetunedParams(params, finetune_step.mask, {
        **scores, "labels": len(data.dataset.train), **statistics,
        "trained": trained, "share_trained": trained / total_count, "cut": truncated[0],
        "cut_validation": truncated[1],
        "seconds_per_step": float(np.median(step_times)) if step_times else None,
        "seconds": seconds,
    }, lines, history)


def main_metric(dataset: LabeledDataset) -> str:
    """Returns the name of the main metric in the scores; higher values are better in every task."""
    return "f1" if dataset.metric == "squad" else dataset.metric


def _fit(
    data: EncodedDataset, training: TrainingConfig, finetune_step: FinetuneStep,
    state: step.TrainState, batches: loop.Batches, seed: int, mesh: Mesh | None,
    checkpoint: Checkpointer, quiet: bool,
) -> tuple[dict, list[dict], dict[str, Any]]:
    """Runs the training loop, with evaluation, early stopping and the best parameters on request.

    Returns:
        The resulting parameters, the history, and the metrics "steps", "best_step" and
        "stopped_early".
    """
    def trained_params(state: step.TrainState) -> dict:
        average = transforms.get_ema_params(state.opt_state)
        return (tree.partition(state.params, finetune_step.mask)[0] if average is None
                else average)

    def with_frozen_params(trained: dict, state: step.TrainState) -> dict:
        return tree.combine(trained, tree.partition(state.params, finetune_step.mask)[1])

    def scores(params: dict) -> dict[str, float]:
        return {name: value for name, value in data.evaluate(params)[0].items()
                if isinstance(value, int | float)}

    callbacks: list[Callback] = [Logging(max(training.num_steps // 10, 1))]
    callbacks += [] if quiet else [Progress()]
    best = KeepBest(main_metric(data.dataset), "max", trained_params)
    if training.keep_best:
        callbacks.append(best)
    if training.patience is not None:
        callbacks.append(EarlyStopping(main_metric(data.dataset), "max", training.patience))
    evaluation = loop.Evaluation(
        scores, training.eval_every,
        lambda state: with_frozen_params(trained_params(state), state))
    state, history = loop.fit(
        state, finetune_step.train_step, batches, rng=jax.random.key(seed + 1),
        num_steps=training.num_steps, mesh=mesh, checkpoint=checkpoint,
        evaluation=evaluation if training.eval_every else None,
        anomalies=training.anomaly_policy, callbacks=callbacks)
    statistics: dict[str, Any] = {"steps": int(state.step)}
    if training.keep_best:
        statistics["best_step"] = best.step
        if not quiet and best.step is not None:
            print(f"best {best.metric} {best.value:.3f} at step {best.step}", flush=True)
    if statistics["steps"] < training.num_steps:
        statistics["stopped_early"] = callbacks[-1].reason
    return with_frozen_params(best.best(state), state), history, statistics
