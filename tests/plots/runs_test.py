"""Curves and maps are drawn, at sizes that fit what they show, and wrong input is answered."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from aaconv import plots


def _pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _weights(*shape: int) -> np.ndarray:
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum((-1, -2), keepdims=True)


ROWS = [
    {"step": 10, "epoch": 0.5, "train/loss": 2.0, "train/accuracy": 0.2, "optim/learning_rate": 0.1},
    {"step": 20, "epoch": 1.0, "train/loss": float("nan"), "train/accuracy": 0.4, "optim/learning_rate": 0.05},
    {"step": 20, "epoch": 1.0, "eval/loss": 1.5, "eval/accuracy": 0.5, "eval/top5": 0.9},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[2:], [{"step": 1, "train/loss": 1.0}]])
def test_curves_are_drawn_from_whatever_rows_there_are(tmp_path, rows):
    path = plots.curves(rows, tmp_path / "curves.png", title="a run")
    pixels = _pixels(path)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 800
    assert (pixels[0] == 255).all() and (pixels < 128).any()


def test_curves_without_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no losses to draw"):
        plots.curves([{"step": 1}], tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("image", "heads", "shape"), [((8, 8, 1), 2, (8, 8)), ((40, 30, 3), 8, (5, 7)), ((6, 6, 1), 1, (12, 12))]
)
def test_maps_grow_with_images_heads_and_queries(tmp_path, image, heads, shape):
    def draw(count: int, queries) -> tuple[int, ...]:
        images = [np.full(image, 100, np.uint8)] * count
        weights = _weights(count, heads, *shape, *shape)
        path = plots.attention_maps(
            images, weights, tmp_path / "maps.png", captions=["x"] * count, queries=queries, title="layer"
        )
        return _pixels(path).shape

    one, more_queries, more_images = draw(1, [(0, 0)]), draw(1, [(0, 0), (1, 1)]), draw(3, [(0, 0)])
    assert more_queries[0] > one[0] and more_queries[1] == one[1]
    assert more_images[0] > one[0]


def test_the_hottest_place_is_the_key_with_the_weight(tmp_path):
    weights = np.zeros((1, 1, 4, 4, 4, 4))
    weights[..., 3, 0] = 1.0  # every query looks at the lower left corner
    path = plots.attention_maps(
        [np.zeros((16, 16, 1), np.uint8)], weights, tmp_path / "maps.png", captions=[""], queries=[(0.1, 0.9)]
    )
    # The panel of head 1 lies between the image and the colour bar, one cell of 1.15 inches each.
    panel = _pixels(path).astype(int).sum(-1)[-185:-20, int(150 * 1.31) : int(150 * 2.35)]
    rows, columns = panel.shape
    corners = {
        (r, c): panel[r * rows // 2 : (r + 1) * rows // 2, c * columns // 2 :][:, : columns // 2].mean()
        for r in (0, 1)
        for c in (0, 1)
    }
    assert max(corners, key=lambda corner: corners[corner]) == (1, 0)


@pytest.mark.parametrize(
    ("shape", "captions", "queries", "words"),
    [
        ((1, 2, 4, 4), [""], [(0, 0)], r"weights have shape \(1, 2, 4, 4\)"),
        ((1, 2, 4, 4, 4, 5), [""], [(0, 0)], "over two axes"),
        ((2, 2, 4, 4, 4, 4), [""], [(0, 0)], "1 images, 2 maps and 1 captions"),
        ((1, 2, 4, 4, 4, 4), [""], [(0, 1.5)], "query 0,1.5 lies outside the image"),
    ],
)
def test_wrong_maps_are_refused(tmp_path, shape, captions, queries, words):
    with pytest.raises(ValueError, match=words):
        plots.attention_maps(
            [np.zeros((8, 8, 1), np.uint8)], _weights(*shape), tmp_path / "x.png", captions=captions, queries=queries
        )
