"""Short forms of the reliability trials in this folder."""

import faults
import fuzz
import kills
import pytest
import soak

pytestmark = pytest.mark.endurance


@pytest.mark.parametrize("mode", kills.MODES)
def test_killed_run_equals_an_uninterrupted_one(mode):
    results = kills.main(kills=2, seed=1, modes=(mode,))[mode]
    assert results["kills"] == 2 and results["epochs"] == 16 and not results["leftover_files"]
    assert results["bit_equal"]


def test_corrupted_checkpoints_are_never_loaded():
    outcomes = faults.corrupted_checkpoints(trials=30, seed=2)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == 30
    assert len(outcomes) >= 6


def test_failing_saves_name_the_last_complete_checkpoint():
    messages = faults.failing_saves()
    assert "the last complete checkpoint is step 10" in messages["file too large"]
    assert "delete files, keep fewer checkpoints" in messages["disk full"]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_malformed_input_raises_documented_errors_only(name):
    results = fuzz.main(inputs=200, targets=[name], seed=1)[name]
    assert results["failures"] == {} and results["longest_seconds"] < fuzz.MAX_SECONDS


def test_longer_run_does_not_need_more_memory(tmp_path):
    rows = soak.run(150, 3, tmp_path, num_layers=1, d_model=16, num_heads=2, mlp_dim=32)
    results = soak.summarize(rows)
    assert results["steps"] == 150 and results["compilations"] == 0
    assert results["resident_growth"] < 0.1  # a run this short is still warming up
    assert results["in_use_growth"] < 0.02
