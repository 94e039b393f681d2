"""TFDS and Hugging Face datasets, with random access and with examples as dicts.

This module does not import TensorFlow: TFDS reads array_record files without it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.errors import did_you_mean

Example = dict[str, Any]


class MappedDataset:
    """A sequence that applies `fn`, which returns a dict, to a row each time it is accessed.

    Attributes:
        class_names: feature -> names of its classes, for all features with class names.
        label_names: class names of the feature "label", else of the only feature that has some, or
            None.

    Example:
        >>> dataset = MappedDataset([0, 1], lambda row: {"label": row}, {"label": ["no", "yes"]})
        >>> dataset[1], dataset.label_names
        ({'label': 1}, ('no', 'yes'))
    """

    def __init__(
        self, rows: Sequence, fn: Callable[[Any], Example], class_names: Mapping[str, Sequence[str]]
    ):
        self._rows, self._fn = rows, fn
        self.class_names = {key: tuple(names) for key, names in class_names.items()}
        only = next(iter(self.class_names.values())) if len(self.class_names) == 1 else None
        self.label_names = self.class_names.get("label", only)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} is out of range; there are {len(self)} examples, "
                             "counted from 0")
        return self._fn(self._rows[int(i) % len(self)])


def from_tfds_builder(builder: Any, split: str) -> MappedDataset:
    """Returns a split of a prepared TFDS builder, with bytes decoded to str; raises ValueError if
    it is prepared in a file format without random access."""
    classes = {key: feature.names for key, feature in builder.info.features.items()
               if getattr(feature, "names", None)}
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{builder.info.full_name} is prepared as {builder.info.file_format}, "
                         "which has no random access; prepare it with "
                         "file_format='array_record'") from None
    return MappedDataset(rows, _decode_bytes, classes)


def from_hf_dataset(dataset: Any) -> MappedDataset:
    """Returns a `datasets.Dataset` with the names of its ClassLabel features.

    Does not import the `datasets` library.
    """
    # A list feature has the feature of its items.
    items = {key: getattr(f, "feature", f) for key, f in dataset.features.items()}
    return MappedDataset(dataset, dict, {
        key: item.names for key, item in items.items() if getattr(item, "names", None)})


def _decode_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _decode_bytes(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return [_decode_bytes(item) for item in value] if isinstance(value, list) else value


def load_tfds(
    name: str, split: str, data_dir: str | Path | None = None, download: bool = False
) -> MappedDataset:
    """Loads a split of a TFDS dataset, which must be prepared in the array_record format.

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
        builder = _tfds_builder(
            name, **options, **({"file_format": "array_record"} if download else {}))
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
        from transformer_jax.data import python_docs  # noqa: F401  (the same)
        return tfds.builder(name, **options)


def load_hf(name: str | Path, split: str, **options: Any) -> MappedDataset:
    """Loads a split of a Hugging Face dataset; `options` are those of `datasets.load_dataset`.

    Args:
        name: "OWNER/NAME", "OWNER/NAME/CONFIG", or the path of a folder. A folder of
            `DatasetDict.save_to_disk`, or of `Dataset.save_to_disk`, which has no splits, is loaded
            by `datasets.load_from_disk`, and anything else by `datasets.load_dataset`. A revision
            on the Hub may follow after "@".

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
