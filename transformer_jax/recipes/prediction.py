"""Predictions and scores of fine-tuned models, and the loss of pre-trained models.

    from transformer_jax.recipes import evaluate, predict

    predict("runs/sst2", ["A gripping film."])       # [{"label": "positive", "score": 0.98, ...}]
    evaluate("runs/sst2", "reviews.csv")             # {"accuracy": 0.89, ...}
    evaluate("runs/gpt")                             # {"objective": "causal_lm", "loss": 4.38, ...}

To continue a text, use `generation.generate`; to fill masks, `generation.fill_mask`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_jax import metrics, storage
from transformer_jax.data import sources, splits
from transformer_jax.data.columns import USUAL_COLUMNS
from transformer_jax.data.datasets import LabeledDataset, load_dataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Model, Transformer
from transformer_jax.pretrained import LoadedRun, is_run, load_run
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import DatasetConfig, check_options
from transformer_jax.recipes.encoding import make_encoder
from transformer_jax.recipes.finetuning_run import load_base
from transformer_jax.recipes.retention import make_retention_eval, make_text_eval
from transformer_jax.recipes.task_encoder import InputConfig, TaskInfo, max_choices

MAX_TARGET_LENGTH = 128  # in tokens, for models without a saved InputConfig
INPUT_FIELDS = {
    "classification": ("text", "text_b"), "regression": ("text", "text_b"),
    "multiple_choice": ("text", "choices"), "token_classification": ("words",),
    "question_answering": ("question", "context"), "seq2seq": ("source",)}
"""Task type -> the fields of an input, in the order of an input tuple."""
OPTIONAL_FIELDS = {"text_b"}


@dataclass(frozen=True)
class TaskModel:
    """A model with its tokenizer, its task (None without a task head) and settings of its rows."""

    model: Model
    params: dict
    tokenizer: Tokenizer
    task: TaskInfo | None
    input_config: InputConfig

    def _run(self, task: TaskInfo, examples: list[dict], options: Mapping[str, Any]):
        """Returns the encoder of the task, the items of the examples, and the model's outputs."""
        encoder = make_encoder(task._replace(num_choices=max_choices(examples)), self.model,
                               self.tokenizer, self.input_config._replace(**options))
        items = encoder.encode(examples)
        return encoder, items, encoder.predict(self.params, items)


def predict(
    source: Any, inputs: Any, *, columns: Mapping[str, str] | None = None, **options: Any
) -> list[dict]:
    """Returns the predictions of a model with a task head, one dict for each input.

    | task type            | input                  | prediction                          |
    |----------------------|------------------------|-------------------------------------|
    | classification       | text, or (text, text)  | label, score, probabilities         |
    | regression           | text, or (text, text)  | score                               |
    | multiple_choice      | (text, choices)        | label, choice, score, probabilities |
    | token_classification | text, or list of words | words, labels, scores               |
    | question_answering   | (question, context)    | answer, start, stop, score          |
    | seq2seq              | text                   | text                                |

    "score" is the probability of the label or answer; for a regression, it is the predicted label.

    Args:
        source: the folder of a fine-tuned run, a checkpoint with a task head, a loaded (model,
            params, tokenizer), or a `FinetuneResult`.
        inputs: one input or a list of inputs, as in the table, or dicts with the columns text,
            text_b, choices, words, question, context or source; a pandas DataFrame or a
            `datasets.Dataset` with these columns; or the path of a .tsv, .csv, .jsonl or .txt file
            (one text per line). A tuple is one input; a list is always a list of inputs, so give a
            single list of words as `[words]`.
        columns: field of the example -> column of the inputs, such as `{"text": "sentence"}`.
        options: fields of `InputConfig` that override the settings of training, such as
            max_length=256 or num_beams=1.

    Raises:
        ValueError: the model has no task head, an input does not fit the task, or an option is
            unknown.
        FileNotFoundError: the source does not exist.
    """
    check_options(options, InputConfig._fields, "predict")
    found = load_task_model(source)
    if found.task is None:
        raise ValueError(f"the {type(found.model).__name__} has no task head; fine-tune it "
                         "first, or use generation.generate or generation.fill_mask")
    examples = to_examples(found.task, inputs, columns or {})
    encoder, items, outputs = found._run(found.task, examples, options)
    return [({"id": e["id"]} if "id" in e else {}) | prediction
            for e, prediction in zip(examples, encoder.predictions(examples, items, outputs))]


