"""One fine-tuning run: pre-trained model with a task head, compiled step, training, evaluation.

`finetuning.finetune` adds the loading of the data and the writing of files; `sweep` and
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

from transformer_jax import sharding, tree
from transformer_jax.data.batching import LengthBucketedBatches
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.finetuning import frozen, peft, select
from transformer_jax.models import GPT, Model, build_model, config_to_dict, init_params
from transformer_jax.objectives import causal_lm, classification, seq2seq
from transformer_jax.pretrained import LoadedRun, load_model
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import TrainingConfig
from transformer_jax.recipes.encoding import TEXT_TASK_TYPES, encode_dataset
from transformer_jax.recipes.task_encoder import PREDICT_BATCH_SIZE, EncodedDataset, TaskInfo
from transformer_jax.train import loop, step, transforms
from transformer_jax.train.callbacks import Callback, EarlyStopping, KeepBest, Logging, Progress
from transformer_jax.train.checkpointing import Checkpointer

Source = str | Path | tuple[Model, dict, Tokenizer] | LoadedRun
"""A run's folder, a checkpoint (a folder in the Hugging Face format, an id on the Hugging Face Hub,
or "package:NAME/FOLDER"), or a loaded (model, params, tokenizer)."""
NUM_SPECIAL_TOKENS = 3  # GPT's start, delimiter and extract tokens


def load_base(
    source: Source, *, dropout_rate: float | None = None, pooling: str | None = None
) -> LoadedRun:
    """Loads a model with its pre-trained heads, its parameters and its tokenizer.

    The options override the model's dropout rate, also that of attention weights, and the input of
    BERT's classifier: "first" for the pooled first token, "mean" for the mean over all tokens.
    """
    changes: dict[str, Any] = {} if dropout_rate is None else {
        "dropout_rate": dropout_rate, "attention_dropout_rate": dropout_rate}
    changes |= {} if pooling is None else {"pooling": pooling}
    if not isinstance(source, tuple):
        return load_model(source, **changes)
    model, params, tokenizer = source[:3]
    model = model.clone(config=model.config.replace(**changes))
    return LoadedRun(model, params, tokenizer, [])


def add_task_head(base: LoadedRun, dataset: LabeledDataset) -> tuple[Model, dict]:
    """Returns the base model with a head for the task of a dataset, and the pre-trained parameters.

    A pre-trained classifier whose shape does not match is left out of the parameters, so that a new
    one is initialized.
    """
    task_type = dataset.task_type
    head = None if task_type == "seq2seq" else classification.TASK_TYPES[task_type].task
    model = build_model(base.model.config, TaskInfo.of(dataset).num_outputs, head)
    model = model.clone(hf_config=base.model.hf_config)
    shapes = tree.flatten_paths(_initial_shapes(model))
    params = {path: leaf for path, leaf in tree.flatten_paths(base.params).items()
              if not path.startswith("classifier/")
              or (path in shapes and shapes[path].shape == leaf.shape)}
    return model, tree.unflatten_paths(params)


def load_report(model: Model, pretrained: dict) -> tree.LoadReport:
    """Returns which parameters of `model` are pre-trained, which are new, and which are unused."""
    wanted, found = (set(tree.flatten_paths(x)) for x in (_initial_shapes(model), pretrained))
    return tree.LoadReport(sorted(wanted & found), sorted(wanted - found), sorted(found - wanted))


def include_new_modules(model: Model, pretrained: dict, trainable: str) -> str:
    """Returns the trainable spec, extended by the modules that are missing from the checkpoint.

    Such modules are randomly initialized and must not stay frozen: RoBERTa and DistilBERT
    checkpoints without a head, for example, have no pooler.
    """
    new = {path.partition("/")[0] for path in load_report(model, pretrained).new} - {"classifier"}
    return "+".join([trainable, *(f"regex:^{name}/" for name in sorted(new))])


def initial_params(model: Model, pretrained: dict) -> dict:
    """Returns the model's parameters without PEFT: pre-trained if available, otherwise initial.

    The initial values do not depend on the seed of the run, because `finetuning.adapter_io`
    identifies the base model of an adapter by the fingerprint of these parameters.
    """
    return tree.restore_partial(init_params(model, jax.random.key(0)), pretrained)[0]


def _initial_shapes(model: Model) -> dict:
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


class FinetunedParams(NamedTuple):
    """The result of one fine-tuning run, as in `finetuning.FinetuneResult`."""

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
    cached_features: bool  # whether the batches contain cached features instead of tokens


def encode_for_training(
    dataset: LabeledDataset, model: Model, tokenizer: Tokenizer, training: TrainingConfig
) -> EncodedDataset:
    """Tokenizes a labeled dataset for a fine-tuning run, after `check_training_config`."""
    check_training_config(training, dataset, model)
    return encode_dataset(dataset, model, tokenizer, training.input_config())


def check_training_config(training: TrainingConfig, dataset: LabeledDataset, model: Model) -> None:
    """Raises a ValueError if the settings do not fit the model or the task."""
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


@functools.partial(jax.jit, static_argnames=("model", "trainable", "training"))
def _init(
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


@functools.cache
def make_finetune_step(
    model: Model, trainable: str, training: TrainingConfig, task_type: str
) -> FinetuneStep:
    """Returns the mask, optimizer and train step of a trainable spec.

    Calls with equal arguments return the same object, so that the step is compiled only once.
    """
    init = functools.partial(_init, model, trainable, training)
    mask = select.trainable_mask(jax.eval_shape(init, jax.random.key(0)), trainable)
    optimizer = training.optimizer.make(training.num_steps)
    weight = training.aux_lm_loss_weight
    cached = (training.cache_features and frozen.is_head_only(mask)
              and task_type in TEXT_TASK_TYPES and not weight)
    if task_type == "seq2seq":
        loss = causal_lm.loss if isinstance(model, GPT) else seq2seq.loss
    else:
        loss = classification.TASK_TYPES[task_type].loss
    loss_fn = functools.partial(
        loss, frozen.make_features_apply(model.apply) if cached else model.apply,
        **({"aux_lm_loss_weight": weight} if weight else {}))
    return FinetuneStep(mask, optimizer, step.make_train_step(loss_fn, optimizer, mask), cached)


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
        seed: seed of new parameters, data order and dropout.
        quiet: whether to suppress the progress display and the table of trainable parameters.
        checkpoint_dir: folder of checkpoints, from which the same run resumes; None saves none.
        mesh: device mesh; None trains on the default device.

    Raises:
        ValueError: a setting is out of range, or the checkpoints belong to another run.
    """
    model = data.encoder.model
    training = training.with_num_steps(len(data.train))
    if pretrained is not None:
        trainable = include_new_modules(model, pretrained, trainable)
    params = _init(model, trainable, training, jax.random.key(seed), pretrained)
    total_count = tree.count(params)
    finetune_step = make_finetune_step(model, trainable, training, data.dataset.task_type)
    truncated = [sum(n > training.max_length for n in data.encoder.lengths(items))
                 for items in (data.train, data.validation)]
    if not quiet:
        report = "new parameters" if pretrained is None else load_report(model, pretrained)
        print(report, select.describe(params, finetune_step.mask), sep="\n", flush=True)
        if any(truncated):
            print(f"{truncated[0]} of {len(data.train)} training rows and {truncated[1]} of "
                  f"{len(data.validation)} validation rows have more than {training.max_length} "
                  "tokens and are truncated", flush=True)
    began = time.perf_counter()
    metadata = None if checkpoint_dir is None else {
        "model": config_to_dict(model.config), "recipe": trainable, "seed": seed,
        **run_dir.run_metadata(training, data.train, params)}
    batches = (
        _feature_batches(params, data, training.batch_size, seed, mesh)
        if finetune_step.cached_features else data.encoder.batches(
            data.train, batch_size=training.batch_size, seed=seed, num_steps=training.num_steps,
            mesh=mesh))
    checkpointer = run_dir.make_checkpointer(
        training, metadata, checkpoint_dir, keep=2,
        keep_best=(main_metric(data.dataset), "max") if training.keep_best else None)
    params, history, statistics = _fit(
        data, training, finetune_step, params, batches.loader(), seed, mesh, checkpointer, quiet)
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


