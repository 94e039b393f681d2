"""Annotated data sets, by name or from tables: canonical examples, whatever their columns.

    classification        {"text", "label": int}, with "text_b" of a pair
    regression            {"text", "label": float}, with "text_b" of a pair
    multiple_choice       {"text", "choices": [str, ...], "label": int}; the text may be ""
    token_classification  {"words": [str, ...], "tags": [int, ...]}
    question_answering    {"question", "context", "answers": [{"text", "start"}, ...]}; no answers
                          where the context has none; `start` counts characters
    seq2seq               {"source", "target"}

All keep an "id" where the set has one.
"""

import collections
import difflib
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data import known_datasets, sources
from transformer_jax.data import rows as rows
from transformer_jax.data import splits as splits_of
from transformer_jax.data.known_datasets import METRICS, Columns, KnownDataset
from transformer_jax.data.sources import Example
from transformer_jax.data.splits import Split


class LabeledDataset(NamedTuple):
    """An annotated set, read and checked.

    Attributes:
        label_names: of the classes, or of the tags; empty for the other kinds.
        metric: the main one: accuracy, matthews, pearson_spearman, f1, squad, rouge or bleu.
        label_range: of the labels of a regression: what was declared, else that of the train split.
        dropped: split -> reason -> how many rows were left out.
    """

    kind: str
    train: Sequence[Example]
    validation: Sequence[Example]
    label_names: tuple[str, ...]
    metric: str
    label_range: tuple[float, float] | None
    dropped: dict[str, dict[str, int]]


