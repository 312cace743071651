from __future__ import annotations

import numpy as np
import pytest

from aaconv import ops


def test_sinusoid_gives_each_axis_its_own_channels():
    code = np.asarray(ops.sinusoid((5, 7), 16))
    assert code.shape == (5, 7, 16)
    assert (code[:, :1, :8] == code[:, :, :8]).all() and (code[:1, :, 8:] == code[:, :, 8:]).all()
    for axis, half in enumerate((code[:, 0, :8], code[0, :, 8:])):
        size = (5, 7)[axis]
        for p in range(size):
            for i in range(4):
                angle = p / 10_000 ** (i / 4)
                np.testing.assert_allclose(half[p, [i, 4 + i]], [np.sin(angle), np.cos(angle)], atol=1e-6)


def test_every_position_is_told_apart():
    for code in (ops.sinusoid((6, 5), 8), ops.coordinates((6, 5))):
        flat = np.asarray(code).reshape(30, -1)
        distance = np.abs(flat[:, None] - flat[None]).max(-1) + np.eye(30)
        assert distance.min() > 1e-3


def test_left_over_channels_are_zero():
    assert (np.asarray(ops.sinusoid((3, 4), 11))[..., 8:] == 0).all()


def test_coordinates_span_minus_one_to_one():
    y, x, radius = np.moveaxis(np.asarray(ops.coordinates((3, 5))), -1, 0)
    np.testing.assert_allclose(y[:, 0], [-1, 0, 1])
    np.testing.assert_allclose(x[0], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(radius, np.hypot(y, x), atol=1e-6)
    assert ops.coordinates((1, 4, 4), radius=False).shape == (1, 4, 4, 3)


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="channels=3 for 2 axes.* 4 in all"):
        ops.sinusoid((3, 4), 3)
