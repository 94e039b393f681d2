"""What is compared with other libraries, and the table of it."""

import json
import sys
from pathlib import Path

import bench_references as against
import pytest
import interleave

ALL = against.Against(torch=Path("t"), flax=Path("f"), keras=Path("k"), nanogpt=Path("model.py"))


def test_each_library_does_what_it_can():
    here = ["here, float32", "matmul", "read"]
    assert list(against.commands("char_gpt_4x128", ALL)) == [*against.LIBRARIES, *here]
    assert list(against.commands("bart_base", ALL)) == [
        "hf_torch", "hf_torch_bfloat16", "hf_flax", *here]
    assert list(against.commands("gpt2_decode_8", ALL)) == [
        "hf_torch", "hf_torch_bfloat16", "hf_flax", "kerashub", *here]
    assert list(against.commands("gpt2", against.Against())) == here
    python, _, library, shape = against.commands("bert_base", ALL)["kerashub"]
    assert (python, library) == ("k", "kerashub")
    shape = json.loads(shape)
    assert (shape["kind"], shape["layers"], shape["width"], shape["mlp"], shape["vocab_size"],
            shape["rows"], shape["length"], shape["masked"]) == (
                "bert", 12, 768, 3072, 30522, 4, 128, 19)


def test_a_table(monkeypatch, tmp_path):
    def run_interleaved(commands, rounds):
        facts = {"first_seconds": 3.0, "tokens": 512, "flops": 2e9, "bytes_read": 0.0}
        seconds = {"hf_torch": 4.0, "hf_flax": 2.0, "here, float32": 1.0}
        return {name: interleave.Timings(facts | {"amount": 4e9}, [[seconds.get(name, 1.0)]] * rounds,
                                  2**20) for name in commands}

    monkeypatch.setattr(interleave, "run_interleaved", run_interleaved)
    c = against.Against(torch=Path("t"), flax=Path("f"), out=tmp_path, cases=("bert_base",),
                        libraries=("hf_torch", "hf_flax"))
    rows = against.main(c)["metrics"]["results"]
    assert [(row["worker"], row["ratio"], row["of_peak"]) for row in rows] == [
        ("here, float32", 1, 0.5), ("hf_flax", 0.5, 0.25), ("hf_torch", 0.25, 0.125)]
    assert "| bert_base | hf_flax | 2000.0 | 0.50 | 256 | 0.25 |  | 3.0 | 1 |" in (
        tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="no case gpt9; compared are gpt2, bert_base"):
        against.main(against.Against(cases=("gpt9",)))


def test_the_machine_measures_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", [""])
    against.worker("read", "{}")
    ready, turn = (json.loads(line.removeprefix("timing:"))
                   for line in capsys.readouterr().out.splitlines() if line)
    assert ready["amount"] == 2**29
    assert sum(turn["seconds"]) >= 1