def load_dataset(
    spec: str | Path,
    *,
    kind: str | None = None,
    columns: Columns | None = None,
    validation: str | Path | None = None,
    held_out: Mapping[str, Collection] | None = None,
    validation_share: float | None = None,
    header: Sequence[str] | None = None,
    validation_header: Sequence[str] | None = None,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    validation_label_names: Sequence[str] | Mapping[str, str] | None = None,
    label_range: tuple[float, float] | None = None,
    metric: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad: str | None = None,
    allow_empty_classes: bool = False,
    like: str | None = None,
    config: str | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
) -> LabeledDataset:
    """The train and validation splits of an annotated set, in memory.

    What is known of sets by name (`annotated_table.NAMED`) the arguments override; of other sets
    they say what cannot be told from the columns' names.

    Args:
        spec: "tfds:NAME", "hf:NAME" (or a folder of `save_to_disk`), "python_docs/topics", a .tsv,
            .csv, .jsonl or tab-separated .txt file (or .gz), or a folder with one file whose name
            has the word train in it and one with validation, valid, val, dev, trial or test.
        kind: a key of METRICS. Told by the columns if None; numbers as labels are classes, unless
            one of them is not whole: then it is a regression.
        columns: canonical name -> the source's, `{"text": "sentence"}`. A dot goes into a dict; a
            tuple of columns is joined by spaces, or is the choices.
        validation: another file, or the name of another split.
        held_out: instead, rows of train to evaluate on: `{"fold": [0]}`.
        validation_share: instead, the share of train to evaluate on, drawn by `seed`.
        header: columns of .tsv and .csv files without a header line.
        validation_header: of the validation file, if that has others.
        label_names: names of the classes in order, or what each value stands for:
            `{"1": "neutral", ...}`. Else the source's, else the values in train, sorted. Where
            they are given, rows with a label of -1 or "-", for none, are left out.
        validation_label_names: of the validation file, if its values stand for others.
        label_range: the least and greatest label of a regression.
        metric: of METRICS; F1 of whole entities for BIO tags and their kin, accuracy for others.
        limit: draw at most so many rows of each split, by `seed`.
        on_bad: what to do with an empty text, an empty label, or an answer that is not where it
            should be: "error", or "drop" to leave the row out and count it. By default "drop" for
            sets known by name and "error" for others.
        allow_empty_classes: accept a class that no training example has.
        like: the named set whose columns this one has: "hf:snli" for a copy in a folder.
        config: of "hf:NAME".
        data_dir, download: of "tfds:NAME", see `sources.tfds_source`.

    Raises:
        FileNotFoundError: a path does not exist, or there is no such set.
        ValueError: there is nothing to evaluate on, a column is missing, a row is bad (file and
            line are named), a label is not among those of train, a class has no example, or the
            metric is not of the kind.
    """
    spec = str(spec)
    local = sources.is_local(spec)
    named = known_datasets.known(like) if like else None if local else known_datasets.find(spec)
    for what, word, known in (("kind", kind, METRICS), ("on_bad", on_bad, ("error", "drop"))):
        if word is not None and word not in known:
            raise ValueError(f"unknown {what} {word!r}; choose one of {', '.join(known)}")
    on_bad = on_bad or ("drop" if named else "error")
    if sum(x is not None for x in (validation, held_out, validation_share)) > 1:
        raise ValueError("give one of validation, held_out and validation_share")
    if header is not None and not local:
        raise ValueError(f"header is {list(header)}, but {spec} is no file")
    own_split = held_out is not None or validation_share is not None
    if local:
        splits = splits_of.files(
            Path(spec), validation, own_split, header, validation_header or header)
    else:
        read = functools.partial(splits_of.library, spec, named, config, data_dir, download)
        named_split = str(validation or (named.validation if named else "validation"))
        splits = [read("train", own_split), *([] if own_split else [read(named_split, False)])]
    if own_split:
        splits = splits_of.divide(splits[0], held_out, validation_share, seed)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; draw at least 1 row")
        splits = [split.take(np.sort(np.random.default_rng(seed).permutation(len(split.rows))
                                     [:limit])) for split in splits]
    train, test = splits
    kind, columns = _form(train, kind, columns, named)
    names = label_names or _names(kind, columns, named)
    bounds = label_range or (named.label_range if named else None)
    numbers = _numbers(kind, columns, splits, names, validation_label_names or names, bounds)
    examples, dropped = [], {}
    for name, split, number in zip(("train", "validation"), (train, test), numbers):
        found, count = _canonical(kind, split, columns, number, on_bad)
        examples.append(found)
        dropped[name] = dict(count)
    labels = numbers[0].names if isinstance(numbers[0], rows.Labels) else ()
    if kind == "classification" and not allow_empty_classes:
        _check_classes(examples[0], labels, spec)
    if kind == "multiple_choice":
        _check_choices(examples, spec)
    if kind == "regression":
        scores = [example["label"] for example in examples[0]]
        bounds = bounds or (min(scores), max(scores))
        if bounds[0] == bounds[1]:
            raise ValueError(f"{spec}: all labels of train are {bounds[0]:g}; a regression needs "
                             "different ones, or a label_range")
    metric = metric or (named.metric if named and named.kind == kind else "") or (
        "accuracy" if kind == "token_classification" and not all(map(_is_of_entity, labels))
        else METRICS[kind][0])
    if metric not in METRICS[kind]:
        raise ValueError(f"metric {metric!r} is none of {kind}; choose one of "
                         f"{', '.join(METRICS[kind])}")
    return LabeledDataset(kind, *examples, label_names=labels if kind.endswith("classification") else (),
                     metric=metric,
                     label_range=bounds if kind == "regression" else None, dropped=dropped)


# Columns ------------------------------------------------------------------------------------------

# Where the names of the columns tell what they are; the first that is there counts.
USUAL = {
    "text": ("text", "sentence", "sentence1", "question1", "premise"),
    "text_b": ("text_b", "sentence2", "question2", "hypothesis"),
    "words": ("words", "tokens"),
    "tags": ("tags", "ner_tags"),
    "source": ("source", "document", "dialogue", "article"),
    "target": ("target", "summary", "highlights"),
}


