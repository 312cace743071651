"""Relative attention and its gradients in float64 and plain numpy, at a few queries: what results are checked against.

A cotangent that is zero but at those queries makes every gradient depend on them alone, so that maps of
any size are checked exactly without storing their (HW)^2 weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """The output at the queries ``(s, n, e)``, and the gradients with respect to all of the inputs."""

    out: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rel_h: np.ndarray
    rel_w: np.ndarray


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    rel_h: np.ndarray,
    rel_w: np.ndarray,
    cotangent: np.ndarray,
    queries: np.ndarray,
) -> Result:
    """Attends from some positions of one image, and differentiates ``sum(out * cotangent)``.

    Args:
      q, k: ``(h, w, n, d)``.
      v: ``(h, w, n, e)``.
      rel_h, rel_w: ``(2 * h - 1, d)`` and ``(2 * w - 1, d)``, row ``key - query + size - 1``.
      cotangent: ``(s, n, e)``, at the queries.
      queries: ``(s,)`` positions, row-major, without repetition.
    """
    height, width, heads, depth = q.shape
    q, k, v = (np.asarray(x, np.float64).reshape(height * width, heads, -1) for x in (q, k, v))
    rel_h, rel_w, cotangent = (np.asarray(x, np.float64) for x in (rel_h, rel_w, cotangent))
    scale = depth**-0.5
    at_row = np.arange(height) - queries[:, None] // width + height - 1  # (s, h), rows of the table
    at_column = np.arange(width) - queries[:, None] % width + width - 1
    asking = q[queries]
    by_row = np.einsum("snd,syd->sny", asking, rel_h[at_row])
    by_column = np.einsum("snd,sxd->snx", asking, rel_w[at_column])
    relative = (by_row[..., :, None] + by_column[..., None, :]).reshape(len(queries), heads, -1)
    logits = scale * (np.einsum("snd,knd->snk", asking, k) + relative)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("snk,kne->sne", weights, v)

    # d softmax: p (dp - sum p dp), and sum p dp = out . cotangent.
    d_weights = np.einsum("sne,kne->snk", cotangent, v)
    d_logits = scale * weights * (d_weights - (out * cotangent).sum(-1)[..., None])
    on_map = d_logits.reshape(len(queries), heads, height, width)
    d_row, d_column = on_map.sum(-1), on_map.sum(-2)
    d_asking = np.einsum("snk,knd->snd", d_logits, k)
    d_asking += np.einsum("sny,syd->snd", d_row, rel_h[at_row])
    d_asking += np.einsum("snx,sxd->snd", d_column, rel_w[at_column])
    d_q = np.zeros_like(q)
    d_q[queries] = d_asking
    d_rel_h, d_rel_w = np.zeros_like(rel_h), np.zeros_like(rel_w)
    np.add.at(d_rel_h, at_row, np.einsum("sny,snd->syd", d_row, asking))
    np.add.at(d_rel_w, at_column, np.einsum("snx,snd->sxd", d_column, asking))
    on_image = (height, width, heads, -1)
    return Result(
        out=out,
        q=d_q.reshape(on_image),
        k=np.einsum("snk,snd->knd", d_logits, asking).reshape(on_image),
        v=np.einsum("snk,sne->kne", weights, cotangent).reshape(on_image),
        rel_h=d_rel_h,
        rel_w=d_rel_w,
    )
