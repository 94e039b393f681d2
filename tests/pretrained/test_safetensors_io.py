"""The safetensors format: round trips, compatibility, and corrupted files."""

import json

import ml_dtypes
import numpy as np
import pytest
from pretrained.files import read_all, write_tensors

from transformer_jax.pretrained import safetensors_io

VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5, -2]),
    "c": np.array([3, -7], ml_dtypes.bfloat16), "d": np.array([True, False]),
    "e": np.zeros((0, 4), np.float32), "f": np.array(5, np.int64),
}


def assert_same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


def test_round_trip(tmp_path):
    write_tensors(tmp_path, VALUES)
    assert_same(read_all(tmp_path))


def test_large_weights_are_split_into_shards(tmp_path):
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    index = json.loads((tmp_path / safetensors_io.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 24 + 4 + 4 + 2 + 8
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert_same(read_all(tmp_path))


def test_files_of_an_earlier_save_are_deleted(tmp_path):
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    write_tensors(tmp_path, VALUES)
    assert [path.name for path in tmp_path.iterdir()] == [safetensors_io.WEIGHTS_FILE]
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    assert_same(read_all(tmp_path))


def test_the_safetensors_package_reads_and_writes_the_same_format(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {name: value for name, value in VALUES.items() if name != "c"}
    write_tensors(tmp_path, plain)
    for name, value in library.load_file(tmp_path / safetensors_io.WEIGHTS_FILE).items():
        np.testing.assert_array_equal(value, plain[name], strict=True)
    library.save_file(plain, tmp_path / safetensors_io.WEIGHTS_FILE, metadata={"format": "np"})
    for name, value in read_all(tmp_path).items():
        np.testing.assert_array_equal(value, plain[name], strict=True)


def test_aligned_empty_is_aligned():
    arrays = [safetensors_io.aligned_empty((3, n), np.float32) for n in range(1, 20)]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)


def raw(header: bytes | dict, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1", "not a valid safetensors file: it has 1 bytes"),
        (raw({}, length=10**12), "declares a header of 1000000000000 bytes"),
        (raw(b"{not json"), "invalid header"),
        (raw(b"[1, 2]"), "invalid header"),
        (raw(b"\xff\xfe{}"), "invalid header"),
        (raw({"x": {"dtype": "F32", "shape": [2]}}), "invalid header .KeyError: 'data_offsets'"),
        (raw({"x": 3}), "invalid header"),
        (raw(entry(dtype="F8_E4M3")), "'x' has dtype 'F8_E4M3'; it must be one of F64"),
        (raw(entry(shape=[3])), "needs 12 bytes but has 8"),
        (raw(entry(dtype="F16")), "needs 4 bytes but has 8"),
        (raw(entry(shape=[-2])), "integers of at least 0"),
        (raw(entry(shape=[2.0])), "integers of at least 0"),
        (raw(entry(data_offsets=[-8, 0])), "integers of at least 0"),
        (raw(entry(data_offsets=[800, 808])), "tensor 'x' ends at byte .*, but the file has"),
        (raw(entry(), b"\0" * 7), "tensor 'x' ends at byte .*, but the file has"),
        (raw(entry() | {"y": entry(data_offsets=[4, 12])["x"]}), "the bytes of tensor 'y' overlap"),
    ],
)
def test_corrupted_files_are_rejected(content, message, tmp_path):
    (tmp_path / safetensors_io.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        safetensors_io.list_tensors(tmp_path)
    assert "\n" not in str(error.value)
    assert safetensors_io.WEIGHTS_FILE in str(error.value)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "is not a valid index of shards"),
        ('{"weight_map": {"a": 3}}', ValueError, "is not a valid index of shards"),
        ('{"weight_map": {"a": "../a.safetensors"}}', ValueError,
         "shards must be files in the folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', FileNotFoundError,
         "lists the shard gone.safetensors, which does not exist"),
        ('{"weight_map": {"z": "one.safetensors"}}', ValueError,
         "lists tensor 'z', which one.safetensors does not contain"),
    ],
)
def test_corrupted_indices_are_rejected(index, error, message, tmp_path):
    write_tensors(tmp_path, VALUES)
    (tmp_path / safetensors_io.WEIGHTS_FILE).rename(tmp_path / "one.safetensors")
    (tmp_path / safetensors_io.INDEX_FILE).write_text(index)
    with pytest.raises(error, match=message) as raised:
        safetensors_io.list_tensors(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_truncated_after_its_header_was_read_is_rejected(tmp_path):
    write_tensors(tmp_path, VALUES)
    entries = safetensors_io.list_tensors(tmp_path)
    path = tmp_path / safetensors_io.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is too short: 1 bytes"):
        for found in entries.values():
            safetensors_io.load_tensor(found)
