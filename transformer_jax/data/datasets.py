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
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data import in_memory, known_datasets, labels, rows, sources
from transformer_jax.data import splits as splits_lib
from transformer_jax.data.columns import make_encoders, resolve_columns
from transformer_jax.data.known_datasets import METRICS, Columns, KnownDataset
from transformer_jax.data.labels import EncodeLabel, LabelEncoder
from transformer_jax.data.mapped_dataset import MappedDataset
from transformer_jax.data.sources import Example
from transformer_jax.data.splits import Split


class LabeledDataset(NamedTuple):
    """A labeled dataset whose examples have been checked.

    Attributes:
        task_type: a key of `known_datasets.METRICS`.
        train: training examples.
        validation: validation examples.
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
    data: Any,
    *,
    task_type: str | None = None,
    columns: Columns | None = None,
    validation: Any = None,
    validation_filter: Mapping[str, Collection] | None = None,
    validation_fraction: float | None = None,
    header: Sequence[str] | None = None,
    validation_header: Sequence[str] | None = None,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    validation_label_names: Sequence[str] | Mapping[str, str] | None = None,
    label_range: tuple[float, float] | None = None,
    metric: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad_rows: str | None = None,
    allow_empty_classes: bool = False,
    like: str | None = None,
    config: str | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
) -> LabeledDataset:
    """Loads the training and validation split of a labeled dataset.

    The arguments override the description of a known dataset (`known_datasets.KNOWN`). For other
    data, give the arguments that cannot be inferred from the column names.

    Args:
        data: one of

            - "tfds:NAME", "hf:NAME", "hf:FOLDER" for a folder of `save_to_disk`, or
              "python_docs/topics";
            - a .tsv, .csv, .jsonl or tab-separated .txt file, or .gz of one;
            - a folder with such a file that has the word train in its name, and such a file that
              has the word validation, valid, val, dev, trial or test in its name;
            - a sequence of dicts, a pandas DataFrame or a `datasets.Dataset`;
            - a dict of such sequences, or a `datasets.DatasetDict`, with the key "train" and, for
              the validation split, one of the words above as key;
            - a `LabeledDataset`, which is returned unchanged unless `validation` is given.
        task_type: a key of `known_datasets.METRICS`. If None, it is inferred from the columns. A
            dataset whose labels are numbers is a regression if one of them is not an integer, else
            a classification.
        columns: field of the example -> column of the data, as `{"text": "sentence"}`. A dot in the
            name of a column selects an item of a dict. A tuple names several columns, whose texts
            are joined by spaces; for the field "choices", each column is one choice.
        validation: the validation split: another file, the name of a split, or data in memory as
            above. If `data` is in memory without a validation split, 10 % of its rows, at least
            one, are held out for validation, and their number is printed.
        validation_filter: column -> values, as `{"fold": [0]}`: the training rows whose value in
            each of these columns is one of the given values become the validation split.
        validation_fraction: fraction of the training rows, in (0, 1), that is drawn at random as
            the validation split.
        header: column names of .tsv and .csv files without a header line.
        validation_header: the same for the validation file, if its columns differ.
        label_names: names of the classes in the order of their ids; or label in the data -> name
            of its class, as `{"1": "neutral", ...}`. By default, the class names of the data if it
            has them, else the sorted labels of the training split. If the data has class names or
            `label_names` is given, rows with the label -1 or "-" count as unlabeled and are left
            out.
        validation_label_names: the same for the validation split, if its labels differ.
        label_range: lowest and highest label of a regression.
        metric: a metric of the task type in `known_datasets.METRICS`. The default for token
            classification is the F1 of entities if the tags are in a scheme such as BIO, else
            accuracy.
        limit: maximum number of rows of each split; the rows are drawn at random.
        seed: seed of all random draws of rows.
        on_bad_rows: what to do with rows that have an empty text, an empty label, or an answer that
            is not at its position in the context: "error" raises an error, and "drop" leaves them
            out and counts them. The default is "drop" for known datasets and "error" for others.
        allow_empty_classes: whether a class may have no training example.
        like: name of a known dataset whose description applies to this data, such as "hf:snli" for
            a local copy of it.
        config: config of an "hf:NAME" dataset.
        data_dir: folder of TFDS's data; see `sources.load_tfds`.
        download: whether TFDS may download the dataset.

    Returns:
        The dataset, whose rows have all been converted to examples and checked.

    Raises:
        FileNotFoundError: a path does not exist, or there is no dataset of this name.
        ValueError: there is no validation split, a column is missing, a row is invalid (the message
            has the line of the file or the index of the row), a label does not occur in the
            training split, a class has no example, or the metric does not belong to the task type.

    Example:
        >>> rows = [{"sentence": "good", "label": "pos"}, {"sentence": "bad", "label": "neg"}]
        >>> dataset = load_dataset(rows, validation=rows[:1])
        >>> dataset.task_type, dataset.label_names, dataset.validation
        ('classification', ('neg', 'pos'), [{'text': 'good', 'label': 1}])
    """
    if isinstance(data, LabeledDataset):
        if validation is None:
            _check_unused(task_type=task_type, columns=columns, like=like, limit=limit,
                          validation_filter=validation_filter, label_names=label_names,
                          validation_fraction=validation_fraction, label_range=label_range,
                          metric=metric)
            return data
        task_type, metric = task_type or data.task_type, metric or data.metric
        label_range, allow_empty_classes = label_range or data.label_range, True
    data, validation = _as_splits(data), _as_splits(validation)
    if sum(x is not None for x in (validation, validation_filter, validation_fraction)) > 1:
        raise ValueError("give one of validation, validation_filter and validation_fraction")
    for option, value, allowed in (("task_type", task_type, METRICS),
                                   ("on_bad_rows", on_bad_rows, ("error", "drop"))):
        if value is not None and value not in allowed:
            raise ValueError(f"unknown {option} {value!r}; choose one of {', '.join(allowed)}")
    is_named = not in_memory.is_in_memory(data) and not sources.is_local(data)
    known = known_datasets.get(like) if like else (
        known_datasets.find(str(data)) if is_named else None)
    holds_out = validation_filter is not None or validation_fraction is not None
    splits = _load_splits(data, validation, known, holds_out, header, validation_header,
                          config=config, data_dir=data_dir, download=download)
    if holds_out:
        splits = splits_lib.hold_out(splits[0], validation_filter, validation_fraction, seed)
    elif len(splits) == 1:
        splits = _hold_out_tenth(splits[0], seed)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; it must be at least 1")
        splits = [split.take(np.sort(np.random.default_rng(seed).permutation(len(split.rows))
                                     [:limit])) for split in splits]
    task_type, columns = resolve_columns(splits[0], task_type, columns, known)
    if known and known.task_type == task_type and (
            known.columns.get("label") == columns.get("label")):
        label_names = label_names or known.label_names or None
    label_range = label_range or (known.label_range if known else None)
    encoders = make_encoders(task_type, columns, splits, label_names,
                             validation_label_names or label_names, label_range)
    examples, dropped = [], {}
    for name, split, encode_label in zip(("train", "validation"), splits, encoders):
        converted, counts = _convert_rows(task_type, split, columns, encode_label,
                                          on_bad_rows or ("drop" if known else "error"))
        examples.append(converted)
        dropped[name] = dict(counts)
    names = encoders[0].names if isinstance(encoders[0], LabelEncoder) else ()
    origin = "data" if in_memory.is_in_memory(data) else str(data)
    if task_type == "classification" and not allow_empty_classes:
        _check_classes(examples[0], names, origin)
    if task_type == "multiple_choice":
        _check_choices(examples, origin)
    if task_type == "regression":
        scores = [example["label"] for example in examples[0]]
        label_range = label_range or (min(scores), max(scores))
        if label_range[0] == label_range[1]:
            raise ValueError(f"{origin}: all training labels are {label_range[0]:g}; a regression "
                             "needs different ones, or a label_range")
    return LabeledDataset(
        task_type, *examples, dropped=dropped,
        metric=_choose_metric(task_type, names, metric, known),
        label_names=names if task_type.endswith("classification") else (),
        label_range=label_range if task_type == "regression" else None)


# Splits -------------------------------------------------------------------------------------------


def _check_unused(**options: Any) -> None:
    if given := [name for name, value in options.items() if value is not None]:
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
    data: Any, validation: Any, known: KnownDataset | None, holds_out: bool,
    header: Sequence[str] | None, validation_header: Sequence[str] | None, **options: Any,
) -> list[Split]:
    """Returns the training split and the validation split.

    Returns only the training split if validation rows must be held out from it: if `holds_out` is
    True, or if `data` is in memory and has no validation split. `options` are those of
    `splits.load_library_split`.
    """
    validation_in_memory = validation is not None and in_memory.is_in_memory(validation)
    train_only = holds_out or validation_in_memory
    if header is not None and (in_memory.is_in_memory(data) or not sources.is_local(data)):
        raise ValueError(f"header is {list(header)}, but data is not a file; leave header out")
    if in_memory.is_in_memory(data):
        name = None if validation is None or train_only else str(validation)
        is_split = isinstance(data, Mapping) and name in data
        if name is not None and not is_split and Path(name).is_file():
            splits = [*in_memory.load_splits(data, None, train_only=True),
                      splits_lib.load_file(Path(name), validation_header)]
        else:
            splits = in_memory.load_splits(data, name, train_only)
    elif sources.is_local(data):
        splits = splits_lib.load_files(Path(data), None if train_only else validation, train_only,
                                       header, validation_header or header)
    else:
        load = functools.partial(splits_lib.load_library_split, str(data), known,
                                 train_only=train_only, **options)
        name = validation or (known.validation_split if known else "validation")
        splits = [load(split=split) for split in ("train", *([] if train_only else [str(name)]))]
    if validation_in_memory:
        splits.append(in_memory.load_validation(validation))
    return splits


def _hold_out_tenth(train: Split, seed: int) -> list[Split]:
    num_rows = len(train.rows)
    if num_rows < 2:
        raise ValueError("data has 1 row and no validation split; give at least 2 rows, or "
                         "validation")
    num_validation = max(round(num_rows / 10), 1)
    print(f"no validation data was given: {num_validation} of {num_rows} rows, drawn at random "
          f"with seed {seed}, are held out for validation")
    return splits_lib.hold_out(train, None, num_validation / num_rows, seed)


# Metrics ------------------------------------------------------------------------------------------


def _choose_metric(
    task_type: str, label_names: Sequence[str], metric: str | None, known: KnownDataset | None
) -> str:
    known_metric = known.metric if known and known.task_type == task_type else ""
    has_entities = all(map(_is_entity_tag, label_names))
    metric = metric or known_metric or (
        "accuracy" if task_type == "token_classification" and not has_entities
        else METRICS[task_type][0])
    if metric not in METRICS[task_type]:
        raise ValueError(f"metric {metric!r} is not supported for {task_type}; choose one of "
                         f"{', '.join(METRICS[task_type])}")
    return metric


def _is_entity_tag(tag: str) -> bool:
    """Returns whether a tag belongs to an entity scheme such as BIO; part-of-speech tags do not."""
    return tag in ("O", "B", "I") or re.match(r"[BILUSE]-.", tag) is not None


# Examples -----------------------------------------------------------------------------------------


def _convert_rows(
    task_type: str, split: Split, columns: Columns, encode_label: EncodeLabel, on_bad_rows: str
) -> tuple[list[Example], collections.Counter]:
    """Returns the examples of a split, and the number of dropped rows for each reason."""
    examples, dropped = [], collections.Counter()
    for i in range(len(split.rows)):
        row = split.rows[i]
        try:
            examples.append(rows.to_example(task_type, row, columns, encode_label))
        except ValueError as error:
            if isinstance(error, labels.DroppableRowError) and (
                    on_bad_rows == "drop" or error.reason == labels.NO_LABEL):
                dropped[error.reason] += 1
                continue
            row_id = f" (id {row[columns['id']]})" if columns.get("id") in row else ""
            raise ValueError(f"{split.describe(i)}{row_id}: {error}") from None
    if not examples:
        raise ValueError(f"{split.describe(0)} and all other rows of this split were left out: "
                         f"{dict(dropped)}; give a split with labels")
    return examples, dropped


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

    Args:
        examples: the examples.
        per_class: number of examples to draw from every class.
        seed: seed of the draw.
        total: number of examples to draw over all classes.

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
