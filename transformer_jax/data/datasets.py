"""Loading of labeled datasets by name, from files or from memory, as examples in a common form.

The fields of an example depend on the task type, not on the columns of the data:

    classification        {"text", "label": int}, and "text_b" for a pair of texts
    regression            {"text", "label": float}, and "text_b" for a pair of texts
    multiple_choice       {"text", "choices": [str, ...], "label": int}; the text may be ""
    token_classification  {"words": [str, ...], "tags": [int, ...]}
    question_answering    {"question", "context", "answers": [{"text", "start"}, ...]}; "answers" is
                          empty if the context has no answer; "start" is a character index
    seq2seq               {"source", "target"}

Examples also have an "id" if the data has one.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data import known_datasets, rows, sources, splits
from transformer_jax.data.columns import make_encoders, resolve_columns
from transformer_jax.data.known_datasets import METRICS, Columns, DatasetConfig
from transformer_jax.data.mapped_dataset import MappedDataset
from transformer_jax.data.rows import EncodeLabel, Example, LabelEncoder
from transformer_jax.data.splits import Split
from transformer_jax.errors import did_you_mean


class LabeledDataset(NamedTuple):
    """A labeled dataset whose examples have been checked.

    Attributes:
        task_type: a key of `known_datasets.METRICS`.
        label_names: names of the classes or tags, in the order of their ids; empty for other task
            types.
        metric: main metric: accuracy, f1, macro_f1, matthews, pearson_spearman, squad, rouge or
            bleu.
        label_range: lowest and highest label of a regression, as declared or else in the training
            split; None for other task types.
        dropped: split -> reason -> number of rows that were left out.
    """

    task_type: str
    train: Sequence[Example]
    validation: Sequence[Example]
    label_names: tuple[str, ...]
    metric: str
    label_range: tuple[float, float] | None
    dropped: dict[str, dict[str, int]]


def load_dataset(
    dataset: DatasetConfig | Any,
    data: Any = None,
    *,
    validation: Any = None,
    validation_filter: Mapping[str, Collection] | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    download: bool = False,
    **options: Any,
) -> LabeledDataset:
    """Loads the training and validation split of a labeled dataset.

    Args:
        dataset: a `DatasetConfig`, or one of

            - a name or path as in `DatasetConfig.data`;
            - a sequence of dicts, a pandas DataFrame or a `datasets.Dataset`;
            - a dict of such sequences, or a `datasets.DatasetDict`, with the key "train" and, for
              the validation split, one of the words validation, valid, val, dev, trial and test;
            - a `LabeledDataset`, which is returned unchanged unless `validation` is given.
        data: data in any of these forms, which replaces the field `data` of a `DatasetConfig`.
        validation: the validation split: another file, the name of a split, or data in memory as
            above. If the data is in memory without a validation split, 10 % of its rows, at least
            one, are held out for validation, and their number is printed.
        validation_filter: column -> values, as `{"fold": [0]}`: the training rows whose value in
            each of these columns is one of the given values become the validation split.
        seed: seed of all random draws of rows.
        data_dir, download: see `mapped_dataset.load_tfds`.
        options: fields of `DatasetConfig`, such as columns={"text": "sentence"}.

    Raises:
        FileNotFoundError: a path does not exist, or there is no dataset of this name.
        ValueError: an option is unknown, there is no validation split, a column is missing, a row
            is invalid (the message has the line of the file or the index of the row), a label does
            not occur in the training split, a class has no example, or the metric does not belong
            to the task type.

    Example:
        >>> rows = [{"sentence": "good", "label": "pos"}, {"sentence": "bad", "label": "neg"}]
        >>> dataset = load_dataset(rows, validation=rows[:1])
        >>> dataset.task_type, dataset.label_names, dataset.validation
        ('classification', ('neg', 'pos'), [{'text': 'good', 'label': 1}])
    """
    config = _apply_options(dataset, data, options)
    if data is None:
        data = dataset.data if isinstance(dataset, DatasetConfig) else dataset
    validation = config.validation if validation is None else validation
    if config.validation_folds:
        validation_filter = {"fold": config.validation_folds, **(validation_filter or {})}
    if isinstance(data, LabeledDataset):
        if validation is None:
            _check_unused(config, validation_filter)
            return data
        config = dataclasses.replace(
            config, task_type=config.task_type or data.task_type, allow_empty_classes=True,
            metric=config.metric or data.metric, label_range=config.label_range or data.label_range)
    data, validation = _as_splits(data), _as_splits(validation)
    is_name = not splits.is_in_memory(data) and not sources.is_local(data)
    known = known_datasets.get(config.like) if config.like else (
        known_datasets.find(str(data)) if is_name else None)
    holds_out = validation_filter is not None or config.validation_fraction is not None
    if validation is None and is_name and not holds_out:
        validation = (known and known.validation) or "validation"
    found = _load_splits(config, data, validation, validation_filter, seed=seed,
                         data_dir=data_dir, download=download)
    return _convert_splits(config, known, found,
                           "data" if splits.is_in_memory(data) else str(data))


def load_pairs(data: str | Path, split: str, source: str, target: str) -> list[Example]:
    """Loads a split of a parallel dataset as `{"source", "target"}` texts.

    Args:
        data: one of

            - "tfds:NAME" or "hf:NAME";
            - a table (see `sources.load_table`), which is loaded for any `split`;
            - a folder with a table named after the split, such as train.jsonl;
            - a folder with two line-aligned files per split, as train.de and train.en (or .gz).
        split: name of the split.
        source: column of the source texts, or suffix of their file, such as "de" for
            "tfds:wmt14_translate/de-en" and "article" for "tfds:cnn_dailymail". If the dataset has
            a column "translation" of dicts, the columns are keys of these dicts.
        target: the same for the target texts.

    Raises:
        FileNotFoundError: the dataset or file does not exist, or the folder has no such split.
        ValueError: a column is missing, the files are not line-aligned, or a text is empty.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.de").write_text("Ein Hund.")
        >>> _ = (folder / "train.en").write_text("A dog.")
        >>> load_pairs(folder, "train", source="de", target="en")
        [{'source': 'Ein Hund.', 'target': 'A dog.'}]
    """
    path = Path(data)
    if not sources.is_local(data):
        found = splits.from_library(str(data), split)
    elif path.is_file():
        found = splits.load_file(path)
    elif files := splits.find_aligned_files(path, split, (source, target)):
        found = splits.load_aligned_files(files)
    elif file := sources.find_split_file(path, split):
        found = splits.load_file(file)
    else:
        raise FileNotFoundError(f"{path} has no split {split!r}; give a folder with {split}."
                                f"{source} and {split}.{target}, or with {split}.jsonl")
    texts = found.map(lambda row: row["translation"] if isinstance(
        row.get("translation"), Mapping) else row)
    return _convert_rows("seq2seq", found._replace(rows=texts),
                         {"source": source, "target": target}, rows.encode_choice, "error")[0]


# Options and splits -------------------------------------------------------------------------------


def _apply_options(dataset: Any, data: Any, options: Mapping[str, Any]) -> DatasetConfig:
    """Returns the config with options in place of its fields, and checks its values."""
    config = dataset if isinstance(dataset, DatasetConfig) else DatasetConfig()
    if data is not None and config is not dataset:
        raise ValueError("two datasets were given, and the first is not a DatasetConfig; give one")
    names = [f.name for f in dataclasses.fields(DatasetConfig) if f.name != "data"]
    for name in options:
        if name not in names:
            raise ValueError(f"unknown option {name!r}; {did_you_mean(name, names)}")
    config = dataclasses.replace(
        config, **{name: value for name, value in options.items() if value is not None})
    for name, value, allowed in (("task_type", config.task_type, METRICS),
                                 ("on_bad_rows", config.on_bad_rows, ("error", "drop"))):
        if value is not None and value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; {did_you_mean(value, allowed)}")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit is {config.limit}; it must be at least 1")
    return config


def _check_unused(config: DatasetConfig, validation_filter: Any) -> None:
    given = [f.name for f in dataclasses.fields(config) if f.name != "data"
             and getattr(config, f.name) != getattr(DatasetConfig(), f.name)]
    if validation_filter is not None:
        given.append("validation_filter")
    if given:
        raise ValueError(f"data is a LabeledDataset, which is used as it is; {', '.join(given)} "
                         "would have no effect: leave it out")


def _as_splits(data: Any) -> Any:
    """Returns a LabeledDataset as a dict of splits; any other data unchanged."""
    if not isinstance(data, LabeledDataset):
        return data
    column = "tags" if data.task_type == "token_classification" else "label"
    class_names = {column: data.label_names} if data.label_names else {}
    return {name: MappedDataset(getattr(data, name), dict, class_names)
            for name in ("train", "validation")}


def _load_splits(
    config: DatasetConfig, data: Any, validation: Any, validation_filter: Any, *, seed: int,
    **options: Any,
) -> list[Split]:
    """Returns the training and the validation split, of at most `config.limit` rows each."""
    fraction = config.validation_fraction
    if sum(x is not None for x in (validation, validation_filter, fraction)) > 1:
        raise ValueError("give one of validation, validation_filter and validation_fraction")
    holds_out = validation_filter is not None or fraction is not None
    found = splits.load_splits(config, data, validation, holds_out, **options)
    if not holds_out and len(found) == 1:
        num_rows = len(found[0].rows)
        if num_rows < 2:
            raise ValueError("data has 1 row and no validation split; give at least 2 rows, or "
                             "validation")
        num_validation = max(round(num_rows / 10), 1)
        print(f"no validation data was given: {num_validation} of {num_rows} rows, drawn at random "
              f"with seed {seed}, are held out for validation")
        fraction = num_validation / num_rows
    if len(found) == 1:
        found = splits.hold_out(found[0], validation_filter, fraction, seed)
    if config.limit is None:
        return found
    return [split.take(np.sort(np.random.default_rng(seed).permutation(len(split.rows))
                               [:config.limit])) for split in found]


def _convert_splits(
    config: DatasetConfig, known: DatasetConfig | None, found: Sequence[Split], origin: str
) -> LabeledDataset:
    """Converts the rows of both splits to examples."""
    task_type, columns = resolve_columns(found[0], config, known)
    on_bad_rows = config.on_bad_rows or ("drop" if known else "error")
    known = known if known and known.task_type == task_type else None
    label_names = config.label_names
    if known and known.columns.get("label") == columns.get("label"):
        label_names = label_names or known.label_names
    label_range = config.label_range or (known.label_range if known else None)
    encoders = make_encoders(task_type, columns, found, label_names or None,
                             config.validation_label_names or label_names or None, label_range)
    (train, train_dropped), (validation, validation_dropped) = (
        _convert_rows(task_type, split, columns, encode_label, on_bad_rows)
        for split, encode_label in zip(found, encoders))
    names = encoders[0].names if isinstance(encoders[0], LabelEncoder) else ()
    if task_type == "classification" and not config.allow_empty_classes:
        _check_classes(train, names, origin)
    if task_type == "multiple_choice":
        _check_choices((train, validation), origin)
    if task_type == "regression":
        scores = [example["label"] for example in train]
        label_range = label_range or (min(scores), max(scores))
        if label_range[0] == label_range[1]:
            raise ValueError(f"{origin}: all training labels are {label_range[0]:g}; a regression "
                             "needs different ones, or a label_range")
    return LabeledDataset(
        task_type, train, validation,
        label_names=names if task_type.endswith("classification") else (),
        metric=_choose_metric(task_type, names, config.metric or (known and known.metric)),
        label_range=label_range if task_type == "regression" else None,
        dropped={"train": train_dropped, "validation": validation_dropped})


def _choose_metric(task_type: str, label_names: Sequence[str], metric: str | None) -> str:
    # Tags in an entity scheme such as BIO have an F1; part-of-speech tags do not.
    is_plain_tagging = task_type == "token_classification" and not all(
        re.match(r"[OBI]\Z|[BILUSE]-.", tag) for tag in label_names)
    metric = metric or ("accuracy" if is_plain_tagging else METRICS[task_type][0])
    if metric not in METRICS[task_type]:
        raise ValueError(f"metric {metric!r} is not supported for {task_type}; "
                         f"{did_you_mean(metric, METRICS[task_type])}")
    return metric


# Examples -----------------------------------------------------------------------------------------


def _convert_rows(
    task_type: str, split: Split, columns: Columns, encode_label: EncodeLabel, on_bad_rows: str
) -> tuple[list[Example], dict[str, int]]:
    """Returns the examples of a split, and the number of dropped rows for each reason."""
    examples, dropped = [], collections.Counter()
    for i in range(len(split.rows)):
        row = split.rows[i]
        try:
            examples.append(rows.to_example(task_type, row, columns, encode_label))
        except ValueError as error:
            if isinstance(error, rows.DroppableRowError) and (
                    on_bad_rows == "drop" or error.reason == rows.NO_LABEL):
                dropped[error.reason] += 1
                continue
            row_id = f" (id {row[columns['id']]})" if columns.get("id") in row else ""
            raise ValueError(f"{split.describe(i)}{row_id}: {error}") from None
    if not examples:
        raise ValueError(f"{split.describe(0)} and all other rows of this split were left out: "
                         f"{dict(dropped)}; give a split with labels")
    return examples, dict(dropped)


def _check_classes(train: Sequence[Example], names: Sequence[str], origin: str) -> None:
    present = {example["label"] for example in train}
    if empty := [name for i, name in enumerate(names) if i not in present]:
        raise ValueError(f"{origin}: none of the {len(train)} training examples has the label "
                         f"{', '.join(map(repr, empty))}; fix label_names, raise limit, or set "
                         "allow_empty_classes")


def _check_choices(splits: Sequence[Sequence[Example]], origin: str) -> None:
    counts = sorted({len(example["choices"]) for split in splits for example in split})
    if len(counts) > 1:
        raise ValueError(f"{origin}: the examples have {', '.join(map(str, counts))} choices; "
                         "give all of them the same number")


# Subsampling --------------------------------------------------------------------------------------


def subsample_balanced(
    examples: Sequence[Example], per_class: int | None = None, seed: int = 0, *,
    total: int | None = None,
) -> Sequence[Example]:
    """Draws examples at random: the same number from every class, or a total number.

    With `total`, the classes have equal numbers of examples, as far as each has enough. With the
    same seed, the examples for a smaller total are the first of those for a larger total. Examples
    without class ids, such as those of a regression, count as one class. If neither number is
    given, all examples are returned.

    Raises:
        ValueError: there are too few examples, or both numbers are given.

    Example:
        >>> examples = [{"label": i % 2, "n": i} for i in range(10)]
        >>> [example["label"] for example in subsample_balanced(examples, total=4)]
        [0, 1, 0, 1]
    """
    if per_class is not None and total is not None:
        raise ValueError(f"{per_class} labels per class and {total} in total were requested; give "
                         "one of the two numbers")
    if per_class is None and total is None:
        return examples
    if per_class is not None and per_class < 1:
        raise ValueError(f"{per_class} labels per class were requested; it must be at least 1")
    by_class: dict[Any, list[Example]] = {}
    for i in np.random.default_rng(seed).permutation(len(examples)):
        label = examples[int(i)].get("label")
        label = label if isinstance(label, (int, np.integer)) else None
        by_class.setdefault(label, []).append(examples[int(i)])
    if total is not None:
        if not 0 < total <= len(examples):
            raise ValueError(f"{total} examples were requested, but there are {len(examples)}; "
                             f"total must be from 1 to {len(examples)}")
        # Round i has the i-th example of every class that has one.
        rounds = ((round_, k, example) for k, drawn in enumerate(by_class.values())
                  for round_, example in enumerate(drawn))
        return [example for *_, example in sorted(rounds, key=lambda r: r[:2])[:total]]
    scarce = {label: len(drawn) for label, drawn in by_class.items() if len(drawn) < per_class}
    if scarce:
        raise ValueError(f"{per_class} labels per class were requested, but some classes have "
                         f"fewer examples: {scarce}; request fewer")
    return [example for drawn in by_class.values() for example in drawn[:per_class]]
