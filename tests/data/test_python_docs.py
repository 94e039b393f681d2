"""The python_docs corpus: sentence extraction, examples, and building the dataset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from transformer_jax.data import mapped_dataset, python_docs
from transformer_jax.data.python_docs import prose

# Prose


def test_sentence_ends():
    text = ('Return x. Calls os.path.join, e.g. Foo or i.e. Bar. See RFC 2822, sec. 3. J. Smith '
            'wrote it (in 1999.) "Quoted." Is it? Yes! f() is called. but not here. 3.5 is. '
            "Wait... Then go.")
    assert prose.sentences(text) == [
        "Return x.", "Calls os.path.join, e.g. Foo or i.e. Bar.", "See RFC 2822, sec. 3.",
        "J. Smith wrote it (in 1999.)", '"Quoted."', "Is it?", "Yes!",
        "f() is called. but not here.", "3.5 is.", "Wait...", "Then go.",
    ]


RST = """
join(a, b) -> str

Join ``a`` and :func:`os.path.b` *really* well [1]_.  It uses
`this <http://x.org>`_ and **that**, but *args stay::

    code = is_dropped(here)

Title of a part
===============

>>> join(1, 2)
the output of this is dropped too

* The first item of
  the list goes on.
* The second item is here.

.. versionadded:: 3.2

Args:
  width: how wide the thing is.
  height -- how high the thing is.