def _form(
    train: Split, kind: str | None, columns: Columns | None, named: KnownDataset | None
) -> tuple[str, dict[str, str | tuple[str, ...]]]:
    """The kind, and a column for each canonical name."""
    row = train.rows[0]
    given = {name: c if isinstance(c, str) else tuple(c) for name, c in (columns or {}).items()}
    if named is not None and kind in (None, named.kind):
        kind, found = named.kind, dict(named.columns)
    else:
        guess = {name: next((c for c in USUAL.get(name, (name,)) if c in row), None)
                 for name in rows.CANONICAL}
        found = {name: c for name, c in guess.items() if c}
    if "text" in given and "text_b" not in given:
        found.pop("text_b", None)  # one text was asked for
    found |= given
    kind = kind or _kind(train, found)
    allowed = {*rows.NEEDS[kind], *rows.MAY_HAVE.get(kind, ()), "id"}
    if strange := sorted(set(given) - allowed):
        near = difflib.get_close_matches(strange[0], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}; " if near else ""
        raise ValueError(f"columns names {strange[0]!r}, which {kind} has not; {hint}"
                         f"it has {', '.join(sorted(allowed))}")
    needs = set(rows.NEEDS[kind])
    if {"answer", "start"} <= found.keys() and "answers" not in found:
        needs = needs - {"answers"} | {"answer", "start"}
    if missing := sorted(needs - found.keys()):
        raise ValueError(f"{train.where(0)}: no column for {', '.join(missing)} of {kind}; name "
                         f"it by columns, among {', '.join(map(repr, row))}")
    return kind, {name: c for name, c in found.items() if name in allowed}


def _kind(train: Split, found: Mapping[str, Any]) -> str:
    if "question" in found and "context" in found and {"answers", "answer"} & found.keys():
        return "question_answering"
    for kind in ("multiple_choice", "token_classification", "classification", "seq2seq"):
        if set(rows.NEEDS[kind]) <= found.keys():
            break
    else:
        raise ValueError(
            f"{train.where(0)}: the columns {', '.join(map(repr, train.rows[0]))} do not tell what "
            "to learn; give kind, and columns such as {'text': ..., 'label': ...}")
    if kind == "classification" and found["label"] not in train.class_names and rows.are_scores(
            splits_of.values(train, found["label"])):
        return "regression"
    return kind


# Labels -------------------------------------------------------------------------------------------


def _names(kind: str, columns: Columns, named: KnownDataset | None) -> tuple[str, ...] | None:
    """Of the named set, unless other labels of it were asked for."""
    same = named is not None and named.kind == kind and (
        named.columns.get("label") == columns.get("label"))
    return (named.label_names or None) if same else None


def _numbers(
    kind: str, columns: Columns, splits: Sequence[Split], names: Any, validation_names: Any,
    bounds: tuple[float, float] | None,
) -> list[Callable]:
    """What reads the labels of train, and of validation."""
    if kind == "regression":
        low, high = bounds or (-np.inf, np.inf)
        if not low < high:
            raise ValueError(f"label_range is {bounds}; give the least and the greatest label")
        return [rows.score(low, high)] * 2
    if kind in ("question_answering", "seq2seq"):
        return [rows.choice_number] * 2  # not asked
    if kind == "multiple_choice" and names is None:
        return [rows.choice_number] * 2
    column = columns["tags" if kind == "token_classification" else "label"]
    classes = [split.class_names.get(column) for split in splits]
    if names is None and classes[0] is None:
        values = splits_of.values(splits[0], column)
        if kind == "token_classification":
            values = [tag for tags in values
                      for tag in (tags.split() if isinstance(tags, str) else tags)]
        labels = rows.infer(values)
        if len(labels.names) < 2:
            raise ValueError(f"{splits[0].where(0)}: all labels in column {column!r} are "
                             f"{labels.names[0] if labels.names else ''!r}; give at least 2 "
                             "classes")
        train = labels
    else:
        train = rows.declare(names or classes[0], classes[0])
    if validation_names is names:
        if classes[0] == classes[1]:
            return [train] * 2
        validation_names = train.names
    test = rows.declare(validation_names, classes[1])
    if strange := sorted(set(test.names) - set(train.names)):
        raise ValueError(f"validation has a class {strange[0]!r} that train lacks; "
                         f"train has {', '.join(train.names)}")
    number = {word: train.names.index(test.names[i]) for word, i in test.number.items()}
    return [train, rows.Labels(train.names, number, True)]


