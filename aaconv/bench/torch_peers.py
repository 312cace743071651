"""The same attention in PyTorch, written from the formulas: what ours is measured against.

Every peer takes queries and keys ``(B, n, H W, d)``, values ``(B, n, H W, e)``, contiguous, and
the tables ``(2 H - 1, d)``, ``(2 W - 1, d)``, and returns ``(B, n, H W, e)``. Heads stand before
the positions because that is the layout these functions are fastest in. The relative logits are
formed inside, so they and their gradients are part of what is timed.
"""

# pyright: reportMissingImports=false
# PyTorch is an extra that only benchmarks use.

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aaconv.bench import report
from aaconv.bench.program import Inputs, Program, heads_first_of, on_map
from aaconv.bench.timing import Job

Peer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def axis_logits(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """Relative logits of each query towards each row and each column, ``(B, n, HW, H)`` and ``(B, n, HW, W)``."""
    height, width = (rel_h.shape[0] + 1) // 2, (rel_w.shape[0] + 1) // 2
    q = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnyxd,ykd->bnyxk", q, rel_h[_offsets(height, q.device)])
    by_column = torch.einsum("bnyxd,xkd->bnyxk", q, rel_w[_offsets(width, q.device)])
    return by_row.flatten(2, 3), by_column.flatten(2, 3)


def sdpa_bias(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with all of the relative logits built as its additive mask."""
    by_row, by_column = axis_logits(q, rel_h, rel_w)
    scale = q.shape[-1] ** -0.5
    bias = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2) * scale
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def sdpa_codes(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with the axis logits appended to q, and one-hot rows and columns to k."""
    by_row, by_column = axis_logits(q, rel_h, rel_w)
    height, width, depth = by_row.shape[-1], by_column.shape[-1], v.shape[-1]
    rows = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    codes = torch.cat([rows, columns], -1).expand(*k.shape[:2], -1, -1)
    scale = q.shape[-1] ** -0.5
    q, k = torch.cat([q, by_row, by_column], -1), torch.cat([k, codes], -1)
    # The fused kernels want values as deep as the keys; without them PyTorch would store every weight.
    v = F.pad(v, (0, q.shape[-1] - depth))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :depth]


def skew(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The paper's own algorithm: logits by offset, turned into logits by position with pads and reshapes."""
    height, width = (rel_h.shape[0] + 1) // 2, (rel_w.shape[0] + 1) // 2
    space = q.unflatten(2, (height, width))
    by_column = _to_positions(space @ rel_w.T)  # (B, n, H, W, W)
    by_row = _to_positions(space.transpose(2, 3) @ rel_h.T).transpose(2, 3)  # (B, n, H, W, H)
    relative = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2).flatten(2, 3)
    logits = (q @ k.transpose(-1, -2) + relative) * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v


def make_flex() -> Peer:
    """FlexAttention, compiled, with the axis logits added inside the kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        by_row, by_column = (part * scale for part in axis_logits(q, rel_h, rel_w))
        width, depth = by_column.shape[-1], v.shape[-1]

        def add_relative(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + by_row[b, n, query, key // width] + by_column[b, n, query, key % width]

        # Its kernels take no depth below 16.
        q, k, v = (F.pad(x, (0, max(0, 16 - x.shape[-1]))) for x in (q, k, v))
        out: Any = attend(q, k, v, score_mod=add_relative, scale=scale)
        return out[..., :depth]

    return flex


MAKERS: Mapping[str, Callable[[], Peer]] = {
    "torch_sdpa_bias": lambda: sdpa_bias,
    "torch_sdpa_codes": lambda: sdpa_codes,
    "torch_skew": lambda: skew,
    "torch_flex": make_flex,
}
"""What makes each of `aaconv.bench.attention.TORCH_PEERS`."""


def program(name: str, inputs: Inputs, dtype: str, *, cuda: bool) -> Program:
    """Loads inputs for a peer, in the layout it is fastest in.

    Raises:
      NotImplementedError: this PyTorch has no CUDA.
    """
    if cuda and not torch.cuda.is_available():
        raise NotImplementedError("this PyTorch sees no CUDA device")
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, which jax takes for float32 on GPUs
    else:
        torch.set_num_threads(report.cores())
    peer = MAKERS[name]()
    kind = getattr(torch, dtype)
    on_device = lambda x: torch.from_numpy(x.astype(np.float32)).to(device, kind)
    mine = inputs.heads_first()
    arrays = [on_device(x).requires_grad_() for x in mine.arrays]
    cotangent = on_device(mine.cotangent)

    def forward() -> Tensor:
        with torch.no_grad():
            return peer(*arrays)

    def gradient(cotangent: Tensor = cotangent) -> tuple[Tensor, ...]:
        return torch.autograd.grad(peer(*arrays), arrays, cotangent)

    def check(checked: np.ndarray) -> Sequence[np.ndarray]:
        found = [forward(), *gradient(on_device(heads_first_of(checked)))]
        *maps, rel_h, rel_w = (x.float().cpu().numpy() for x in found)
        return [*(on_map(x[0], checked.shape[1:3]) for x in maps), rel_h, rel_w]

    wait = (lambda result: torch.cuda.synchronize()) if cuda else (lambda result: None)
    temporaries = _cuda_temporaries if cuda else _cpu_temporaries
    return Program(
        forward=Job(forward, wait, pipelined=cuda),
        gradient=Job(gradient, wait, pipelined=cuda),
        check=check,
        forward_bytes=lambda: temporaries(forward),
        gradient_bytes=lambda: temporaries(gradient),
    )


def _cuda_temporaries(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = call()  # kept, so that what is left above the start are the results
    torch.cuda.synchronize()
    temporaries = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result
    return temporaries


def _cpu_temporaries(call: Callable[[], Any]) -> int | None:
    """The highest sum of what the allocator gave and took back, from PyTorch's own profile, less what is left."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    sums = list(itertools.accumulate(change for _, change in changes))
    del result
    return max(sums) - sums[-1] if sums else None


def _offsets(size: int, device: torch.device) -> Tensor:
    """Row of the table for each query and key position of an axis, ``(size, size)``."""
    position = torch.arange(size, device=device)
    return position[None, :] - position[:, None] + size - 1


def _to_positions(logits: Tensor) -> Tensor:
    """``(..., s, 2 s - 1)`` by offset -> ``(..., s, s)`` by key position."""
    size = logits.shape[-2]
    # One more column shifts row i of the flattened array by i: read in rows of 2 s - 1, it starts at offset -i.
    flat = F.pad(logits, (0, 1)).flatten(-2)
    rows = F.pad(flat, (0, size - 1)).unflatten(-1, (size + 1, 2 * size - 1))
    return rows[..., :size, size - 1 :]
