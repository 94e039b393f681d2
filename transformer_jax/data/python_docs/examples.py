"""The examples of each config of python_docs by split, made from the extracted docstrings."""

import functools
import hashlib
from typing import NamedTuple

from transformer_jax.data.python_docs import extract, prose

SPLITS = ("train", "validation", "test")

# Shares of (validation, test); the rest is the train split. Few documents are held out because the
# corpus is small. More examples of `topics` and `summaries` are held out, so that differences in
# accuracy are measurable.
DOCUMENT_SHARES = (0.05, 0.05)
EXAMPLE_SHARES = (0.15, 0.25)

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


class CleanDocstring(NamedTuple):
    """A docstring as paragraphs of sentences, and the module that contains it."""

    module: str
    paragraphs: list[list[str]]


def assign_split(key: str, shares: tuple[float, float]) -> str:
    """Returns the split of an example, which is determined by a hash of its key.

    The split does not depend on the Python version, and is the same in every run.

    Args:
        key: a text that identifies the example.
        shares: shares of the validation and the test split.

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
def _clean_docstrings() -> list[CleanDocstring]:
    docstrings = [CleanDocstring(d.module, prose.paragraphs(d.text)) for d in extract.docstrings()]
    if len(docstrings) < MIN_DOCSTRINGS:
        raise FileNotFoundError(
            f"this Python has {len(docstrings)} docstrings in the source files of its standard "
            f"library; python_docs needs {MIN_DOCSTRINGS}. Use a Python that was installed with "
            "its .py files, or train on text files"
        )
    return docstrings


def documents() -> dict[str, list[dict]]:
    """Returns the examples of `documents`: {"name", "text"} of a module or of a topic of pydoc.

    The text of a module is all its docstrings in order. The name determines the split. A paragraph
    that occurs in several documents is kept only in the first, so no paragraph is in two splits.
    """
    by_name: dict[str, list[list[str]]] = {}
    for docstring in _clean_docstrings():
        by_name.setdefault(docstring.module, []).extend(docstring.paragraphs)
    for name, text in extract.topics().items():
        by_name[f"topics/{name}"] = prose.paragraphs(text)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for name, paragraphs in sorted(by_name.items()):
        unseen = []
        for paragraph in paragraphs:
            key = " ".join(paragraph).lower()
            if key not in seen:
                seen.add(key)
                unseen.append(paragraph)
        text = prose.sentence_lines(unseen)
        if len(text.split()) >= MIN_DOCUMENT_WORDS:
            splits[assign_split(name, DOCUMENT_SHARES)].append({"name": name, "text": text})
    return splits


def topics() -> dict[str, list[dict]]:
    """Returns the examples of `topics`: {"text", "label"} of a docstring and its module's topic.

    The text determines the split. A text that occurs under two topics is left out, because its
    label is ambiguous.
    """
    topic_of = {package: topic for topic, packages in TOPICS.items() for package in packages}
    labels: dict[str, set[str]] = {}  # lower-case text -> its topics
    original: dict[str, str] = {}  # lower-case text -> the text as first found
    for docstring in _clean_docstrings():
        topic = topic_of.get(docstring.module.split(".")[0])
        text = prose.running_text(docstring.paragraphs)
        if topic and len(text.split()) >= MIN_TEXT_WORDS:
            key = " ".join(text.lower().split())
            labels.setdefault(key, set()).add(topic)
            original.setdefault(key, text)
    count = dict.fromkeys(TOPICS, 0)
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    # Texts are sorted by a hash, so that a pseudo-random sample of a large class is kept. The
    # prefix makes this hash independent of the hash that determines the split.
    for key in sorted(labels, key=lambda key: hashlib.sha1(b"order" + key.encode()).digest()):
        topic, *others = labels[key]
        if not others and count[topic] < MAX_PER_TOPIC:
            count[topic] += 1
            splits[assign_split(key, EXAMPLE_SHARES)].append(
                {"text": original[key], "label": topic})
    return splits


def summaries() -> dict[str, list[dict]]:
    """Returns the examples of `summaries`: {"body", "summary"}.

    The summary is a docstring's first sentence (PEP 257), the body the rest. The body determines
    the split.
    """
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for docstring in _clean_docstrings():
        if not docstring.paragraphs:
            continue
        (summary, *first), *others = docstring.paragraphs
        body = prose.running_text([p for p in (first, *others) if p])
        key = body.lower()
        long_enough = (len(body.split()) >= MIN_BODY_WORDS
                       and len(summary.split()) >= MIN_SUMMARY_WORDS)
        if long_enough and key not in seen:
            seen.add(key)
            example = {"body": body, "summary": summary}
            splits[assign_split(key, EXAMPLE_SHARES)].append(example)
    return splits