def _feature_batches(
    params: dict, data: EncodedDataset, batch_size: int, seed: int, mesh: Mesh | None
) -> LengthBucketedBatches:
    """Returns batches of the body's outputs for the training items, computed without dropout.

    The entry "tokens" of a row holds its features `[D]`, or `[R, D]` for R choices or R = 2 orders.
    """
    encoder, shard = data.encoder, sharding.process_data_shard(mesh)
    batches = encoder.batches(data.train, batch_size=PREDICT_BATCH_SIZE).evaluation_batches()
    rows = frozen.compute_features(encoder.model, params, batches)
    return LengthBucketedBatches(
        sorted(rows, key=lambda row: int(row["index"])), [1] * len(rows),
        lambda row, length: {k: v for k, v in row.items() if k != "index"},
        buckets=[1], batch_size=batch_size, seed=seed, process_index=shard.index,
        process_count=shard.count)


def main_metric(dataset: LabeledDataset) -> str:
    """Returns the name of the main metric in the scores; higher values are better in every task."""
    return "f1" if dataset.metric == "squad" else dataset.metric


def _fit(
    data: EncodedDataset, training: TrainingConfig, finetune_step: FinetuneStep, params: dict,
    batches: loop.Batches, seed: int, mesh: Mesh | None, checkpoint: Checkpointer, quiet: bool,
) -> tuple[dict, list[dict], dict[str, Any]]:
    """Runs the training loop, with evaluation, early stopping and the best parameters on request.

    Returns the parameters, the history, and the metrics "steps", "best_step" and "stopped_early".
    """
    mask = finetune_step.mask

    def trained_params(state: step.TrainState) -> dict:
        average = transforms.get_ema_params(state.opt_state)
        return tree.partition(state.params, mask)[0] if average is None else average

    def with_frozen_params(trained: dict, state: step.TrainState) -> dict:
        return tree.combine(trained, tree.partition(state.params, mask)[1])

    def scores(params: dict) -> dict[str, float]:
        return {name: value for name, value in data.evaluate(params)[0].items()
                if isinstance(value, int | float)}

    metric = main_metric(data.dataset)
    callbacks: list[Callback] = [Logging(max(training.num_steps // 10, 1))]
    callbacks += [] if quiet else [Progress()]
    best = KeepBest(metric, "max", trained_params)
    if training.keep_best:
        callbacks.append(best)
    if training.patience is not None:
        callbacks.append(EarlyStopping(metric, "max", training.patience))
    evaluation = loop.Evaluation(
        scores, training.eval_every,
        lambda state: with_frozen_params(trained_params(state), state))
    state, history = loop.fit(
        step.init_state(params, finetune_step.optimizer, mask), finetune_step.train_step, batches,
        rng=jax.random.key(seed + 1), num_steps=training.num_steps, mesh=mesh,
        checkpoint=checkpoint, evaluation=evaluation if training.eval_every else None,
        anomalies=training.anomaly_policy, callbacks=callbacks)
    statistics: dict[str, Any] = {"steps": int(state.step)}
    if training.keep_best:
        statistics["best_step"] = best.step
        if not quiet and best.step is not None:
            print(f"best {best.metric} {best.value:.3f} at step {best.step}", flush=True)
    if statistics["steps"] < training.num_steps:
        statistics["stopped_early"] = callbacks[-1].reason
    return with_frozen_params(best.best(state), state), history, statistics
