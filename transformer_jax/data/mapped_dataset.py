"""Random access to TFDS and Hugging Face datasets, with examples as dicts of Python values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class MappedDataset:
    """A sequence that applies a function to an example each time it is accessed.

    Args:
        rows: the examples, with random access.
        fn: function of an example that returns a dict.
        class_names: names of the classes of each feature that has them.

    Attributes:
        class_names: feature -> names of its classes, for all features with class names.
        label_names: class names of the feature "label"; if it has none, those of the only feature
            that has class names; None if there is no such feature or more than one.

    Example:
        >>> dataset = MappedDataset([0, 1], lambda row: {"label": row}, {"label": ["no", "yes"]})
        >>> dataset[1], dataset.label_names
        ({'label': 1}, ('no', 'yes'))
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
            raise IndexError(f"example {i} is out of range; there are {len(self)} examples, "
                             "counted from 0")
        return self._fn(self._rows[int(i) % len(self)])


def from_tfds_builder(builder: Any, split: str) -> MappedDataset:
    """Returns a split of a prepared TFDS builder, with bytes decoded to str.

    Raises:
        ValueError: the dataset is prepared in a file format without random access.
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
    return MappedDataset(rows, _decode_bytes, classes)


def from_hf_dataset(dataset: Any) -> MappedDataset:
    """Returns a `datasets.Dataset` as a `MappedDataset`, with the names of its ClassLabel features.

    Does not import the `datasets` library.
    """
    classes = {}
    for key, feature in dataset.features.items():
        item = getattr(feature, "feature", feature)  # a list feature has the feature of its items
        if getattr(item, "names", None):
            classes[key] = item.names
    return MappedDataset(dataset, dict, classes)


def _decode_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _decode_bytes(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list):
        return [_decode_bytes(item) for item in value]
    return value
