"""Fine-tuning of a pre-trained model on a labeled dataset.

    from transformer_jax.recipes import finetune

    result = finetune("google-bert/bert-base-uncased", "hf:glue/sst2", trainable="lora:8", epochs=3)
    result.predict(["A gripping film.", "Two hours that I will not get back."])
    result.export("sst2")        # a checkpoint in the Hugging Face format

`trainable` selects the trainable parameters (`finetuning.select`): full, head, last_k:2, bitfit,
lora:8, adapter:64, ..., joined by "+".
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from transformer_jax import sharding
from transformer_jax.data.datasets import load_dataset, subsample_balanced
from transformer_jax.finetuning import adapter_io, frozen, peft
from transformer_jax.pretrained import save_pretrained, save_run_config
from transformer_jax.recipes import prediction, run_dir
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    MeshConfig,
    TrainingConfig,
    check_options,
    convert_paths,
)
from transformer_jax.recipes.finetuning_run import (
    Source,
    add_task_head,
    encode_for_training,
    finetune_params,
    initial_params,
    load_base,
)
from transformer_jax.recipes.retention import make_retention_eval
from transformer_jax.report import plots

ADAPTER_DIR = "adapter"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of a fine-tuning run.

    Attributes:
        pretrained: folder of a pre-training run, or a checkpoint in the Hugging Face format: a
            folder, an id on the Hugging Face Hub, or "package:NAME/FOLDER" of an installed package.
        out: folder of the run; None writes no files and no checkpoints.
        dataset: the labeled data.
        training: settings of the training.
        trainable: trainable spec, which selects the parameters to train (`finetuning.select`).
        from_scratch: train newly initialized parameters instead of the pre-trained ones.
        labels_per_class: number of training examples per class; None for all.
        examples: number of training examples, as balanced as the classes allow; None for all.
        dropout_rate: overrides the model's dropout rate, also that of attention weights.
        pooling: overrides the input of BERT's classifier: "first" for the pooled first token, or
            "mean" for the mean over all tokens, with which sentence encoders are trained.
        retention_data: text on which the pre-training loss of a checkpoint is measured before and
            after fine-tuning (`retention`); for a pre-training run of this library, its own
            held-out rows are used instead. None skips the measurement.
        mesh: number of devices along each mesh axis.
        seed: seed of the selection of examples, new parameters, data order and dropout.
    """

    pretrained: str
    out: Path | None = None
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    trainable: str = "full"
    from_scratch: bool = False
    labels_per_class: int | None = None
    examples: int | None = None
    dropout_rate: float | None = None
    pooling: str | None = None
    retention_data: str | None = "python_docs/documents"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0

    def __post_init__(self):
        convert_paths(self, "out")


@dataclass(frozen=True)
class FinetuneResult(prediction.TaskModel):
    """A fine-tuned model and its scores.

    Attributes:
        mask: True for trainable parameters.
        metrics: scores on the validation examples, the main metric first; statistics of the run:
            "labels" (number of training examples), "steps", "trained" and "share_trained" (number
            and fraction of trainable parameters), "cut" and "cut_validation" (numbers of truncated
            rows), "seconds" of training, "seconds_per_step" (median), with `keep_best` "best_step",
            the step that `params` is from, and "stopped_early", the reason if it was; and, if it
            was measured, the pre-training loss as "held_out_before" and "held_out_after".
        predictions: one dict for each validation example, as in `predictions.jsonl`.
        history: history of `train.loop.fit`; empty if the run was already complete.
    """

    mask: dict
    metrics: dict[str, Any]
    predictions: list[dict]
    history: list[dict]

    @property
    def task_type(self) -> str:
        return self.task.task_type

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.task.label_names

    def predict(self, inputs: Any, **options: Any) -> list[dict]:
        """Returns one prediction for each input; see `prediction.predict`."""
        return prediction.predict(self, inputs, **options)

    def export(self, path: str | Path) -> None:
        """Saves a checkpoint in the Hugging Face format, with merged PEFT parameters.

        Raises:
            ValueError: there are PEFT parameters that cannot be merged, such as adapters and
                prefixes; save them with `finetuning.adapter_io.save_adapter`.
        """
        model, params = peft.fold_tokens(self.model, frozen.dequantize(self.params))
        save_pretrained(path, model, peft.merge(params), self.tokenizer)


