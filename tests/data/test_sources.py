import gzip
import sys

import pytest
import tensorflow_datasets as tfds

from transformer_jax.data import sources


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("Chapter one.\nGoes on.\n\n\nChapter two.  \n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("Café.\r\n".encode()))
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


# Files


def test_texts_by_unit(folder):
    def texts(path, **options):
        return [example["text"] for example in sources.text_files(path, **options)]

    assert texts(folder) == ["Café.", "Chapter one.\nGoes on.", "Chapter two."]
    assert texts(folder, unit="line") == ["Café.", "Chapter one.", "Goes on.", "Chapter two."]
    assert texts(folder / "b.txt", unit="file") == ["Chapter one.\nGoes on.\n\n\nChapter two.  \n"]
    assert texts(folder / "notes.md") == ["not read"]


def test_bad_texts_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        sources.text_files(folder / "none.txt")
    with pytest.raises(ValueError, match="unknown unit 'word'; choose one of document"):
        sources.text_files(folder, unit="word")
    (folder / "c.txt").write_bytes(b"fine \xff not")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8: byte 0xff at offset 5"):
        sources.text_files(folder)
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbffine \xff not")
    with pytest.raises(ValueError, match="byte 0xff at offset 8"):
        sources.text_files(folder)
    (folder / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c\.txt has 2 bytes and no text"):
        sources.text_files(folder)
    (folder / "c.txt").unlink()
    (folder / "c.txt.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        sources.text_files(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.txt or \.txt\.gz file"):
        sources.text_files(folder / "empty")


def test_tables_in_three_forms(tmp_path):
    rows = [{"sentence": 'a "b" c', "label": "1"}, {"sentence": "d, e", "label": "0"}]
    (tmp_path / "t.tsv").write_text('sentence\tlabel\na "b" c\t1\r\nd, e\t0\n', newline="")
    (tmp_path / "t.csv").write_text('sentence,label\n"a ""b"" c",1\n"d, e",0\n')
    (tmp_path / "t.jsonl").write_text('{"sentence": "a \\"b\\" c", "label": "1"}\n'
                                      '{"sentence": "d, e", "label": "0"}\n')
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress((tmp_path / "t.tsv").read_bytes()))
    for name in ("t.tsv", "t.csv", "t.jsonl", "t.tsv.gz"):
        assert sources.table(tmp_path / name) == rows
    assert sources.table(tmp_path / "t.tsv", columns={"text": "sentence"})[1] == {"text": "d, e"}
    assert sources.table(tmp_path / "t.csv", columns=["label"])[0] == {"label": "1"}


def test_tables_without_a_header_line(tmp_path):
    (tmp_path / "t.tsv").write_text("a\t1\n\nb\t0\n")
    assert sources.table(tmp_path / "t.tsv", header=("text", "label"))[1] == {
        "text": "b", "label": "0"}
    rows = sources.numbered_rows(tmp_path / "t.tsv", header=("text", "label"))
    assert [line for line, _ in rows] == [1, 3]
    with pytest.raises(ValueError, match="line 1 has 2 fields, the header 1"):
        sources.table(tmp_path / "t.tsv", header=["text"])
    with pytest.raises(ValueError, match=r"header is .text.*as a sequence"):
        sources.table(tmp_path / "t.tsv", header="text")
    (tmp_path / "t.jsonl").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"only for \.tsv and \.csv"):
        sources.table(tmp_path / "t.jsonl", header=["a"])


@pytest.mark.parametrize(("name", "text", "message"), [
    ("t.tsv", "a\tb\n1\t2\n3\n", r"t\.tsv line 3 has 1 fields, the header 2"),
    ("t.tsv", "a\tb\n", "has 0 rows"),
    ("t.tsv", "b\tb\n1\t2\n", "has two columns 'b'"),
    ("t.csv", 'a,b\n1,2\n3,"4\n5,6\n', r"t\.csv: the row from line 3 on is no CSV"),
    ("t.csv", 'a,b\n1,"2" 3\n', "the row from line 2 on is no CSV.*double their quotes"),
    ("t.tsv", "a\tc\n1\t2\n", "line 2 has no column 'b'; it has 'a', 'c'"),
    ("t.jsonl", '{"b": 1}\n{\n', r"line 2 is not JSON"),
    ("t.jsonl", "[1]\n", "line 1 is a list"),
    ("t.xls", "a", r"ends in '.xls'; a table is one of .tsv, .csv, .jsonl"),
])
def test_bad_tables_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.table(tmp_path / name, columns=["b"])


