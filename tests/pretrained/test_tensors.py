"""The file format: what others write is read, what is damaged is refused by name."""

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


def same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


def test_what_is_written_is_read(tmp_path):
    write_tensors(tmp_path, VALUES)
    same(read_all(tmp_path))


def test_shards_have_an_index(tmp_path):
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    index = json.loads((tmp_path / safetensors_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == 24 + 4 + 4 + 2 + 8
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    same(read_all(tmp_path))


def test_an_earlier_save_does_not_stay_beside_this_one(tmp_path):
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    write_tensors(tmp_path, VALUES)
    assert [path.name for path in tmp_path.iterdir()] == [safetensors_io.WEIGHTS]
    write_tensors(tmp_path, VALUES, shard_bytes=30)
    same(read_all(tmp_path))


def test_the_format_is_that_of_its_own_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {name: value for name, value in VALUES.items() if name != "c"}
    write_tensors(tmp_path, plain)
    for name, value in library.load_file(tmp_path / safetensors_io.WEIGHTS).items():
        np.testing.assert_array_equal(value, plain[name], strict=True)
    library.save_file(plain, tmp_path / safetensors_io.WEIGHTS, metadata={"format": "np"})
    for name, value in read_all(tmp_path).items():
        np.testing.assert_array_equal(value, plain[name], strict=True)


def test_memory_can_be_taken_over():
    assert all(safetensors_io.empty((3, n), np.float32).ctypes.data % 64 == 0 for n in range(1, 20))


def raw(header: bytes | dict, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1", "cut off: it has 1 bytes"),
        (raw({}, length=10**12), "says that 1000000000000 of them are its header"),
        (raw(b"{not json"), "damaged header"),
        (raw(b"[1, 2]"), "damaged header"),
        (raw(b"\xff\xfe{}"), "damaged header"),
        (raw({"x": {"dtype": "F32", "shape": [2]}}), "damaged header .KeyError: 'data_offsets'"),
        (raw({"x": 3}), "damaged header"),
        (raw(entry(dtype="F8_E4M3")), "'x' is of type 'F8_E4M3'; it must be one of F64"),
        (raw(entry(shape=[3])), "needs 12 bytes but has 8"),
        (raw(entry(dtype="F16")), "needs 4 bytes but has 8"),
        (raw(entry(shape=[-2])), "whole numbers from 0"),
        (raw(entry(shape=[2.0])), "whole numbers from 0"),
        (raw(entry(data_offsets=[-8, 0])), "whole numbers from 0"),
        (raw(entry(data_offsets=[800, 808])), "is cut off: tensor 'x' ends at byte"),
        (raw(entry(), b"\0" * 7), "is cut off: tensor 'x' ends at byte"),
        (raw(entry() | {"y": entry(data_offsets=[4, 12])["x"]}), "'y' begins inside another"),
    ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
    (tmp_path / safetensors_io.WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        safetensors_io.open_weights(tmp_path)
    assert "\n" not in str(error.value)
    assert safetensors_io.WEIGHTS in str(error.value)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "is no index of weights"),
        ('{"weight_map": {"a": 3}}', ValueError, "is no index of weights"),
        ('{"weight_map": {"a": "../a.safetensors"}}', ValueError, "shards must be files beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', FileNotFoundError,
         "names gone.safetensors, which is not there"),
        ('{"weight_map": {"z": "one.safetensors"}}', ValueError,
         "names tensor 'z', which is not in one.safetensors"),
    ],
)
def test_damaged_indices_are_refused(index, error, message, tmp_path):
    write_tensors(tmp_path, VALUES)
    (tmp_path / safetensors_io.WEIGHTS).rename(tmp_path / "one.safetensors")
    (tmp_path / safetensors_io.INDEX).write_text(index)
    with pytest.raises(error, match=message) as raised:
        safetensors_io.open_weights(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_became_shorter_is_seen(tmp_path):
    write_tensors(tmp_path, VALUES)
    entries = safetensors_io.open_weights(tmp_path)
    path = tmp_path / safetensors_io.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut off: 1 bytes"):
        for one in entries.values():
            safetensors_io.read(one)
