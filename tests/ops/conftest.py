"""The slow reference: eq. 3 and 4 of the paper, one query and one key at a time, in float64."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest


def logits(q, rel):
    """``(*b, *space, n, d)`` and tables -> relative logits ``(*b, n, q, k)``, by loops."""
    q = np.asarray(q, np.float64)
    rel = [np.asarray(r, np.float64) for r in rel]
    space = q.shape[-2 - len(rel) : -2]
    positions = list(itertools.product(*map(range, space)))
    batch = q.shape[: q.ndim - 2 - len(rel)]
    n = q.shape[-2]
    out = np.zeros((*batch, n, len(positions), len(positions)))
    for b in np.ndindex(*batch):
        for h in range(n):
            for i, at in enumerate(positions):
                for j, to in enumerate(positions):
                    for axis, size in enumerate(space):
                        offset = to[axis] - at[axis]
                        out[(*b, h, i, j)] += q[(*b, *at, h)] @ rel[axis][offset + size - 1]
    return out


def attention(q, k, v, rel, *, spatial_ndim=2, scale=None):
    """``relative_attention`` straight from eq. 3: every logit, every exponential, by loops."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    space = q.shape[-2 - spatial_ndim : -2]
    positions = list(itertools.product(*map(range, space)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    relative = None if rel is None else logits(q, rel)
    out = np.zeros(v.shape)
    for b in np.ndindex(*q.shape[: q.ndim - 2 - spatial_ndim]):
        for h in range(q.shape[-2]):
            for i, at in enumerate(positions):
                line = np.array([q[(*b, *at, h)] @ k[(*b, *to, h)] for to in positions])
                if relative is not None:
                    line += relative[(*b, h, i)]
                weights = np.exp(scale * (line - line.max()))
                weights /= weights.sum()
                for j, to in enumerate(positions):
                    out[(*b, *at, h)] += weights[j] * v[(*b, *to, h)]
    return out


@pytest.fixture(scope="session")
def reference():
    return types.SimpleNamespace(logits=logits, attention=attention)


@pytest.fixture
def inputs():
    """Returns a function that draws q, k, v and tables for a spatial shape."""

    def draw(space, *, batch=(2,), n=2, d=3, e=5, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        q, k = (rng.normal(size=(*batch, *space, n, d)).astype(dtype) for _ in range(2))
        v = rng.normal(size=(*batch, *space, n, e)).astype(dtype)
        rel = tuple(rng.normal(size=(2 * s - 1, d)).astype(dtype) for s in space)
        return q, k, v, rel

    return draw
