"""The TFDS builder of python_docs, and `load`, which builds the dataset on first use."""

import contextlib
import hashlib
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from transformer_jax.data.mapped_dataset import MappedDataset, from_tfds_builder
from transformer_jax.data.python_docs import examples

SPLITS = examples.SPLITS


class ConfigSpec(NamedTuple):
    """A config of the dataset: its description, its features, and its examples by split."""

    description: str
    features: Callable[[], dict]
    examples: Callable[[], dict[str, list[dict]]]


def _text_features(*names: str) -> Callable[[], dict]:
    return lambda: {name: tfds.features.Text() for name in names}


CONFIGS = {
    "documents": ConfigSpec(
        "A module's docstrings, or a topic of the language reference: one sentence per line, a "
        "blank line between paragraphs.",
        _text_features("name", "text"),
        examples.documents,
    ),
    "topics": ConfigSpec(
        "A docstring and the part of the standard library that it comes from. The texts of its "
        "validation and test splits may also occur in the train split of `documents`, without "
        "their labels: as is usual in transfer learning, pre-training may see the text of a task "
        "but never its labels.",
        lambda: {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(examples.TOPICS)),
        },
        examples.topics,
    ),
    "summaries": ConfigSpec(
        "A docstring without its first sentence, and that sentence as its summary.",
        _text_features("body", "summary"),
        examples.summaries,
    ),
}


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Documentation of the running Python: docstrings of the standard library and pydoc's topics.

    Nothing is downloaded. The text differs slightly between Python versions; the split that a
    document or text belongs to does not.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS requires this name)
        tfds.core.BuilderConfig(name=name, description=config.description)
        for name, config in CONFIGS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__}\n{self.builder_config.description}",
            features=tfds.features.FeaturesDict(CONFIGS[self.builder_config.name].features()),
            homepage="https://docs.python.org",
            license="Python Software Foundation License",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        splits = CONFIGS[self.builder_config.name].examples()
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: list[dict]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(rows)


def load(config: str, split: str, data_dir: str | Path | None = None) -> MappedDataset:
    """Loads a split of a config with random access. The first call builds the dataset in seconds.

    Args:
        config: "documents" with the features "name" and "text", "topics" with "text" and "label",
            or "summaries" with "body" and "summary".
        split: "train", "validation" or "test".
        data_dir: where the folder of the dataset is created; see `build`.

    Raises:
        ValueError: unknown config or split.
        FileNotFoundError: this Python installation has no documentation.
    """
    for what, word, known in (("config", config, CONFIGS), ("split", split, SPLITS)):
        if word not in known:
            raise ValueError(f"unknown {what} {word!r} of python_docs; "
                             f"choose one of {', '.join(known)}")
    folder = build(data_dir)
    return from_tfds_builder(PythonDocs(config=config, data_dir=folder), split)


def build(data_dir: str | Path | None = None) -> Path:
    """Builds all configs for the running Python unless they exist; returns their folder.

    The name of the folder contains the versions of Python, of the dataset and of the code that
    generates the examples. The dataset is written to a temporary folder, which is then renamed, so
    other processes never see an incomplete dataset. If two processes build it at the same time, the
    result of the first to finish is used.

    Args:
        data_dir: where the folder is created; $TRANSFORMER_JAX_CACHE or ~/.cache/transformer_jax if
            None.

    Raises:
        FileNotFoundError: this Python installation has no documentation.
    """
    default = os.environ.get("TRANSFORMER_JAX_CACHE") or Path("~/.cache/transformer_jax")
    cache = Path(data_dir or default).expanduser()
    folder = cache / (f"python_docs-{PythonDocs.VERSION}-{_code_version()}"
                      f"-py{platform.python_version()}")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".python_docs-", dir=cache))
    try:
        for config in CONFIGS:
            with _silence():
                PythonDocs(config=config, data_dir=temporary,
                           file_format="array_record").download_and_prepare()
        temporary.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _code_version() -> str:
    """Returns a digest of this package's code, so that a dataset of older code is not reused."""
    digest = hashlib.sha1()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the progress bars and messages of TFDS, because a build takes only seconds."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