def finetune(
    pretrained: FinetuneConfig | Source, data: Any = None, *, trainable: str = "full",
    validation: Any = None, out: str | Path | None = None, **options: Any,
) -> FinetuneResult:
    """Fine-tunes a copy of a pre-trained model on labeled data and evaluates it.

    If `out` is given, that folder receives checkpoints, from which the same call resumes; the
    predictions, figures and results; and an adapter, the trained parameters without the base model
    (`finetuning.adapter_io`). Otherwise no files are written.

    Args:
        pretrained: a run's folder, a checkpoint (a folder, an id on the Hugging Face Hub, or
            "package:NAME/FOLDER"), or a loaded (model, params, tokenizer). Alternatively, a
            `FinetuneConfig`, which must be the only argument.
        data: a list of dicts, a pandas DataFrame, a `datasets.Dataset` or `DatasetDict`, a file or
            folder, a name such as "hf:glue/sst2", or a `LabeledDataset`.
        trainable: trainable spec, such as "full", "head", "last_k:2" or "lora:8+bitfit".
        validation: validation examples in one of these forms, or the name of a split. If None and
            the data is in memory without a validation split, a tenth of the data is held out.
        out: folder of the run.
        options: fields of `FinetuneConfig`, `DatasetConfig`, `TrainingConfig` and
            `FinetuneOptimizerConfig`, such as epochs=3, peak_lr=1e-4, max_length=128,
            columns={"text": "sentence"}. The defaults, 100 steps with a peak_lr of 1e-3, are for
            small models or few trainable parameters; Devlin et al. 2018, appendix A.3, fine-tune
            all parameters of BERT with 2e-5 to 5e-5. The pre-training loss is measured only if
            `retention_data` is given.

    Raises:
        ValueError: an option is unknown, or the data or the settings do not fit the model.
        FileNotFoundError: the model or the data does not exist.
    """
    if isinstance(pretrained, FinetuneConfig):
        if data is not None or validation is not None or out is not None or options or (
                trainable != "full"):
            raise ValueError("finetune was given a FinetuneConfig and other settings; set them in "
                             "the config with dataclasses.replace")
        return _finetune(pretrained, pretrained.pretrained, None, None)
    if data is None:
        raise ValueError("data is None; give labeled examples or the name of a dataset")
    config = finetune_config(
        pretrained if isinstance(pretrained, (str, Path)) else type(pretrained[0]).__name__,
        trainable=trainable, out=out,
        data=str(data) if isinstance(data, (str, Path)) else "in memory",
        **({"validation": str(validation)} if isinstance(validation, (str, Path)) else {}),
        **({"retention_data": None} | options))
    return _finetune(config, pretrained, *(
        None if isinstance(x, (str, Path)) else x for x in (data, validation)))


def finetune_config(
    pretrained: str | Path, *, out: str | Path | None = None, **options: Any
) -> FinetuneConfig:
    """Returns a `FinetuneConfig` whose nested settings are given as flat keyword arguments.

    The options are the fields of `FinetuneConfig`, `DatasetConfig`, `TrainingConfig` and
    `FinetuneOptimizerConfig`, by name.

    Raises:
        ValueError: an option is unknown; the message suggests known ones.

    Example:
        >>> config = finetune_config("gpt2", data="reviews.csv", trainable="lora:8", peak_lr=1e-4)
        >>> config.dataset.data, config.trainable, config.training.optimizer.peak_lr
        ('reviews.csv', 'lora:8', 0.0001)
    """
    groups: list[tuple[type, dict]] = [
        (kind, {}) for kind in (DatasetConfig, FinetuneOptimizerConfig, TrainingConfig,
                                FinetuneConfig)]
    known = {f.name: values for kind, values in groups for f in dataclasses.fields(kind)}
    check_options(options, known, "fine-tuning")
    for name, value in options.items():
        known[name][name] = value
    dataset, optimizer, training, config = (values for _, values in groups)
    base = config.pop("training", None) or TrainingConfig()
    optimizer = dataclasses.replace(training.pop("optimizer", base.optimizer), **optimizer)
    return FinetuneConfig(
        pretrained=str(pretrained), out=None if out is None else Path(out),
        dataset=dataclasses.replace(config.pop("dataset", None) or DatasetConfig(), **dataset),
        training=dataclasses.replace(base, optimizer=optimizer, **training), **config)


