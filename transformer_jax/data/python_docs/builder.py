"""The TFDS builder, and `load`, which prepares it on first use."""

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

from transformer_jax.data.mapped_dataset import MappedDataset, from_builder
from transformer_jax.data.python_docs import examples

SPLITS = examples.SPLITS


class Content(NamedTuple):
    """What a config holds: a description, features, and the examples by split."""

    description: str
    features: Callable[[], dict]
    examples: Callable[[], dict[str, list[dict]]]


def _texts(*names: str) -> Callable[[], dict]:
    return lambda: {name: tfds.features.Text() for name in names}


CONFIGS = {
    "documents": Content(
        "A module's docstrings, or a topic of the language reference: one sentence a line, a blank "
        "line between paragraphs.",
        _texts("name", "text"),
        examples.documents,
    ),
    "topics": Content(
        "A docstring and the part of the standard library that it comes from. Its validation and "
        "test texts may stand, without labels, in the train split of documents: pre-training may "
        "see the text of a task, as is usual in transfer learning, never its answers.",
        lambda: {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(examples.TOPICS)),
        },
        examples.topics,
    ),
    "summaries": Content(
        "A docstring without its first sentence, and that sentence, which sums it up.",
        _texts("body", "summary"),
        examples.summaries,
    ),
}


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Documentation of the Python that runs: docstrings and pydoc's topics.

    Nothing is downloaded. The text differs a little between Python versions; the split of a
    document or text does not.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name is TFDS's)
        tfds.core.BuilderConfig(name=name, description=content.description)
        for name, content in CONFIGS.items()
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
        by_split = CONFIGS[self.builder_config.name].examples()
        return {split: self._generate_examples(found) for split, found in by_split.items()}

    def _generate_examples(self, found: list[dict]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(found)


def load(config: str, split: str, data_dir: str | Path | None = None) -> MappedDataset:
    """A split of a config, prepared on first use (some seconds): random access to examples.

    Args:
        config: "documents" {"name", "text"}, "topics" {"text", "label"} with `label_names`, or
            "summaries" {"body", "summary"}.
        split: "train", "validation" or "test".
        data_dir: see `prepare`.

    Raises:
        ValueError: unknown config or split.
        FileNotFoundError: this Python has no documentation.
    """
    for what, word, known in (("config", config, CONFIGS), ("split", split, SPLITS)):
        if word not in known:
            raise ValueError(f"unknown {what} {word!r} of python_docs; "
                             f"choose one of {', '.join(known)}")
    folder = prepare(data_dir)
    return from_builder(PythonDocs(config=config, data_dir=folder), split)


def prepare(data_dir: str | Path | None = None) -> Path:
    """The folder with all configs for this Python, made if it is not there.

    It lies in `data_dir`, by default $TRANSFORMER_JAX_CACHE or ~/.cache/transformer_jax, and its
    name tells the versions of Python, of the data set and of the code that makes it. It is written
    elsewhere and renamed, so other processes see all of it or nothing; when two are at it, the
    first to finish wins.
    """
    default = os.environ.get("TRANSFORMER_JAX_CACHE") or Path("~/.cache/transformer_jax")
    cache = Path(data_dir or default).expanduser()
    folder = cache / (f"python_docs-{PythonDocs.VERSION}-{_code_version()}"
                      f"-py{platform.python_version()}")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".python_docs-", dir=cache))
    try:
        for config in CONFIGS:
            with _silence():
                PythonDocs(config=config, data_dir=building,
                           file_format="array_record").download_and_prepare()
        building.chmod(0o755)  # mkdtemp lets nobody else in
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _code_version() -> str:
    """Changes with the code that makes the examples, so that no stale cache is read."""
    digest = hashlib.sha1()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """TFDS prints and draws bars; a few seconds are not worth that."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