def evaluate(source: Any, data: Any = None, **options: Any) -> dict[str, Any]:
    """Returns the scores of a fine-tuned model, or the loss of a pre-trained model.

    Args:
        source: as in `predict`; or a pre-training run, or a checkpoint without a task head.
        data: labeled examples, in any form that `finetuning.finetune` accepts; if there are several
            splits, the validation split is used. For a pre-trained model: a text file or folder,
            the name of a text dataset, or a list of texts; None evaluates a run on its held-out
            rows.
        options: fields of `DatasetConfig` and `InputConfig`, such as columns={"text": "sentence"}
            or max_length=256. For a pre-trained model: num_rows, the number of rows to evaluate on
            (default 256).

    Returns:
        The scores, the main metric first. For a pre-trained model: "objective", "loss" in nats, the
        metrics of the objective, and for causal_lm "perplexity".

    Raises:
        ValueError: the data does not fit the model, or an option is unknown.
        FileNotFoundError: the source or the data does not exist.
    """
    found = load_task_model(source)
    if found.task is None:
        check_options(options, ("num_rows",), "evaluate for a pre-trained model")
        return _evaluate_objective(source, found, data, options.get("num_rows", 256))
    if data is None:
        raise ValueError(f"data is None; give labeled examples of {found.task.task_type}")
    dataset_fields = {f.name for f in dataclasses.fields(DatasetConfig)} - {"data"}
    check_options(options, dataset_fields | set(InputConfig._fields), "evaluate")
    dataset_options, input_options = (
        {name: x for name, x in options.items() if name in fields}
        for fields in (dataset_fields, InputConfig._fields))
    dataset = _load_labeled(found.task, data, dataset_options)
    examples = _align_labels(found.task, dataset)
    encoder, items, outputs = found._run(
        found.task._replace(metric=dataset.metric), examples, input_options)
    return encoder.report(examples, items, outputs)[0]


def load_task_model(source: Any) -> TaskModel:
    """Loads a model and the description of its task; the source is as in `predict`."""
    if isinstance(source, TaskModel):
        return source
    if isinstance(source, (str, Path)) and is_run(source):
        return _load_run(Path(source))
    base = load_base(source)
    return TaskModel(*base[:3], _task_of_head(base), _default_input_config(base))


def save_task(out: Path, task: TaskInfo, input_config: InputConfig) -> None:
    """Adds the description of a task to the config.json of a run."""
    run_dir.add_to_run_config(
        out, task_type=task.task_type, metric=task.metric, label_range=task.label_range,
        has_unanswerable=task.has_unanswerable, input=input_config._asdict())


def _load_run(folder: Path) -> TaskModel:
    run = load_run(folder)
    values = storage.read_json(folder / run_dir.CONFIG)
    if "task_type" in values:
        label_range = values["label_range"]
        task = TaskInfo(values["task_type"], tuple(run.label_names), values["metric"],
                        None if label_range is None else tuple(label_range),
                        has_unanswerable=values["has_unanswerable"])
        return TaskModel(*run[:3], task, InputConfig(**values["input"]))
    # Older runs store their settings only in results.json.
    results = run_dir.load_results(folder)["config"] if (
        folder / run_dir.RESULTS).is_file() else {}
    if "objective" in values | results:
        return TaskModel(*run[:3], None, _default_input_config(run))
    task = _task_of_head(run)
    label_range = results.get("dataset", {}).get("label_range")
    if task is not None and label_range is not None:
        task = task._replace(label_range=tuple(label_range))
    training = {name: x for name, x in results.get("training", {}).items()
                if name in InputConfig._fields}
    return TaskModel(*run[:3], task, _default_input_config(run)._replace(**training))


def _task_of_head(base: LoadedRun) -> TaskInfo | None:
    """Returns the task of a model's head; None if the model has no task head."""
    model = base.model
    if isinstance(model, Transformer) and model.task == "seq2seq_lm":
        return TaskInfo("seq2seq", metric="rouge")
    if not model.num_classes:
        return None
    source = json.loads(model.hf_config or "{}")
    task_type = model.task
    if task_type == "classification" and (
            model.num_classes == 1 or source.get("problem_type") == "regression"):
        return TaskInfo("regression", label_range=(0.0, 1.0))  # outputs are not rescaled
    if task_type not in ("classification", "token_classification"):
        return TaskInfo(task_type)
    names = source.get("id2label", {})
    label_names = base.label_names or [
        names.get(str(i), str(i)) for i in range(model.num_classes)]
    return TaskInfo(task_type, tuple(label_names))


def _default_input_config(base: LoadedRun) -> InputConfig:
    max_length = base.model.config.max_length
    return InputConfig(
        max_length, gpt_special_tokens="extra" in base.params.get("token_embed", {}),
        target_length=min(MAX_TARGET_LENGTH, max_length))


def to_examples(task: TaskInfo, inputs: Any, columns: Mapping[str, str]) -> list[dict]:
    """Returns the inputs of `predict` as examples of the task, with placeholders for their labels.

    Fields that `columns` does not name are read from their usual columns (`data.columns`).

    Example:
        >>> to_examples(TaskInfo("classification", ("no", "yes")), [("a", "b"), "c"], {})
        [{'text': 'a', 'text_b': 'b', 'label': 0}, {'text': 'c', 'label': 0}]
    """
    rows = _load_rows(inputs)
    if not rows:
        raise ValueError("there are 0 inputs; give at least 1")
    return [_to_example(task, row, columns, i) for i, row in enumerate(rows)]


