"""python_docs: a text corpus made from the documentation in a Python installation.

It needs no download. It is a TFDS builder, registered when this package is imported: use
`tfds.builder("python_docs/documents")` or `python_docs.load("documents", "train")`.
"""

import contextlib
import functools
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
from transformer_jax.data.python_docs import prose

__all__ = ["CONFIGS", "SPLITS", "PythonDocs", "build", "load"]

SPLITS = ("train", "validation", "test")

# Class of `topics` -> its packages and modules of the standard library. All of them exist in every
# Python since 3.11, with at least 80 examples per class.
TOPICS = {
    "asyncio": ("asyncio",),
    "concurrency": ("concurrent", "multiprocessing", "queue", "sched", "subprocess", "threading"),
    "email": ("email", "imaplib", "mailbox", "poplib", "quopri", "smtplib"),
    "files": ("fileinput", "glob", "pathlib", "shutil", "tarfile", "tempfile", "zipfile"),
    "graphics": ("tkinter", "turtle"),
    "idlelib": ("idlelib",),
    "importlib": ("importlib", "pkgutil", "runpy", "zipimport"),
    "logging": ("logging",),
    "numbers": ("_pydecimal", "colorsys", "fractions", "numbers", "random", "statistics"),
    "testing": ("doctest", "unittest"),
    "web": ("http", "urllib", "webbrowser", "wsgiref", "xmlrpc"),
    "xml": ("html", "plistlib", "xml"),
}
MAX_PER_TOPIC = 300  # keeps the accuracy of always predicting the largest class low
MIN_TEXT_WORDS = 5
MIN_BODY_WORDS = 20
MIN_SUMMARY_WORDS = 3
MIN_DOCUMENT_WORDS = 20
MIN_DOCSTRINGS = 500  # a complete installation has over 7,000

# Examples -----------------------------------------------------------------------------------------

Keyed = Iterator[tuple[str, dict]]  # examples, each with the key that determines its split


def assign_split(key: str, shares: tuple[float, float]) -> str:
    """Returns the split of an example by a hash of its key; `shares` are those of validation and
    test. The split is the same in every run and Python version.

    Example:
        >>> [assign_split(name, (0.25, 0.25)) for name in ("logging", "topics/if", "abc")]
        ['test', 'validation', 'train']
    """
    position = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 16**8  # uniform in [0, 1)
    validation, test = shares
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"


@functools.cache
def _clean_docstrings() -> list[tuple[str, list[list[str]]]]:
    """Returns (module, paragraphs of sentences) of every docstring."""
    docstrings = [(module, prose.paragraphs(text)) for module, text in prose.docstrings()]
    if len(docstrings) < MIN_DOCSTRINGS:
        raise FileNotFoundError(
            f"this Python has {len(docstrings)} docstrings in the source files of its standard "
            f"library; python_docs needs {MIN_DOCSTRINGS}. Use a Python that was installed with "
            "its .py files, or train on text files")
    return docstrings


def _documents() -> Keyed:
    """All docstrings of a module in order, or a topic of pydoc.

    A paragraph of several documents is kept only in the first, so none is in two splits.
    """
    by_name: dict[str, list[list[str]]] = {}
    for module, paragraphs in _clean_docstrings():
        by_name.setdefault(module, []).extend(paragraphs)
    for name, text in prose.topics().items():
        by_name[f"topics/{name}"] = prose.paragraphs(text)
    seen: set[str] = set()
    for name, paragraphs in sorted(by_name.items()):
        unseen = []
        for paragraph in paragraphs:
            key = " ".join(paragraph).lower()
            if key not in seen:
                seen.add(key)
                unseen.append(paragraph)
        text = prose.sentence_lines(unseen)
        if len(text.split()) >= MIN_DOCUMENT_WORDS:
            yield name, {"name": name, "text": text}


