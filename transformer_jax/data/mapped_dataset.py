"""Sequences of examples that are read, and made plain Python, one at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class MappedDataset:
    """A random-access sequence whose examples pass through `fn`, with the names of its labels.

    Attributes:
        label_names: of the feature "label" if it has class names, else of the only feature that
            has; None where none or several have.
        class_names: feature -> names, for all features with class names.
    """

    def __init__(
        self,
        rows: Sequence,
        fn: Callable[[Any], dict[str, Any]],
        class_names: Mapping[str, Sequence[str]],
    ):
        self._rows, self._fn = rows, fn
        self.class_names = {key: tuple(names) for key, names in class_names.items()}

    @property
    def label_names(self) -> tuple[str, ...] | None:
        only = next(iter(self.class_names.values())) if len(self.class_names) == 1 else None
        return self.class_names.get("label", only)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}; count from 0")
        return self._fn(self._rows[int(i) % len(self)])


def from_builder(builder: Any, split: str) -> MappedDataset:
    """A split of a prepared TFDS builder, with str for bytes.

    Raises:
        ValueError: it is prepared in a file format without random access.
    """
    features = builder.info.features
    classes = {key: feature.names for key, feature in features.items()
               if getattr(feature, "names", None)}
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{builder.info.full_name} is prepared as {builder.info.file_format}, "
                         "which has no random access; prepare it with "
                         "file_format='array_record'") from None
    return MappedDataset(rows, _to_text, classes)


def _to_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_text(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list):
        return [_to_text(item) for item in value]
    return value
