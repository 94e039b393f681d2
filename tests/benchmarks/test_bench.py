"""Every kind of benchmark case, on a tiny model."""

import bench
import pytest

TINY = {"num_layers": 1, "d_model": 16, "num_heads": 2, "mlp_dim": 32, "vocab_size": 50,
        "max_length": 48}
CASES = {
    "gpt": bench.Case("gpt2", 2, 16, changes=TINY),
    "bert": bench.Case("bert_tiny", 2, 16, changes=TINY),
    "bart": bench.Case("bart_base", 2, 16, target_length=8, changes=TINY),
    "gpt_decode": bench.Case("gpt2", 2, 8, "decode", 4, TINY),
    "bart_decode": bench.Case("bart_base", 1, 8, "decode", 4, TINY | {"decoder_start_token_id": 2}),
    "lora": bench.Case("bert_tiny", 2, 16, "lora:2", changes=TINY),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_measurements_of_a_case(monkeypatch, name):
    monkeypatch.setattr(bench, "CASES", CASES)
    monkeypatch.setattr(bench.chips, "matmul_flops_per_second", lambda dtype: 1e9)
    monkeypatch.setattr(bench.chips, "memory_bandwidth", lambda: 1e9)
    line = bench.time_case(name, bench.BenchConfig(rounds=2, dropout_rate=0.1))
    case = CASES[name]
    tokens = case.batch_size * (case.target_length if case.work == "decode"
                                else case.length + case.target_length)
    assert line["tokens_per_second"] == pytest.approx(tokens / line["median_seconds"], rel=0.01)
    assert line["compilations_after_second"] == 0
    assert line["compile_seconds"] > 0
    assert ("mfu" in line) == (name in ("gpt", "bert"))
    assert ("read_share" in line) == (case.work == "decode")


def test_unknown_case_is_an_error():
    with pytest.raises(ValueError, match="unknown case 'gpt9'; did you mean gpt2"):
        bench.main(bench.BenchConfig(cases=("gpt9",)))
