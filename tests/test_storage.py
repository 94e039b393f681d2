"""File manifests and JSON files."""

import pytest

from transformer_jax import storage


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1234")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "b.bin").write_bytes(b"5678")
    assert not storage.has_manifest(tmp_path)
    storage.write_manifest(tmp_path)
    assert storage.has_manifest(tmp_path)
    return tmp_path


def test_unchanged_files_match_their_manifest(folder):
    assert storage.verify_manifest(folder) is None


def test_problems_are_described(folder):
    (folder / "extra").write_text("")
    assert storage.verify_manifest(folder) == "extra is not in digests.json"
    assert storage.verify_manifest(folder, allow_extra_files=True) is None
    (folder / "nested" / "b.bin").write_bytes(b"5679")
    assert storage.verify_manifest(folder) == (
        "nested/b.bin is corrupted: its SHA-256 differs from digests.json")
    (folder / "a.bin").unlink()
    assert storage.verify_manifest(folder) == "a.bin is missing"
    (folder / storage.MANIFEST).write_text("[")
    assert "digests.json cannot be read" in storage.verify_manifest(folder)


@pytest.mark.parametrize(("content", "message"), [
    ("{", "x.json is not valid JSON .*; the file is corrupted or truncated: download it again"),
    ("[" * 10**5, "x.json is not valid JSON"),
    ("[1]", "x.json holds a list; it must hold a JSON object"),
])
def test_invalid_json_is_an_error_of_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        storage.read_json(path)
    assert "\n" not in str(error.value)


def test_an_interrupted_write_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"first", b"second"):
        with storage.atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(OSError, match="disk full"), storage.atomic_write(path) as file:
        file.write(b"third")
        raise OSError("disk full")
    assert path.read_bytes() == b"second"
