"""What the three configs hold, as plain Python: examples by split, made from the raw text."""

import functools
import hashlib
from typing import NamedTuple

from transformer_jax.data.python_docs import extract, prose

SPLITS = ("train", "validation", "test")

# Share of (validation, test); the rest trains. Few documents are held out, for the corpus is small;
# many topics are, so that accuracies can be told apart.
DOCUMENT_SHARES = (0.05, 0.05)
EXAMPLE_SHARES = (0.15, 0.25)

# The classes of `topics`: packages and modules of the standard library. All of them are in every
# Python from 3.11 on, with at least 80 examples each.
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
MAX_PER_TOPIC = 300  # so that no class is so common that guessing it does well
MIN_TEXT_WORDS = 5
MIN_BODY_WORDS = 20
MIN_SUMMARY_WORDS = 3
MIN_DOCUMENT_WORDS = 20
MIN_DOCSTRINGS = 500  # a complete installation has over 7,000


class Text(NamedTuple):
    """One cleaned docstring: paragraphs of sentences, and the module it stands in."""

    module: str
    paragraphs: list[list[str]]


def split_of(key: str, shares: tuple[float, float]) -> str:
    """The split of an example: a hash of its key, the same in every Python and every run."""
    place = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 16**8
    validation, test = shares
    return "validation" if place < validation else "test" if place < validation + test else "train"


@functools.cache
def _cleaned() -> list[Text]:
    found = [Text(d.module, prose.paragraphs(d.text)) for d in extract.docstrings()]
    if len(found) < MIN_DOCSTRINGS:
        raise FileNotFoundError(
            f"this Python has {len(found)} docstrings in the source files of its standard library, "
            f"python_docs needs {MIN_DOCSTRINGS}; use a Python that was installed with its .py "
            "files, or train on text files"
        )
    return found


def documents() -> dict[str, list[dict]]:
    """{"name", "text"}: a module's docstrings in order, or one of pydoc's topics.

    The split goes by the name. A paragraph that stands in several documents is kept in the first
    only, so none is in two splits.
    """
    found: dict[str, list[list[str]]] = {}
    for text in _cleaned():
        found.setdefault(text.module, []).extend(text.paragraphs)
    for name, text in extract.topics().items():
        found[f"topics/{name}"] = prose.paragraphs(text)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for name, paragraphs in sorted(found.items()):
        new = []
        for paragraph in paragraphs:
            key = " ".join(paragraph).lower()
            if key not in seen:
                seen.add(key)
                new.append(paragraph)
        text = prose.sentence_lines(new)
        if len(text.split()) >= MIN_DOCUMENT_WORDS:
            splits[split_of(name, DOCUMENT_SHARES)].append({"name": name, "text": text})
    return splits


def topics() -> dict[str, list[dict]]:
    """{"text", "label"}: a docstring and the topic of its module.

    The split goes by the text. A text of two topics is left out, for it has no right answer.
    """
    topic_of = {package: topic for topic, packages in TOPICS.items() for package in packages}
    labels: dict[str, set[str]] = {}
    spelling: dict[str, str] = {}
    for text in _cleaned():
        topic = topic_of.get(text.module.split(".")[0])
        running = prose.running_text(text.paragraphs)
        if topic and len(running.split()) >= MIN_TEXT_WORDS:
            key = " ".join(running.lower().split())
            labels.setdefault(key, set()).add(topic)
            spelling.setdefault(key, running)
    count = dict.fromkeys(TOPICS, 0)
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    # Which ones stay of a large class is decided by hash, too, and unlike the split's.
    for key in sorted(labels, key=lambda key: hashlib.sha1(b"order" + key.encode()).digest()):
        topic, *others = labels[key]
        if not others and count[topic] < MAX_PER_TOPIC:
            count[topic] += 1
            splits[split_of(key, EXAMPLE_SHARES)].append({"text": spelling[key], "label": topic})
    return splits


def summaries() -> dict[str, list[dict]]:
    """{"body", "summary"}: a docstring's first sentence (PEP 257) and the rest of it.

    The split goes by the body.
    """
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for text in _cleaned():
        if not text.paragraphs:
            continue
        (summary, *first), *others = text.paragraphs
        body = prose.running_text([p for p in (first, *others) if p])
        key = body.lower()
        long_enough = (len(body.split()) >= MIN_BODY_WORDS
                       and len(summary.split()) >= MIN_SUMMARY_WORDS)
        if long_enough and key not in seen:
            seen.add(key)
            example = {"body": body, "summary": summary}
            splits[split_of(key, EXAMPLE_SHARES)].append(example)
    return splits
