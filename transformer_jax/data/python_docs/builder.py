"""The TFDS builder `python_docs`: array_record files, written and read without TensorFlow."""

import contextlib
import functools
import io
import os
import platform
import shutil
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds

from transformer_jax.data.python_docs.docstrings import (
    docstrings,
    paragraphs,
    prose,
    sentences,
    share,
    topics,
)

# Subjects of the `topics` set: packages with many docstrings on every supported Python.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "files": ("tarfile", "zipfile", "pathlib", "shutil", "os", "posixpath", "ntpath", "tempfile",
              "glob", "gzip", "bz2", "lzma"),
    "importlib": ("importlib", "pkgutil", "zipimport", "modulefinder", "runpy"),
    "logging": ("logging",),
    "multiprocessing": ("multiprocessing", "concurrent", "threading"),
    "numbers": ("_pydecimal", "statistics", "fractions", "random", "numbers", "colorsys"),
    "tkinter": ("tkinter",),
    "unittest": ("unittest", "doctest"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver", "ftplib"),
    "xml": ("xml", "html"),
}
_SUBJECT_OF = {package: name for name, group in SUBJECTS.items() for package in group}
MIN_WORDS = 5  # of a docstring in `topics`
MIN_BODY_WORDS = 20  # of a body in `summaries`

# Upper ends of the shares of train and validation; test is the rest. Classification keeps more
# aside: a test set of a few hundred examples measures accuracy to two points.
SPLITS = {"documents": (0.88, 0.94), "topics": (0.70, 0.80), "summaries": (0.80, 0.90)}


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Documentation that every Python installation carries, in three configs.

    documents: `name`, `text`. A module's docstrings, or a chapter of the language reference; one
        sentence a line, a blank line between paragraphs.
    topics: `text`, `label`. A docstring and the subject of the package it comes from.
    summaries: `body`, `summary`. A docstring without its first line, and that line.

    Splits follow a hash of the module's name (documents) or of the text (topics, summaries), so
    they never share an example. A docstring of the topics' test split may stand, without its label,
    in the documents that a model is pre-trained on, as is usual in transfer learning.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SPLITS]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "documents": {"name": text, "text": text},
            "topics": {"text": text, "label": tfds.features.ClassLabel(names=list(SUBJECTS))},
            "summaries": {"body": text, "summary": text},
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features[self.builder_config.name]),
            homepage="https://docs.python.org",
            license="PSF-2.0",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        names = ("train", "validation", "test")
        edges = (0.0, *SPLITS[self.builder_config.name], 1.0)
        return {n: self._generate_examples(lo, hi) for n, lo, hi in zip(names, edges, edges[1:])}

    def _generate_examples(self, low: float, high: float):
        for key, example in _EXAMPLES[self.builder_config.name]():
            if low <= share(key) < high:
                yield key, example


@functools.cache  # one reading serves three splits
def _documents() -> list[tuple[str, dict]]:
    found = []
    modules: dict[str, list[str]] = {}
    for module, text in docstrings():
        modules.setdefault(module, []).append(text)
    named = {f"topic/{name}": [text] for name, text in topics().items()}
    for name, texts in (modules | named).items():
        text = "\n\n".join(filter(None, map(prose, texts)))
        if len(text.splitlines()) > 1:
            found.append((name, {"name": name, "text": text}))
    return found


@functools.cache  # one reading serves three splits
def _topics() -> list[tuple[str, dict]]:
    found = []
    subjects: dict[str, set[str]] = {}
    for module, text in docstrings():
        if subject := _SUBJECT_OF.get(module.split(".")[0]):
            text = " ".join(paragraphs(text))
            if len(text.split()) >= MIN_WORDS:
                subjects.setdefault(text, set()).add(subject)
    for text, of in subjects.items():
        if len(of) == 1:  # the same words in two packages say nothing of either
            found.append((text, {"text": text, "label": next(iter(of))}))
    return found


@functools.cache  # one reading serves three splits
def _summaries() -> list[tuple[str, dict]]:
    found = []
    seen = set()
    for _, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        summary, body = " ".join(summary.split()), " ".join(paragraphs(rest))
        if len(sentences(summary)) == 1 and len(body.split()) >= MIN_BODY_WORDS and body not in seen:
            seen.add(body)
            found.append((body, {"body": body, "summary": summary}))
    return found


_EXAMPLES = {"documents": _documents, "topics": _topics, "summaries": _summaries}


def cache_folder() -> Path:
    """$TRANSFORMER_JAX_CACHE, or `~/.cache/transformer_jax`."""
    return Path(os.environ.get("TRANSFORMER_JAX_CACHE") or "~/.cache/transformer_jax").expanduser()


def load(config: str, split: str, data_dir: str | Path | None = None):
    """A random-access source of one split, built on first use.

    The data set of each Python version stands in a folder of its own. It is built aside and moved
    into place whole, so that a killed build leaves nothing behind that looks finished, and of two
    processes at once the later one's build is thrown away.

    Args:
        config: "documents", "topics" or "summaries".
        split: "train", "validation" or "test".

    Raises:
        ValueError: an unknown config or split.
        FileNotFoundError: this Python has no library sources.
    """
    from transformer_jax.data.sources import tfds_source

    for kind, value, allowed in (("config", config, tuple(SPLITS)),
                                 ("split", split, ("train", "validation", "test"))):
        if value not in allowed:
            raise ValueError(f"python_docs has no {kind} {value!r}; choose one of "
                             f"{', '.join(allowed)}")
    root = Path(data_dir) if data_dir else cache_folder()
    version = f"{platform.python_version()}-{PythonDocs.VERSION}"
    final = root / "python_docs" / version / config
    if not final.is_dir():
        _build(config, final)
    return tfds_source(str(final / "python_docs" / config / str(PythonDocs.VERSION)), split)


def _build(config: str, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{config}-", dir=final.parent))
    try:
        builder = PythonDocs(config=config, data_dir=aside, file_format="array_record")
        settings = tfds.download.DownloadConfig(
            compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
        )
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # its banner speaks of downloading
            builder.download_and_prepare(download_config=settings)
        try:
            aside.rename(final)
        except OSError:
            if not final.is_dir():  # not the race with another process that finished first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
