"""Encoding of labels, as they occur in the data, as class ids, scores or choice indices."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

EncodeLabel = Callable[[Any], float]
"""Function that encodes the label of a row as a class id, a score, or the index of a choice."""


class DroppableRowError(ValueError):
    """An invalid row that a caller may drop instead of failing.

    Attributes:
        reason: category of the error. Dropped rows are counted by reason.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


NO_LABEL = "no label"
"""`DroppableRowError.reason` of a row without a label, because annotators did not agree or because
the labels are not published."""


def to_python(value: Any) -> Any:
    """Converts a NumPy scalar or array to plain Python."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def label_text(value: Any) -> str:
    """Returns the canonical text of a label, which is used to compare labels.

    The text of 1, 1.0 and "1" is the same; that of a missing value (None, NaN) is "".

    Example:
        >>> label_text(1.0), label_text(" 1 "), label_text(True), label_text(None)
        ('1', '1', 'true', '')
    """
    value = to_python(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


# Classes ------------------------------------------------------------------------------------------


class LabelEncoder(NamedTuple):
    """Callable that maps the labels in the data to class ids.

    Attributes:
        names: names of the classes, in the order of their ids.
        class_ids: text of a label in the data -> class id.
        is_declared: whether the classes were declared by the user or the dataset. If not, they were
            inferred from the labels in the data.
    """

    names: tuple[str, ...]
    class_ids: Mapping[str, int]
    is_declared: bool

    def __call__(self, value: Any) -> int:
        """Returns the class id of a label.

        Raises:
            DroppableRowError: the label is empty; or the classes are declared and the label is -1
                or "-", which mean that the row has no label.
            ValueError: no class has this label.
        """
        label = label_text(value)
        if label in self.class_ids:
            return self.class_ids[label]
        if not label:
            raise DroppableRowError("empty label", "the label is empty; add one")
        if self.is_declared and label in ("-1", "-"):
            raise DroppableRowError(NO_LABEL, f"the label {label!r} means that there is no label")
        known = ", ".join(list(self.class_ids)[:20])
        raise ValueError(f"label {label!r} is not among the training labels {known}; "
                         "fix the row, or give label_names")


def encoder_from_names(
    names: Sequence[str] | Mapping[str, str], class_names: Sequence[str] | None = None
) -> LabelEncoder:
    """Returns the encoder of declared classes.

    Args:
        names: names of the classes, in the order of their ids; or label in the data -> name of its
            class, `{"1": "neutral", ...}`.
        class_names: class names of the dataset, if its labels are integers with class names.
            `names` then renames these classes: a sequence in the same order, or a mapping whose
            keys are the class names.

    Raises:
        ValueError: `names` has fewer than two classes, a sequence has names that are not all
            different, or its length is not the number of classes of the dataset.

    Example:
        >>> encode = encoder_from_names({"1": "negative", "2": "positive"})
        >>> encode.names, encode("2")
        (('negative', 'positive'), 1)
    """
    if isinstance(names, Mapping):
        name_of = {label_text(key): str(name) for key, name in names.items()}
        unique = tuple(dict.fromkeys(name_of.values()))
        if len(unique) < 2:
            raise ValueError(f"label_names is {dict(names)!r}; give at least 2 classes")
        class_ids = {label: unique.index(name) for label, name in name_of.items()}
        if class_names is not None:
            class_ids |= {str(i): class_ids[name] for i, name in enumerate(class_names)
                          if name in class_ids}
        return LabelEncoder(unique, class_ids, True)
    unique = tuple(map(str, names))
    if isinstance(names, str) or len(set(unique)) < max(len(unique), 2):
        raise ValueError(f"label_names is {names!r}; give at least 2 names, all different")
    if class_names is not None and len(class_names) != len(unique):
        raise ValueError(f"label_names has {len(unique)} names, but the dataset has "
                         f"{len(class_names)} classes: {', '.join(class_names)}")
    class_ids = {name: i for i, name in enumerate(unique)}
    if class_names is not None or not any(map(is_integer, unique)):
        class_ids |= {str(i): i for i in range(len(unique))}
    return LabelEncoder(unique, class_ids, True)


def encoder_from_values(values: Iterable[Any]) -> LabelEncoder:
    """Returns an encoder whose classes are the labels that occur in the data.

    The labels are sorted as numbers if all of them are integers, else as text.

    Example:
        >>> encoder_from_values(["pos", "neg", "pos"]).names
        ('neg', 'pos')
    """
    labels = {label_text(value) for value in values} - {""}
    names = tuple(sorted(labels, key=int) if all(map(is_integer, labels)) else sorted(labels))
    return LabelEncoder(names, {name: i for i, name in enumerate(names)}, False)


# Scores and choices -------------------------------------------------------------------------------


def are_scores(values: Iterable[Any]) -> bool:
    """Returns whether labels are scores: all of them are numbers, and not all are integers.

    Empty labels are ignored.
    """
    try:
        numbers = [float(label) for label in map(label_text, values) if label]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and not all(map(float.is_integer, numbers))


def score_encoder(low: float, high: float) -> EncodeLabel:
    """Returns a function that converts the label of a regression to a float.

    The function raises DroppableRowError if the label is empty, and ValueError if it is not a
    number from `low` to `high`.
    """
    def encode(value: Any) -> float:
        label = label_text(value)
        if not label:
            raise DroppableRowError("empty label", "the label is empty; add one")
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {label!r} is not a number; fix the row")
        if not low <= number <= high:
            raise ValueError(f"label {number} is outside the range {low} to {high}; "
                             "fix the row, or change label_range")
        return number

    return encode


def encode_choice(value: Any) -> int:
    """Returns the index of a choice: 0 for the labels 0, "0" and "A".

    Raises:
        DroppableRowError: the label is empty or -1.
        ValueError: the label is neither a number nor a capital letter.
    """
    label = label_text(value)
    if label in ("", "-1"):
        raise DroppableRowError(NO_LABEL, f"the label {label!r} means that there is no label")
    if len(label) == 1 and "A" <= label <= "Z":
        return ord(label) - ord("A")
    if not label.isdecimal():
        raise ValueError(f"label {label!r} is not the index of a choice; give an index counted "
                         "from 0, or a letter from A")
    return int(label)
