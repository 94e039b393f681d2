"""Every study at its smallest: it runs, says what it found, and draws it."""

import dataclasses
import json
import sys

import pytest
import studies
import study
from matplotlib.image import imread

FOUND = {  # of the metrics of each, what its claim is judged by
    "bidirectional": ("filling", "continuation", "finetuned"),
    "embeddings": ("neighbours", "same_group_nearest", "same_label_nearest", "segments"),
    "grokking": ("sweep", "critical_share", "finetuning"),
    "masks": ("gpt", "spelling"),
    "objectives": ("systems", "chance"),
    "positions": ("GPT, none", "BERT, learned"),
    "residual_links": ("models", "landscape"),
    "transfer": ("rows", "held_out", "chance"),
    "which_parameters": ("cells", "best", "held_out_before"),
}


ALL = studies.load()  # their modules are there from here on


def test_all_are_here():
    assert sorted(FOUND) == studies.names()
    assert len(ALL) == 3 * len(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_the_smallest_of_each(name, tmp_path, request):
    module = sys.modules[f"studies.{name}"]
    c = dataclasses.replace(module.smallest(), out=tmp_path)
    if name == "transfer":
        c = dataclasses.replace(c, data=request.getfixturevalue("real_data"))
    study.main(c)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(FOUND[name]) <= saved["metrics"].keys()
    picture = imread(tmp_path / f"{name}.png")
    assert picture.std() > 0.05  # something is drawn


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path):
    for name, changes, message in (
        ("grokking", {"grokked": 0.9}, "grokked is 0.9"),
        ("residual_links", {"landscape_depth": 3}, "landscape_depth is 3"),
        ("transfer", {"data": tmp_path}, "does not exist"),
    ):
        module = sys.modules[f"studies.{name}"]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module.run(dataclasses.replace(module.smallest(), out=tmp_path, **changes))
