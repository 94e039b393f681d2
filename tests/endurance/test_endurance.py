"""The short forms of the long trials beside this file."""

import faults
import fuzz
import kills
import pytest
import soak


@pytest.mark.slow
@pytest.mark.parametrize("mode", kills.MODES)
def test_a_run_that_is_killed_again_and_again(mode):
    found = kills.main(kills=2, devices=[1], seed=1, modes=(mode,))[mode]
    assert found["kills"] == 2 and found["epochs"] == 16 and not found["left_behind"]
    assert found["bit_equal"]


def test_damaged_checkpoints_are_never_taken_for_whole():
    found = faults.loads(trials=30, seed=2)
    assert sum(sum(kind.values()) for kind in found.values()) == 30
    assert len(found) >= 6


def test_saves_that_fail_say_so_and_leave_the_last_good_one():
    said = faults.saves()
    assert "step 10 is safe" in said["disk full"]
    assert "make room, keep fewer checkpoints" in said["no room"]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_readers_of_foreign_files(name):
    found = fuzz.main(inputs=200, targets=[name], seed=1)[name]
    assert found["wrong"] == {} and found["longest_seconds"] < fuzz.SECONDS


def test_a_longer_run_does_not_grow(tmp_path):
    rows = soak.run(150, 3, tmp_path, num_layers=1, d_model=16, num_heads=2, mlp_dim=32)
    found = soak.summary(rows)
    assert found["steps"] == 150 and found["compilations"] == 0
    assert found["resident_growth"] < 0.1  # so short a run is still warming up
    assert found["in_use_growth"] < 0.02
