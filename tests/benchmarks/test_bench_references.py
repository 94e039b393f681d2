"""The workers of the comparison with other libraries, and its table."""

import json
import sys
from pathlib import Path

import bench_references
import interleave
import pytest

ALL = bench_references.ReferencesConfig(
    torch=Path("t"), flax=Path("f"), keras=Path("k"), nanogpt=Path("model.py"))


def test_workers_of_each_case():
    here = ["here, float32", "matmul", "read"]

    def workers(name, config=ALL):
        return list(bench_references.worker_commands(name, config))

    assert workers("char_gpt_4x128") == [
        *(library for library in bench_references.LIBRARIES if library != "peft"), *here]
    assert workers("bert_base_lora_8") == ["peft", *here]
    assert workers("bart_base") == ["hf_torch", "hf_torch_bfloat16", "hf_flax", *here]
    assert workers("gpt2_decode_8") == [
        "hf_torch", "hf_torch_bfloat16", "hf_flax", "kerashub", *here]
    assert workers("gpt2", bench_references.ReferencesConfig()) == here
    python, _, library, case = bench_references.worker_commands("bert_base", ALL)["kerashub"]
    assert (python, library) == ("k", "kerashub")
    case = json.loads(case)
    assert [case[name] for name in (
        "family", "num_layers", "d_model", "mlp_dim", "vocab_size", "batch_size", "length",
        "num_masked")] == ["bert", 12, 768, 3072, 30522, 4, 128, 19]


def test_table(monkeypatch, tmp_path):
    def run_interleaved(commands, rounds):
        info = {"first_seconds": 3.0, "tokens": 512, "flops": 2e9, "bytes_read": 0.0,
                "amount": 4e9}
        seconds = {"hf_torch": 4.0, "hf_flax": 2.0, "here, float32": 1.0}
        return {name: interleave.Timings(info, [[seconds.get(name, 1.0)]] * rounds, 2**20)
                for name in commands}

    monkeypatch.setattr(interleave, "run_interleaved", run_interleaved)
    config = bench_references.ReferencesConfig(
        torch=Path("t"), flax=Path("f"), out=tmp_path, cases=("bert_base",),
        libraries=("hf_torch", "hf_flax"))
    rows = bench_references.main(config)["metrics"]["results"]
    assert [(row["worker"], row["ratio"], row["of_peak"]) for row in rows] == [
        ("here, float32", 1, 0.5), ("hf_flax", 0.5, 0.25), ("hf_torch", 0.25, 0.125)]
    assert "| bert_base | hf_flax | 2000.0 | 0.50 | 256 | 0.25 |  | 3.0 | 1 |" in (
        tmp_path / "table.md").read_text()


def test_unknown_case_is_an_error():
    with pytest.raises(ValueError, match="unknown case 'gpt9'; did you mean gpt2"):
        bench_references.main(bench_references.ReferencesConfig(cases=("gpt9",)))


def test_worker_that_measures_the_memory_bandwidth(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", [""])
    bench_references.run_worker("read", "{}")
    ready, timed_round = (json.loads(line.removeprefix("timing:"))
                          for line in capsys.readouterr().out.splitlines() if line)
    assert ready["amount"] == 2**29
    assert sum(timed_round["seconds"]) >= 1
