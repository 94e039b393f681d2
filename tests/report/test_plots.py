"""Plots: every PNG has content, and the right numbers and labels."""

import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from transformer_jax import metrics
from transformer_jax.nn.layers import sinusoidal_positions
from transformer_jax.report import plots


def has_ink(path) -> bool:
    """Whether an image is not of one color."""
    pixels = imread(path)
    return pixels.shape[0] > 200 and pixels[..., :3].std() > 0.01


def test_plots_have_content(tmp_path):
    paths = [
        plots.curves(tmp_path / "a" / "curves.png", {"training": ([1, 2, 3], [3, 2, 1]),
                                                     "held-out": ([1, 3], [3.1, 1.5])}, title="t"),
        plots.positions(tmp_path / "positions.png", {"fixed": sinusoidal_positions(20, 8)}),
        plots.attention(tmp_path / "attention.png", {"full": np.eye(3), "causal": np.tri(3)},
                        ["a", "b", "c"]),
        plots.attention(tmp_path / "cross.png", {"layer 0": np.eye(2, 5)}, ["a", "b"],
                        ["v", "w", "x", "y", "z"], title="cross-attention"),
        plots.label_efficiency(tmp_path / "labels.png", {
            "GPT": {"full": ([8, 32], [0.3, 0.6], [0.1, 0.0])}}, title="t", chance=0.2),
    ]
    assert all(has_ink(path) for path in paths)


NAMES = ["alt.atheism", "comp.graphics", "sci.space", "talk.politics.guns"]


@pytest.mark.parametrize("classes", [1, 2, 8, 20])
def test_confusion_matrix_has_counts_and_percentages(tmp_path, classes, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", _recording_text(shown))
    table = np.full((classes, classes), 10) + 30 * np.eye(classes, dtype=int)
    table[-1] = 0  # a class without examples
    names = [NAMES[i % 4] for i in range(classes)]
    assert has_ink(plots.confusion(tmp_path / "c.png", table, names, title="t"))
    assert len(shown) == classes**2
    if classes == 2:
        assert shown == ["40\n80 %", "10\n20 %", "0\n0 %", "0\n0 %"]
    if classes == 20:
        assert shown[:2] == ["40\n17 %", "10"] and shown[-2:] == ["", "\n0 %"]


def test_calibration_and_costs(tmp_path):
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    found = metrics.calibration(probabilities, np.array([0, 1, 1]))
    assert has_ink(plots.calibration(tmp_path / "calibration.png", found, title="t"))
    assert has_ink(plots.costs(tmp_path / "costs.png", {
        "full": {"time": 1.0, "memory": 1.0}, "head": {"time": 0.3, "memory": 1e-4}}, title="t"))


def test_label_efficiency_of_different_panels_and_single_seeds(tmp_path):
    lines = {"full": ([8, 32, 128], [0.3, 0.6, 0.7], [0.1, 0.0, 0.05]),
             "from scratch": ([32], [0.4], [float("nan")])}
    assert has_ink(plots.label_efficiency(
        tmp_path / "labels.png", {"GPT": {"full": lines["full"]}, "BERT": lines}, title="t",
        chance=0.2))


def test_labels_of_trainable_specs_do_not_overlap(tmp_path, monkeypatch):
    boxes, save = [], plots.save

    def saved(figure, path):
        done = save(figure, path)
        boxes.extend(text.get_window_extent() for text in figure.axes[0].texts)
        return done

    monkeypatch.setattr(plots, "save", saved)
    found = {f"spec:{i}": (0.001 * (1 + i / 10), 90 + i / 10, 0.1) for i in range(5)}
    assert has_ink(plots.trainable_specs(
        tmp_path / "r.png", found, title="t", ylabel="accuracy (%)"))
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_trainable_specs_of_one_seed(tmp_path):
    found = {"full": (1.0, 90.0, float("nan")), "head": (1e-5, 80.0, float("nan"))}
    assert has_ink(plots.trainable_specs(tmp_path / "r.png", found, title="t", ylabel="f1 (%)"))


def test_positions_have_a_column_per_position_and_a_row_per_dimension(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", _recording(shown))
    plots.positions(tmp_path / "p.png", {"fixed": sinusoidal_positions(20, 8)})
    assert shown[0].shape == (8, 20)


def _recording(shown):
    from matplotlib.axes import Axes

    original = Axes.imshow

    def imshow(self, image, **options):
        shown.append(np.asarray(image))
        return original(self, image, **options)

    return imshow


def _recording_text(shown):
    from matplotlib.axes import Axes

    original = Axes.text

    def text(self, x, y, words, **options):
        shown.append(words)
        return original(self, x, y, words, **options)

    return text