def _load_rows(inputs: Any) -> list:
    """Returns a list with one str, tuple, list of words or dict for each input."""
    name = str(inputs).removesuffix(".gz") if isinstance(inputs, (str, Path)) else ""
    if isinstance(inputs, Path) or (
            name.endswith((*sources.TABLE_SUFFIXES, ".txt")) and Path(inputs).is_file()):
        if name.endswith(".txt"):
            texts = sources.load_text_files(inputs, document_separator="newline")
            return [example["text"] for example in texts]
        return list(sources.load_table(inputs))
    if isinstance(inputs, (str, tuple, Mapping)):
        return [inputs]
    if isinstance(inputs, list):
        return inputs
    rows = splits.from_table(inputs, "inputs").rows
    return [rows[i] for i in range(len(rows))]


def _to_example(
    task: TaskInfo, row: Any, columns: Mapping[str, str], i: int
) -> dict[str, Any]:
    fields = INPUT_FIELDS[task.task_type]
    if isinstance(row, Mapping):
        example = _from_dict((*fields, "id"), row, columns, i)
    elif task.task_type == "token_classification":
        example = {"words": row.split() if isinstance(row, str) else list(row)}
    elif isinstance(row, str):
        example = {fields[0]: row}
    elif isinstance(row, Sequence) and len(row) <= len(fields):
        example = dict(zip(fields, row))
    else:
        raise ValueError(f"input {i} is {row!r}; {task.task_type} takes {', '.join(fields)}")
    if missing := [f for f in fields if f not in example and f not in OPTIONAL_FIELDS]:
        raise ValueError(f"input {i} has no {', '.join(missing)}; {task.task_type} takes "
                         f"{', '.join(fields)}")
    placeholder = {"token_classification": {"tags": [0] * len(example.get("words", ()))},
                   "question_answering": {"answers": []}, "seq2seq": {"target": ""}}
    label = 0 if task.label_range is None else task.label_range[0]
    return example | placeholder.get(task.task_type, {"label": label})


def _from_dict(
    fields: Sequence[str], row: Mapping[str, Any], columns: Mapping[str, str], i: int
) -> dict[str, Any]:
    example = {}
    for field in fields:
        column = columns.get(field)
        if column is not None and column not in row:
            raise ValueError(f"input {i} has no column {column!r}; its columns are "
                             f"{', '.join(map(repr, row))}")
        names = (column,) if column else USUAL_COLUMNS.get(field, (field,))
        if (name := next((n for n in names if n in row), None)) is not None:
            example[field] = row[name]
    return example


def _load_labeled(task: TaskInfo, data: Any, options: dict[str, Any]) -> LabeledDataset:
    """Loads labeled data; the model is evaluated on its validation split."""
    if isinstance(data, LabeledDataset):
        return data
    defaults: dict[str, Any] = {"task_type": task.task_type, "allow_empty_classes": True}
    if task.metric:
        defaults["metric"] = task.metric
    is_name = isinstance(data, (str, Path)) and not sources.is_local(str(data))
    if task.label_names and not is_name and not hasattr(data, "features"):
        defaults["label_names"] = task.label_names
    options = {**defaults, **options}
    is_table = Path(data).is_file() if isinstance(data, (str, Path)) else (
        not isinstance(data, Mapping))
    if is_table and options.get("validation") is None:
        options["validation"] = data
    return load_dataset(data, **options)


def _align_labels(task: TaskInfo, dataset: LabeledDataset) -> list[dict]:
    """Returns the validation examples, with labels mapped by name to the model's class ids."""
    if dataset.task_type != task.task_type:
        raise ValueError(f"the task type of the data is {dataset.task_type}, but that of the model "
                         f"is {task.task_type}; evaluate on data of the same task type")
    names = tuple(dataset.label_names)
    examples = [dataset.validation[i] for i in range(len(dataset.validation))]
    if names == task.label_names or not task.label_names:
        return examples
    if unknown := [name for name in names if name not in task.label_names]:
        raise ValueError(f"the data has the label {unknown[0]!r}, but the model only has "
                         f"{', '.join(task.label_names)}; map it to one of them with label_names")
    index = [task.label_names.index(name) for name in names]
    key = "tags" if task.task_type == "token_classification" else "label"
    return [{**e, key: [index[t] for t in e[key]] if key == "tags" else index[e[key]]}
            for e in examples]


def _evaluate_objective(
    source: Any, task_model: TaskModel, data: Any, num_rows: int
) -> dict[str, Any]:
    """Evaluates the pre-training objective on `data`, or on the held-out rows of a run."""
    base = LoadedRun(task_model.model, task_model.params, task_model.tokenizer, [])
    if data is not None:
        if not isinstance(data, (str, Path)):
            data = [{"text": text} if isinstance(text, str) else text for text in data]
        evaluation = make_text_eval(base, data, num_rows)
    elif isinstance(source, (str, Path)) and is_run(source):
        evaluation = make_retention_eval(source, base, num_rows=num_rows)
    else:
        raise ValueError("data is None; give a text file, the name of a text dataset, or a list "
                         "of texts to evaluate the pre-training objective on")
    scores = evaluation.metrics()
    perplexity = ({"perplexity": metrics.perplexity(scores["loss"])}
                  if evaluation.objective == "causal_lm" else {})
    return {"objective": evaluation.objective, **scores, **perplexity}