def _canonical(
    kind: str, split: Split, columns: Columns, number: Callable, on_bad: str
) -> tuple[list[Example], collections.Counter]:
    """Examples, and how many rows were left out for which reason."""
    examples, dropped = [], collections.Counter()
    for i in range(len(split.rows)):
        row = split.rows[i]
        try:
            examples.append(rows.canonical(kind, row, columns, number))
        except ValueError as error:
            if isinstance(error, rows.BadRow) and (
                    on_bad == "drop" or error.reason == rows.NO_LABEL):
                dropped[error.reason] += 1
                continue
            name = f" (id {row[columns['id']]})" if columns.get("id") in row else ""
            raise ValueError(f"{split.where(i)}{name}: {error}") from None
    if not examples:
        raise ValueError(f"{split.where(0)} and all others are left out: {dict(dropped)}; "
                         "this split has no annotations to use")
    return examples, dropped


def _is_of_entity(tag: str) -> bool:
    """Whether a tag marks a place in an entity, as BIO and its kin do; parts of speech do not."""
    return tag in ("O", "B", "I") or re.match(r"[BILUSE]-.", tag) is not None


def _check_classes(train: Sequence[Example], names: Sequence[str], spec: str) -> None:
    present = {example["label"] for example in train}
    if empty := [name for i, name in enumerate(names) if i not in present]:
        raise ValueError(f"{spec}: no training example among {len(train)} has the label "
                         f"{', '.join(map(repr, empty))}; mend label_names, raise the limit, or "
                         "set allow_empty_classes")


def _check_choices(splits: Sequence[Sequence[Example]], spec: str) -> None:
    counts = sorted({len(example["choices"]) for split in splits for example in split})
    if len(counts) > 1:
        raise ValueError(f"{spec}: examples have {', '.join(map(str, counts))} choices; "
                         "give all the same number")


# Few labels ---------------------------------------------------------------------------------------


def subsample_balanced(
    examples: Sequence[Example], per_class: int | None = None, seed: int = 0, *,
    total: int | None = None,
) -> Sequence[Example]:
    """Some of the examples, drawn by seed: so many of every class, or so many in all.

    Of `total` the classes get equal shares as long as they last, and a smaller draw by the same
    seed is the beginning of a larger one. Examples without classes, such as those of a regression,
    are of one class. With neither number all examples are returned.

    Raises:
        ValueError: there are fewer, or both numbers are given.
    """
    if per_class is not None and total is not None:
        raise ValueError(f"{per_class} labels a class and {total} in all were asked for; give one")
    if per_class is None and total is None:
        return examples
    if per_class is not None and per_class < 1:
        raise ValueError(f"{per_class} labels a class were asked for; give at least 1")
    by_class: dict[Any, list[Example]] = {}
    for i in np.random.default_rng(seed).permutation(len(examples)):
        label = examples[int(i)].get("label")
        label = label if isinstance(label, (int, np.integer)) else None
        by_class.setdefault(label, []).append(examples[int(i)])
    if total is not None:
        if not 0 < total <= len(examples):
            raise ValueError(f"{total} examples were asked for, but there are {len(examples)}; "
                             "lower total")
        rounds = ((turn, k, example) for k, found in enumerate(by_class.values())
                  for turn, example in enumerate(found))
        return [example for *_, example in sorted(rounds, key=lambda r: r[:2])[:total]]
    scarce = {label: len(found) for label, found in by_class.items() if len(found) < per_class}
    if scarce:
        raise ValueError(f"{per_class} labels a class were asked for, but classes have only "
                         f"{scarce}; lower labels_per_class")
    return [example for found in by_class.values() for example in found[:per_class]]
