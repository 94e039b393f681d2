"""Every picture is a PNG with something on it."""

import numpy as np
from matplotlib.image import imread

from transformer_jax import draw
from transformer_jax.nn.positions import sinusoidal


def has_ink(path) -> bool:
    pixels = imread(path)
    return pixels.shape[0] > 200 and pixels[..., :3].std() > 0.01


def test_pictures(tmp_path):
    paths = [
        draw.curves(tmp_path / "a" / "curves.png", {"training": ([1, 2, 3], [3, 2, 1]),
                                                    "held-out": ([1, 3], [3.1, 1.5])}, title="t"),
        draw.positions(tmp_path / "positions.png", {"fixed": sinusoidal(20, 8)}),
        draw.attention(tmp_path / "attention.png", {"full": np.eye(3), "causal": np.tri(3)},
                       ["a", "b", "c"]),
        draw.attention(tmp_path / "cross.png", {"layer 0": np.eye(2, 5)}, ["a", "b"],
                       ["v", "w", "x", "y", "z"], title="cross-attention"),
        draw.label_efficiency(tmp_path / "labels.png", {"GPT": {"full": ([8, 32], [0.3, 0.6],
                                                                        [0.1, 0.0])}},
                              title="t", chance=0.2),
    ]
    assert all(has_ink(path) for path in paths)


def test_positions_have_a_column_per_position_and_a_row_per_dimension(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", _recording(shown))
    draw.positions(tmp_path / "p.png", {"fixed": sinusoidal(20, 8)})
    assert shown[0].shape == (8, 20)


def _recording(shown):
    from matplotlib.axes import Axes

    original = Axes.imshow

    def imshow(self, image, **options):
        shown.append(np.asarray(image))
        return original(self, image, **options)

    return imshow
