"""Data sources: text files, tables, TFDS and Hugging Face datasets."""

import gzip
import sys
import types

import pyarrow
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from transformer_jax.data import mapped_dataset, sources


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("Chapter one.\nGoes on.\n\n\nChapter two.  \n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("Café.\r\n".encode()))
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


# Files


def test_document_separators(folder):
    def texts(path, **options):
        return [example["text"] for example in sources.load_text_files(path, **options)]

    assert texts(folder) == ["Café.", "Chapter one.\nGoes on.", "Chapter two."]
    assert texts(folder, document_separator="newline") == [
        "Café.", "Chapter one.", "Goes on.", "Chapter two."]
    assert texts(folder / "b.txt", document_separator="file") == [
        "Chapter one.\nGoes on.\n\n\nChapter two.  \n"]
    assert texts(folder / "notes.md") == ["not read"]


def test_errors_in_text_files(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        sources.load_text_files(folder / "none.txt")
    with pytest.raises(ValueError, match="unknown document_separator 'word'; choose one of bl"):
        sources.load_text_files(folder, document_separator="word")
    (folder / "c.txt").write_bytes(b"fine \xff not")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8: byte 0xff at offset 5"):
        sources.load_text_files(folder)
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbffine \xff not")
    with pytest.raises(ValueError, match="byte 0xff at offset 8"):
        sources.load_text_files(folder)
    (folder / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c\.txt has 2 bytes and no text"):
        sources.load_text_files(folder)
    (folder / "c.txt").unlink()
    (folder / "c.txt.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        sources.load_text_files(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.txt or \.txt\.gz file"):
        sources.load_text_files(folder / "empty")


def test_table_formats(tmp_path):
    rows = [{"sentence": 'a "b" c', "label": "1"}, {"sentence": "d, e", "label": "0"}]
    (tmp_path / "t.tsv").write_text('sentence\tlabel\na "b" c\t1\r\nd, e\t0\n', newline="")
    (tmp_path / "t.csv").write_text('sentence,label\n"a ""b"" c",1\n"d, e",0\n')
    (tmp_path / "t.jsonl").write_text('{"sentence": "a \\"b\\" c", "label": "1"}\n'
                                      '{"sentence": "d, e", "label": "0"}\n')
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress((tmp_path / "t.tsv").read_bytes()))
    for name in ("t.tsv", "t.csv", "t.jsonl", "t.tsv.gz"):
        assert sources.load_table(tmp_path / name) == rows


def test_tables_without_a_header_line(tmp_path):
    (tmp_path / "t.tsv").write_text("a\t1\n\nb\t0\n")
    assert sources.load_table(tmp_path / "t.tsv", header=("text", "label"))[1] == {
        "text": "b", "label": "0"}
    rows = sources.load_numbered_rows(tmp_path / "t.tsv", header=("text", "label"))
    assert [line for line, _ in rows] == [1, 3]
    with pytest.raises(ValueError, match="line 1 has 2 fields, but the header has 1"):
        sources.load_table(tmp_path / "t.tsv", header=["text"])
    with pytest.raises(ValueError, match=r"header is .text.*as a sequence"):
        sources.load_table(tmp_path / "t.tsv", header="text")
    (tmp_path / "t.jsonl").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"only for \.tsv and \.csv"):
        sources.load_table(tmp_path / "t.jsonl", header=["a"])


@pytest.mark.parametrize(("name", "text", "message"), [
    ("t.tsv", "a\tb\n1\t2\n3\n", r"t\.tsv line 3 has 1 fields, but the header has 2"),
    ("t.tsv", "a\tb\n", "has 0 rows"),
    ("t.tsv", "b\tb\n1\t2\n", "has two columns 'b'"),
    ("t.csv", 'a,b\n1,2\n3,"4\n5,6\n', r"t\.csv: the row that starts at line 3 is not valid CSV"),
    ("t.csv", 'a,b\n1,"2" 3\n', "row that starts at line 2 is not valid CSV.*double the quotes"),
    ("t.jsonl", '{"b": 1}\n{\n', r"line 2 is not JSON"),
    ("t.jsonl", "[1]\n", "line 1 is a list"),
    ("t.xls", "a", r"its suffix is '.xls'; supported: .tsv, .csv, .jsonl, .parquet"),
])
def test_errors_in_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.load_table(tmp_path / name)


def test_unicode_line_ends_do_not_end_a_row(tmp_path):
    """They are ordinary characters, and so is a quote in a .tsv file."""
    texts = ["a\u2028b", "c\x0bd\x0ce", "f\u0085\x1cg", "h" * 200_000]
    (tmp_path / "t.csv").write_bytes(b"label,text\r\n" + b"".join(
        f"1,{text}\r\n".encode() for text in texts))
    assert [row["text"] for row in sources.load_table(tmp_path / "t.csv")] == texts
    (tmp_path / "t.tsv").write_text("label\ttext\n" + "".join(f"1\t{t}\n" for t in texts))
    assert [row["text"] for row in sources.load_table(tmp_path / "t.tsv")] == texts
    (tmp_path / "q.csv").write_text('label,text\n1,"two\nlines, ""quoted"""\n0,x\n')
    assert [row["text"] for row in sources.load_table(tmp_path / "q.csv")] == [
        'two\nlines, "quoted"', "x"]
    assert [line for line, _ in sources.load_numbered_rows(tmp_path / "q.csv")] == [3, 4]


def test_parquet(tmp_path):
    rows = [{"text": "a", "label": 1, "tags": ["x"], "score": None},
            {"text": "2020-01-02", "label": 2**60, "tags": [], "score": 0.5}]
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert sources.load_table(path) == rows and sources.load_source(path, "train") == rows
    assert [number for number, _ in sources.load_numbered_rows(path)] == [1, 2]
    (tmp_path / "t.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a complete Parquet file"):
        sources.load_table(path)
    parquet.write_table(pyarrow.table({"a": []}), path)
    with pytest.raises(ValueError, match="has 0 rows"):
        sources.load_table(path)
    parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(ValueError, match="two columns 'a'"):
        sources.load_table(path)


@pytest.mark.parametrize(("name", "text", "rows"), [
    ("t.csv", "a,b\n007,NA\n1e3,\n", [{"a": "007", "b": "NA"}, {"a": "1e3", "b": ""}]),
    ("t.jsonl", '{"a": "2020-01-02"}\n{"b": 12345678901234567890}\n{"a": {"x": 1}}\n',
     [{"a": "2020-01-02"}, {"b": 12345678901234567890}, {"a": {"x": 1}}]),
])
def test_values_are_not_converted(tmp_path, name, text, rows):
    """As PyArrow's readers do; see `load_table`."""
    (tmp_path / name).write_text(text)
    assert sources.load_table(tmp_path / name) == rows


def test_a_corrupted_gzip_file(tmp_path):
    content = bytearray(gzip.compress(b"label\ttext\n" + b"1\tabc\n" * 50))
    content[12] ^= 255
    (tmp_path / "t.tsv.gz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        sources.load_table(tmp_path / "t.tsv.gz")


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
    mapped_dataset.load_tfds("tiny", "train", data_dir, download=True)
    return data_dir


def test_tfds_without_tensorflow(tiny):
    source = mapped_dataset.load_tfds("tiny", "train", tiny)
    assert len(source) == 5 and source.label_names == ("no", "yes")
    assert sorted(e["text"] for e in source) == [f"né {i}" for i in range(5)]
    assert source[-1] == source[4] and source[0]["words"] == ["a", "né"] and source[0]["label"] == 1
    assert len(mapped_dataset.load_tfds("tiny", "train[:2]", tiny)) == 2
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError, match="example 5 is out of range; there are 5"):
        source[5]


def test_tfds_with_mocked_data():
    with tfds.testing.mock_data(num_examples=3):
        source = mapped_dataset.load_tfds("mnist", "train")
        assert len(source) == 3 and len(source.label_names) == 10
        assert source[0]["image"].shape == (28, 28, 1)


def test_tfds_builders_whose_modules_are_not_imported(tmp_path):
    with pytest.raises(FileNotFoundError, match="glue/sst2 is not prepared"):
        mapped_dataset.load_tfds("glue/sst2", "train", tmp_path)
    assert "tensorflow" not in sys.modules


def test_tfds_errors(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown TFDS dataset 'tinyy'; did you mean"):
        sources.load_source("tfds:tinyy", "train")
    with pytest.raises(ValueError, match="unknown split of tiny 'trian'; did you mean train"):
        mapped_dataset.load_tfds("tiny", "trian", tiny)
    with pytest.raises(FileNotFoundError, match=r"tiny is not prepared.*download=True"):
        mapped_dataset.load_tfds("tiny", "train", tmp_path)


# Hugging Face


def test_hf_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="needs the datasets library; pip install"):
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
    with pytest.raises(ValueError, match=r"unknown split of .* 'test'; choose one of train"):
        mapped_dataset.load_hf(tmp_path / "split", "test")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    found = mapped_dataset.load_hf(tmp_path / "json", "train", cache_dir=str(tmp_path / "cache"))
    assert [e["text"] for e in found] == ["a", "b"] and found.label_names is None


def test_hf_names_have_a_config_and_a_revision(monkeypatch):
    asked = []

    class Datasets(types.ModuleType):
        DatasetDict = dict

        def load_dataset(self, path, config, **options):
            asked.append((path, config, options))
            return {"train": types.SimpleNamespace(features={})}

    monkeypatch.setitem(sys.modules, "datasets", Datasets("datasets"))
    for name in ("imdb", "me/mine", "me/mine/big", "me/mine/a/b@refs/convert/parquet",
                 "me/mine@v1"):
        sources.load_source(f"hf:{name}", "train")
    assert asked == [
        ("imdb", None, {}), ("me/mine", None, {}), ("me/mine", "big", {}),
        ("me/mine", "a/b", {"revision": "refs/convert/parquet"}),
        ("me/mine", None, {"revision": "v1"})]


# By name


def test_load_source_of_paths(folder):
    assert len(sources.load_source(folder, "train")) == 3
    with pytest.raises(ValueError, match="has no split 'test'; give a folder with files such as"):
        sources.load_source(folder, "test")
    (folder / "train.tsv").write_text("text\tlabel\na\t1\n")
    (folder / "test.txt").write_text("b")
    assert sources.load_source(folder, "train") == [{"text": "a", "label": "1"}]
    assert sources.load_source(folder, "test") == [{"text": "b"}]
    assert sources.load_source(folder / "train.tsv", "train") == [{"text": "a", "label": "1"}]


def test_unknown_names_list_similar_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="unknown dataset 'python_docs/document'; did you "
                                                "mean python_docs/documents"):
        sources.load_source("python_docs/document", "train")
    with pytest.raises(FileNotFoundError, match="also supported: tfds:NAME, hf:NAME, and the path"):
        sources.load_source("no.txt", "train")


def test_dataset_names_take_precedence_over_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python_docs" / "documents").mkdir(parents=True)
    (tmp_path / "x.txt").write_text("a")
    assert sources.is_local("x.txt")
    for name in ("python_docs/documents", "tfds:x.txt", "hf:x.txt", "y.txt"):
        assert not sources.is_local(name)