def _topics() -> Keyed:
    """A docstring and the topic of its module; a text under two topics is left out."""
    topic_of = {package: topic for topic, packages in TOPICS.items() for package in packages}
    found: dict[str, tuple[str, set[str]]] = {}  # lower-case text -> first original, its topics
    for module, paragraphs in _clean_docstrings():
        topic = topic_of.get(module.split(".")[0])
        text = prose.running_text(paragraphs)
        if topic and len(text.split()) >= MIN_TEXT_WORDS:
            found.setdefault(" ".join(text.lower().split()), (text, set()))[1].add(topic)
    count = dict.fromkeys(TOPICS, 0)
    # Texts are sorted by a hash, so that a pseudo-random sample of a large class is kept. The
    # prefix makes this hash independent of the hash that determines the split.
    for key in sorted(found, key=lambda key: hashlib.sha1(b"order" + key.encode()).digest()):
        text, (topic, *others) = found[key]
        if not others and count[topic] < MAX_PER_TOPIC:
            count[topic] += 1
            yield key, {"text": text, "label": topic}


def _summaries() -> Keyed:
    """A docstring's first sentence (PEP 257) as the summary of the rest."""
    seen: set[str] = set()
    for _, paragraphs in _clean_docstrings():
        if not paragraphs:
            continue
        (summary, *first), *others = paragraphs
        body = prose.running_text([p for p in (first, *others) if p])
        key = body.lower()
        long_enough = (len(body.split()) >= MIN_BODY_WORDS
                       and len(summary.split()) >= MIN_SUMMARY_WORDS)
        if long_enough and key not in seen:
            seen.add(key)
            yield key, {"body": body, "summary": summary}


# Dataset ------------------------------------------------------------------------------------------


class ConfigSpec(NamedTuple):
    """A config: its description, features, examples, and shares of (validation, test)."""

    description: str
    features: Callable[[], dict]
    examples: Callable[[], Keyed]
    shares: tuple[float, float]

    def splits(self) -> dict[str, list[dict]]:
        """Returns the examples of each split."""
        splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
        for key, example in self.examples():
            splits[assign_split(key, self.shares)].append(example)
        return splits


def _text_features(*names: str) -> Callable[[], dict]:
    return lambda: {name: tfds.features.Text() for name in names}


# Few documents are held out because the corpus is small. More examples of `topics` and `summaries`
# are held out, so that differences in accuracy are measurable.
CONFIGS = {
    "documents": ConfigSpec(
        "A module's docstrings, or a topic of the language reference: one sentence per line, a "
        "blank line between paragraphs.",
        _text_features("name", "text"), _documents, (0.05, 0.05)),
    "topics": ConfigSpec(
        "A docstring and the part of the standard library that it comes from. The texts of its "
        "validation and test splits may also occur in the train split of `documents`, without "
        "their labels: as is usual in transfer learning, pre-training may see the text of a task "
        "but never its labels.",
        lambda: {"text": tfds.features.Text(),
                 "label": tfds.features.ClassLabel(names=list(TOPICS))},
        _topics, (0.15, 0.25)),
    "summaries": ConfigSpec(
        "A docstring without its first sentence, and that sentence as its summary.",
        _text_features("body", "summary"), _summaries, (0.15, 0.25)),
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
        splits = CONFIGS[self.builder_config.name].splits()
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
    return from_tfds_builder(PythonDocs(config=config, data_dir=build(data_dir)), split)


def build(data_dir: str | Path | None = None) -> Path:
    """Builds all configs for the running Python unless they exist; returns their folder.

    It is created in `data_dir`, by default $TRANSFORMER_JAX_CACHE or ~/.cache/transformer_jax. Its
    name has the versions of Python, of the dataset and of this package's code. The dataset is
    written to a temporary folder, which is then renamed, so other processes never see an incomplete
    dataset. If two processes build it at the same time, the first to finish wins.
    """
    default = os.environ.get("TRANSFORMER_JAX_CACHE") or Path("~/.cache/transformer_jax")
    cache = Path(data_dir or default).expanduser()
    code = hashlib.sha1(b"".join(
        path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    folder = cache / (f"python_docs-{PythonDocs.VERSION}-{code.hexdigest()[:8]}"
                      f"-py{platform.python_version()}")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".python_docs-", dir=cache))
    try:
        # A build takes only seconds, so TFDS's progress bars and messages are suppressed.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for config in CONFIGS:
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