+-----+------+
| a   | b    |
+-----+------+
"""


def test_markup_and_code_are_removed():
    assert prose.paragraphs(RST) == [
        ["Join a and os.path.b really well.", "It uses this and that, but *args stay:"],
        ["Title of a part"],
        ["The first item of the list goes on."],
        ["The second item is here."],
        ["width: how wide the thing is."],
        ["height -- how high the thing is."],
    ]


def test_is_prose():
    assert prose.is_prose("Return the number of items.")
    for code in ("x = f(y)", "if a == b: return c[0] + 1", "Short one", "-v --verbose -q --quiet",
                 "word " * 151):
        assert not prose.is_prose(code)


def test_sentence_lines_and_running_text():
    found = [["One.", "Two."], ["Three."]]
    assert prose.sentence_lines(found) == "One.\nTwo.\n\nThree."
    assert prose.running_text(found) == "One. Two.\nThree."


# Extraction


def test_source_files_are_parsed_and_not_imported(tmp_path):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "config-3.x").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text('"""Package."""\nraise SystemExit\n')
    (tmp_path / "pkg" / "m.py").write_text(
        'class A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n\n'
        'try:\n    def g():\n        "Of g."\nexcept ImportError:\n    pass\n')
    for hidden in ("pkg/tests/t.py", "config-3.x/c.py", "_sysconfigdata_x.py"):
        (tmp_path / hidden).write_text('"""Hidden."""')
    (tmp_path / "broken.py").write_text('"""Broken."""\n(')
    assert list(prose.docstrings(tmp_path)) == [
        ("pkg", "Package."), ("pkg.m", "Of A."), ("pkg.m", "Of f."), ("pkg.m", "Of g."),
    ]


# The dataset


@pytest.fixture(scope="session")
def docs_dir(tmp_path_factory):
    """Built once; in $TRANSFORMER_JAX_CACHE if that is set."""
    if os.environ.get("TRANSFORMER_JAX_CACHE"):
        return None
    return tmp_path_factory.mktemp("python_docs")


def load_all(config, docs_dir):
    return {split: [dict(e) for e in python_docs.load(config, split, docs_dir)]
            for split in python_docs.SPLITS}


@pytest.mark.slow
def test_documents_are_english_prose(docs_dir):
    splits = load_all("documents", docs_dir)
    texts = {split: [e["text"] for e in found] for split, found in splits.items()}
    size = sum(len(text.encode()) for found in texts.values() for text in found)
    assert 1.4e6 < size < 3e6
    assert all(sum(map(len, found)) > 20_000 for found in texts.values())
    names = [e["name"] for found in splits.values() for e in found]
    assert len(names) == len(set(names)) and {"asyncio.events", "topics/slicings"} <= set(names)
    assert "tensorflow" not in sys.modules
    for text in texts["train"]:
        assert "\n\n\n" not in text and text == text.strip() and ">>>" not in text


@pytest.mark.slow
def test_no_paragraph_is_in_two_splits(docs_dir):
    paragraphs = [{p.replace("\n", " ").lower() for e in found for p in e["text"].split("\n\n")}
                  for found in load_all("documents", docs_dir).values()]
    assert not paragraphs[0] & (paragraphs[1] | paragraphs[2])
    assert not paragraphs[1] & paragraphs[2]


@pytest.mark.slow
def test_topics_have_enough_distinct_examples(docs_dir):
    splits = load_all("topics", docs_dir)
    names = python_docs.load("topics", "train", docs_dir).label_names
    assert names == tuple(python_docs.TOPICS) and 8 <= len(names) <= 12
    texts = [" ".join(e["text"].lower().split()) for found in splits.values() for e in found]
    assert len(texts) == len(set(texts))
    assert all(len(text.split()) >= python_docs.MIN_TEXT_WORDS for text in texts)
    for label in range(len(names)):
        count = {s: sum(e["label"] == label for e in found) for s, found in splits.items()}
        assert count["train"] >= 80 and count["validation"] >= 20 and count["test"] >= 40
        assert sum(count.values()) <= python_docs.MAX_PER_TOPIC


@pytest.mark.slow
def test_summaries_have_distinct_bodies(docs_dir):
    splits = load_all("summaries", docs_dir)
    found = [e for split in splits.values() for e in split]
    assert len(found) > 1500 and len({e["body"] for e in found}) == len(found)
    assert all(len(e["body"].split()) >= 20 and "\n" not in e["summary"] for e in found)


@pytest.mark.slow
def test_tfds_loads_the_built_dataset(docs_dir):
    folder = python_docs.build(docs_dir)
    source = mapped_dataset.load_tfds("python_docs/topics", "test", folder)
    assert source[0] == python_docs.load("topics", "test", docs_dir)[0]
    assert (folder.stat().st_mode & 0o777) == 0o755
    info = tfds.builder("python_docs/topics", data_dir=folder).info
    assert "never its labels" in info.description


def test_splits_are_assigned_by_a_stable_hash():
    names = ("asyncio.events", "email.message", "logging", "topics/if", "json.decoder", "abc")
    found = [python_docs.assign_split(name, (0.25, 0.25)) for name in names]
    assert found == ["train", "train", "test", "validation", "train", "train"]
    shares = [python_docs.assign_split(str(i), (0.1, 0.2)) for i in range(5000)]
    assert abs(shares.count("validation") / 5000 - 0.1) < 0.02
    assert abs(shares.count("test") / 5000 - 0.2) < 0.02


def test_unknown_configs_and_splits():
    with pytest.raises(ValueError, match="unknown config 'topic' of python_docs; choose one of"):
        python_docs.load("topic", "train")
    with pytest.raises(ValueError, match="unknown split 'dev' of python_docs; choose one of train"):
        python_docs.load("topics", "dev")


# Building


SMALL = (
    "Return the number {0} of the things in {1} as they are now. The things of number {0} come one "
    "after the other, and many more words about {1} follow here, so that this is a document."
)


@pytest.fixture
def small(monkeypatch):
    """Replaces the docstrings of the standard library by a few."""
    texts = [SMALL.format(i, word) for i in range(40) for word in ("lists", "sets")]
    found = [(f"asyncio.m{i}", text) for i, text in enumerate(texts)]
    monkeypatch.setattr(prose, "docstrings", lambda: iter(found))
    monkeypatch.setattr(python_docs, "MIN_DOCSTRINGS", 1)
    python_docs._clean_docstrings.cache_clear()
    yield
    python_docs._clean_docstrings.cache_clear()


def test_the_environment_variable_sets_the_cache_folder(small, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_JAX_CACHE", str(tmp_path / "cache"))
    assert len(python_docs.load("topics", "train")) > 10
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder == python_docs.build()
    assert folder.name.endswith("py" + sys.version.split()[0])


def test_a_failed_build_leaves_nothing(small, tmp_path, monkeypatch):
    class Full(Exception):
        pass

    def fail(self, **options):
        (Path(self.data_path).parent).mkdir(parents=True)
        raise Full

    monkeypatch.setattr(python_docs.PythonDocs, "download_and_prepare", fail)
    with pytest.raises(Full):
        python_docs.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


RACE = """
import sys
from transformer_jax.data import python_docs
from transformer_jax.data.python_docs import prose
found = [(f"asyncio.m{i}", sys.argv[2].format(i, "lists")) for i in range(80)]
prose.docstrings = lambda: iter(found)
python_docs.MIN_DOCSTRINGS = 1
print("ready", flush=True)
input()
print(len(python_docs.load("documents", "train", sys.argv[1])))
"""


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path), SMALL]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
    for p in both:
        p.stdin.write("\n")
        p.stdin.flush()
    counts = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and counts[0] == counts[1] != "0\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_python_without_source_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "docstrings", lambda: iter([]))
    with pytest.raises(FileNotFoundError, match=r"this Python has 0 docstrings.*its .py files"):
        python_docs.build(tmp_path)
    assert list(tmp_path.iterdir()) == []