def test_only_line_ends_end_lines(tmp_path):
    """Other ends of lines that Unicode knows are text, and so is a quote in .tsv."""
    texts = ["a\u2028b", "c\x0bd\x0ce", "f\u0085\x1cg", "h" * 200_000]
    (tmp_path / "t.csv").write_bytes(b"label,text\r\n" + b"".join(
        f"1,{text}\r\n".encode() for text in texts))
    assert [row["text"] for row in sources.table(tmp_path / "t.csv")] == texts
    (tmp_path / "t.tsv").write_text("label\ttext\n" + "".join(f"1\t{t}\n" for t in texts))
    assert [row["text"] for row in sources.table(tmp_path / "t.tsv")] == texts
    (tmp_path / "q.csv").write_text('label,text\n1,"two\nlines, ""quoted"""\n0,x\n')
    assert [row["text"] for row in sources.table(tmp_path / "q.csv")] == [
        'two\nlines, "quoted"', "x"]
    assert [line for line, _ in sources.numbered_rows(tmp_path / "q.csv")] == [3, 4]


def test_a_gzip_file_that_is_damaged_inside(tmp_path):
    content = bytearray(gzip.compress(b"label\ttext\n" + b"1\tabc\n" * 50))
    content[12] ^= 255
    (tmp_path / "t.tsv.gz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        sources.table(tmp_path / "t.tsv.gz")


def test_lists_are_checked():
    assert sources.in_memory(({"a": 1},)) == [{"a": 1}]
    with pytest.raises(ValueError, match="0 examples"):
        sources.in_memory([])
    with pytest.raises(ValueError, match="example 1 is of type str"):
        sources.in_memory([{"a": 1}, "b"])


# TFDS


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(),
                    "words": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=["no", "yes"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"né {i}", "words": ["a", "né"], "label": "yes"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    sources.tfds_source("tiny", "train", data_dir, download=True)
    return data_dir


def test_tfds_without_tensorflow(tiny):
    source = sources.tfds_source("tiny", "train", tiny)
    assert len(source) == 5 and source.label_names == ("no", "yes")
    assert sorted(e["text"] for e in source) == [f"né {i}" for i in range(5)]
    assert source[-1] == source[4] and source[0]["words"] == ["a", "né"] and source[0]["label"] == 1
    assert len(sources.tfds_source("tiny", "train[:2]", tiny)) == 2
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError, match="example 5 of 5"):
        source[5]


def test_tfds_mocked_sets_of_its_catalogue():
    with tfds.testing.mock_data(num_examples=3):
        source = sources.tfds_source("mnist", "train")
        assert len(source) == 3 and len(source.label_names) == 10
        assert source[0]["image"].shape == (28, 28, 1)


def test_tfds_sets_whose_modules_are_not_imported(tmp_path):
    with pytest.raises(FileNotFoundError, match="glue/sst2 is not prepared"):
        sources.tfds_source("glue/sst2", "train", tmp_path)
    assert "tensorflow" not in sys.modules


def test_tfds_errors(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown TFDS data set 'tinyy'; did you mean"):
        sources.load_source("tfds:tinyy", "train")
    with pytest.raises(ValueError, match="unknown split of tiny 'trian'; did you mean train"):
        sources.tfds_source("tiny", "trian", tiny)
    with pytest.raises(FileNotFoundError, match=r"tiny is not prepared.*download=True"):
        sources.tfds_source("tiny", "train", tmp_path)


# Hugging Face


def test_hf_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the datasets library; pip install transformer_"):
        sources.load_source("hf:some/set", "train")


def test_hf_local_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_list([{"text": "né", "label": 1}], features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "split")
    for name in ("one", "split"):
        source = sources.load_source(f"hf:{tmp_path / name}", "train")
        assert len(source) == 1 and source[0] == {"text": "né", "label": 1}
        assert source.label_names == ("no", "yes")
    with pytest.raises(ValueError, match=r"unknown split of .* 'test'; choose from train"):
        sources.hf_source(tmp_path / "split", "test")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    found = sources.hf_source(tmp_path / "json", "train", cache_dir=str(tmp_path / "cache"))
    assert [e["text"] for e in found] == ["a", "b"] and found.label_names is None


# By one word


def test_paths_by_one_word(folder):
    assert len(sources.load_source(folder, "train")) == 3
    with pytest.raises(ValueError, match="has no split 'test'; give a folder with files such as"):
        sources.load_source(folder, "test")
    (folder / "train.tsv").write_text("text\tlabel\na\t1\n")
    (folder / "test.txt").write_text("b")
    assert sources.load_source(folder, "train") == [{"text": "a", "label": "1"}]
    assert sources.load_source(folder, "test") == [{"text": "b"}]
    assert sources.load_source(folder / "train.tsv", "train") == [{"text": "a", "label": "1"}]


def test_unknown_words_list_near_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="unknown data set 'python_docs/document'; did you "
                                                "mean python_docs/documents"):
        sources.load_source("python_docs/document", "train")
    with pytest.raises(FileNotFoundError, match="tfds:NAME, hf:NAME, or a path that exists"):
        sources.load_source("no.txt", "train")


def test_names_come_before_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python_docs" / "documents").mkdir(parents=True)
    (tmp_path / "x.txt").write_text("a")
    assert sources.is_local("x.txt")
    for name in ("python_docs/documents", "tfds:x.txt", "hf:x.txt", "y.txt"):
        assert not sources.is_local(name)
