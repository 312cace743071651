"""What a network can know of two digits: a plain one sees each alone, attention sees a set, positions give an order.

Random weights show it, since it is a matter of what is connected: these are the networks of configs/digit_pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aaconv import config as config_lib, train
from aaconv.data import augment, digits
from aaconv.data.digit_pairs import DIGIT, GAPS, HEIGHT, KINDS, LABELS, MARGIN, WIDTH

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "digit_pairs.py")
FIRST, SECOND = 3, 11  # of scikit-learn's digits: a 3 and a 1
FAR, NEAR = GAPS["far"][0], GAPS["near"][0]
RECEPTIVE_FIELD = 25  # pixels: 3 of the stem, 4 more in stage 1, 2 + 4 in stage 2, 4 + 8 in stage 3


def image(*placed: tuple[int, int]) -> np.ndarray:
    """A black image with digits at columns."""
    pixels = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    for index, column in placed:
        pixels[:, column : column + DIGIT, 0] = digits.load().images[index]
    return pixels


def bars(*columns: int) -> np.ndarray:
    """A black image with white columns."""
    pixels = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    pixels[:, list(columns)] = 255
    return pixels


def classifier(*overrides: str) -> Callable[..., np.ndarray]:
    """The config's network with random weights: images to logits."""
    config = config_lib.load(CONFIG, ["data.name=digit_pairs/far", *overrides])
    model = train.build_model(config, len(LABELS))

    @jax.jit
    def logits(images: jax.Array) -> jax.Array:
        scaled = augment.normalise(images, tuple(config.data.mean), tuple(config.data.std))
        return model.apply(model.init(jax.random.key(0), scaled[:1], train=False), scaled, train=False)

    return lambda *images: np.asarray(logits(jnp.asarray(np.stack(images))))


def scene(gap: int, left: int = MARGIN) -> list[np.ndarray]:
    """Both digits, one, the other, none; and both with their places exchanged."""
    right = left + DIGIT + gap
    return [
        image((FIRST, left), (SECOND, right)),
        image((FIRST, left)),
        image((SECOND, right)),
        image(),
        image((SECOND, left), (FIRST, right)),
    ]


def together(logits: np.ndarray) -> float:
    """What two things give beyond what each gives alone, as a share of all they give; of both, one, the other, none."""
    both, first, second, none = logits[:4]
    return float(abs(both - first - second + none).max() / abs(both - none).max())


NOTHING = 1e-4  # of float32's rounding; what is there was ten times as much and more


@pytest.fixture(scope="module")
def plain() -> Callable[..., np.ndarray]:
    return classifier("model.attention_ratio=0")


def test_without_attention_far_digits_are_a_sum_of_each_alone_whichever_is_left(plain):
    extremes = [(gap, left) for gap in (FAR, GAPS["far"][-1]) for left in range(MARGIN, MARGIN + 4)]
    found = plain(*(picture for gap, left in [*extremes, (NEAR, MARGIN)] for picture in scene(gap, left)))
    *far, near = found.reshape(-1, 5, len(LABELS))
    assert max(map(together, far)) < NOTHING < together(near) / 100
    both, *_, exchanged = far[0]  # whose digits stand 32 pixels apart, the same place in the network's grid
    assert np.allclose(both, exchanged, rtol=NOTHING)


def test_the_receptive_field_is_as_wide_as_the_margin_says(plain):
    distances = range(RECEPTIVE_FIELD - 2, RECEPTIVE_FIELD + 1)
    starts = range(40, 44)
    wanted = [columns for x in starts for d in distances for columns in ((x, x + d), (x,), (x + d,), ())]
    found = plain(*(bars(*columns) for columns in wanted)).reshape(len(starts), len(distances), 4, -1)
    seen = [max(together(found[start, d]) for start in range(len(starts))) > NOTHING for d in range(len(distances))]
    assert seen == [True, True, False]  # a window of 25 pixels holds two columns that are 24 apart
    assert MARGIN == FAR == RECEPTIVE_FIELD - 1


def test_attention_without_positions_relates_far_digits_but_not_their_order():
    both, *rest, exchanged = found = classifier("model.position_encoding=none")(*scene(FAR))
    assert together(found) > 100 * NOTHING and np.allclose(both, exchanged, rtol=NOTHING)


def test_attention_with_relative_positions_sees_which_one_is_left():
    both, *rest, exchanged = found = classifier()(*scene(FAR))
    assert together(found) > 100 * NOTHING and abs(both - exchanged).max() > 10 * NOTHING * abs(both).max()


def test_what_sums_can_tell_is_what_the_data_set_says():
    # Of any score a digit, those whose score is above 0 are called same among themselves; others need not be.
    def right(size: int) -> float:
        pairs = KINDS * (KINDS - 1) / 2
        return size / KINDS / 3 + (1 - size * (size - 1) / 2 / pairs) / 3  # half of those that differ: no order is seen

    assert max(map(right, range(KINDS + 1))) == pytest.approx(0.433, abs=5e-4)
