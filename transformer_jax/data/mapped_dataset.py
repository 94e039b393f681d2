"""TFDS and Hugging Face datasets, with random access and with examples as dicts.

This module does not import TensorFlow: TFDS reads array_record files without it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.errors import did_you_mean


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


# Loading by name --------------------------------------------------------------------------------


def load_tfds(
    name: str, split: str, data_dir: str | Path | None = None, download: bool = False
) -> MappedDataset:
    """Loads a split of a TFDS dataset through `as_data_source` of its builder, without TensorFlow.

    The dataset must be prepared in the array_record format. Byte strings are decoded to str; class
    labels are integers.

    Args:
        name: name of the dataset, such as "glue/sst2".
        split: name of the split; TFDS slices such as "train[:10%]" work.
        data_dir: folder of TFDS's data; TFDS's default if None.
        download: whether to download and prepare the dataset first if necessary.

    Raises:
        ValueError: unknown dataset or split.
        FileNotFoundError: the dataset is not prepared.
    """
    import tensorflow_datasets as tfds

    where = "" if data_dir is None else f" in {data_dir}"
    options: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    try:
        # The file format is chosen when a dataset is prepared. Later, TFDS detects it.
        if download:
            options["file_format"] = "array_record"
        builder = _tfds_builder(name, **options)
        if download:
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(f"unknown TFDS dataset {name!r}; "
                         f"{did_you_mean(name, sorted(known))}") from None
    splits = builder.info.splits
    if splits and split not in splits and "[" not in split and "+" not in split:
        raise ValueError(f"unknown split of {name} {split!r}; {did_you_mean(split, splits)}")
    try:
        return from_tfds_builder(builder, split)
    except (AssertionError, ValueError) as error:
        if splits:
            raise
        raise FileNotFoundError(f"the TFDS dataset {name} is not prepared{where}; call "
                                "download_and_prepare() of tfds.builder(..., "
                                "file_format='array_record'), or use download=True") from error


def _tfds_builder(name: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError:
        # Many builders, such as those of GLUE, are registered only when their module is imported.
        for module in ("text", "summarization", "translate", "question_answering"):
            importlib.import_module(f"tensorflow_datasets.{module}")
        return tfds.builder(name, **options)


def load_hf(name: str | Path, split: str, **options: Any) -> MappedDataset:
    """Loads a split of a Hugging Face dataset.

    Args:
        name: "OWNER/NAME", "OWNER/NAME/CONFIG", or the path of a folder. A folder of
            `DatasetDict.save_to_disk`, or of `Dataset.save_to_disk`, which has no splits, is loaded
            by `datasets.load_from_disk`, and anything else by `datasets.load_dataset`. A revision
            on the Hub may follow after "@".
        split: name of the split.
        options: options of `datasets.load_dataset`.

    Raises:
        ModuleNotFoundError: the `datasets` library is not installed.
        ValueError: unknown split.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ModuleNotFoundError(f"loading {name!r} needs the datasets library; "
                                  "pip install transformer_jax[hf]") from None
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        dataset = datasets.load_from_disk(str(folder))
    else:
        path, config = str(name), None
        if not folder.exists():
            path, _, revision = path.partition("@")
            parts = path.split("/", 2)
            path, config = "/".join(parts[:2]), "".join(parts[2:]) or None
            options |= {"revision": revision} if revision else {}
        dataset = datasets.load_dataset(path, config, **options)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"unknown split of {name} {split!r}; {did_you_mean(split, dataset)}")
        dataset = dataset[split]
    return from_hf_dataset(dataset)