def _finetune(
    config: FinetuneConfig, source: Source, data: Any, validation: Any
) -> FinetuneResult:
    """Runs `config`; `data` and `validation` override those of its dataset if not None."""
    began = time.perf_counter()
    mesh = config.mesh.make()
    base = load_base(source, dropout_rate=config.dropout_rate, pooling=config.pooling)
    base = base._replace(params=jax.device_put(
        base.params, sharding.param_shardings(base.params, mesh)))
    dataset = load_dataset(config.dataset, data, validation=validation)
    if config.labels_per_class is not None or config.examples is not None:
        dataset = dataset._replace(train=subsample_balanced(
            dataset.train, config.labels_per_class, config.seed, total=config.examples))
    model, pretrained = add_task_head(base, dataset)
    encoded = encode_for_training(dataset, model, base.tokenizer, config.training)
    # Before training, so that missing retention data raises an error immediately.
    retention = (None if config.from_scratch or config.retention_data is None
                 else make_retention_eval(source, base, config.retention_data))
    before = None if retention is None else retention.loss()
    trained = finetune_params(
        encoded, None if config.from_scratch else pretrained, config.trainable, config.training,
        config.seed, mesh=mesh,
        checkpoint_dir=None if config.out is None else config.out / "checkpoints")
    metrics = dict(trained.metrics)
    if retention is not None:
        metrics |= {"held_out_objective": retention.objective, "held_out_before": before,
                    "held_out_after": retention.loss(trained.params)}
    result = FinetuneResult(
        model, trained.params, base.tokenizer, encoded.encoder.task, encoded.encoder.config,
        trained.mask, metrics, trained.predictions, trained.history)
    if config.out is not None:
        _save(config, result, None if config.from_scratch else initial_params(model, pretrained))
    _print_metrics(metrics)
    if config.out is not None:
        run_dir.plot_losses(config.out / "loss.png", f"Fine-tuning by {config.trainable}",
                            {"training": (result.history, "loss")})
        plot_classes(config.out, "", metrics, result.label_names,
                     f"{config.dataset.data}, {config.trainable}")
        run_dir.write_results(
            config.out, config, metrics | {"history": result.history, "dropped": dataset.dropped},
            time.perf_counter() - began)
    return result


def _save(config: FinetuneConfig, result: FinetuneResult, base_params: dict | None) -> None:
    """Writes config.json, the predictions, and, if `base_params` is given, the adapter."""
    out, model = config.out, result.model
    save_run_config(out, model.config, result.tokenizer, result.label_names, task=model.task,
                    num_classes=model.num_classes, hf_config=model.hf_config)
    prediction.save_task(out, result.task, result.input_config)
    run_dir.write_predictions(out / "predictions.jsonl", result.predictions)
    if base_params is not None:
        adapter_io.save_adapter(
            out / ADAPTER_DIR, result.params, result.mask, base_params, spec=config.trainable,
            label_names=result.label_names, task=result.task_type, pretrained=config.pretrained)


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    if "held_out_after" in metrics:
        print(f"held-out pre-training loss ({metrics['held_out_objective']}) "
              f"{metrics['held_out_before']:.3f} before, {metrics['held_out_after']:.3f} after "
              "fine-tuning")
    hidden = ("seconds", "seconds_per_step", "share_trained", "held_out_before", "held_out_after")
    shown = [f"{name} {value:.3f}" for name, value in metrics.items()
             if isinstance(value, float) and name not in hidden]
    print(f"{', '.join(shown)}; {100 * metrics['share_trained']:.2f} % of the parameters trained",
          flush=True)


def plot_classes(out: Path, suffix: str, metrics: Mapping[str, Any], label_names: Sequence[str],
                 title: str) -> None:
    """Plots the confusion matrix and the calibration of a classification."""
    if "confusion" in metrics and label_names:
        plots.confusion(out / f"confusion{suffix}.png", metrics["confusion"], label_names,
                        title=title)
        plots.calibration(out / f"calibration{suffix}.png", metrics["calibration"], title=title)
