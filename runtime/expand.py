"""Attention whose K and V are computed from the cached rows, token by token, piece by piece.

Models with latent attention cache a compressed row a token and expand it to the K and V of all
heads before they attend. Here each KV block is expanded when it is attended, a bounded piece at a
time, so that what is stored and streamed stays compressed and expanded K and V never exist in full.

Legend: B batch, H heads after expansion, n queries, m keys, D / Dv head dims after expansion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from headinfer_compile.runtime.merge import merge_

_LEAST_ROWS = 16


@dataclass(frozen=True)
class TokenFunction:
    """K and V of an attention as a function of cached rows; equal for equal ``key`` and inputs."""

    key: str
    """The function as text."""
    inputs: tuple[int, ...]
    """Places among the site's inputs of the tensors that it reads besides, such as weights."""
    num_heads: int
    """H: heads of the K and V that it makes."""
    function: Callable[..., tuple[Tensor, Tensor]] = field(compare=False, repr=False)
    """``(k [B, 1, m, *], v [B, 1, m, *], m, *inputs) -> (K [B, H, m, D], V [B, H, m, Dv])``"""


class _Attend(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def rows_within(nbytes: int, expand: TokenFunction, batch: int, dims: int, itemsize: int) -> int:
    """Tokens whose K and V, ``dims`` elements a head together, take ``nbytes`` once expanded."""
    rows = nbytes // (batch * expand.num_heads * dims * itemsize)
    return max(_LEAST_ROWS, rows // _LEAST_ROWS * _LEAST_ROWS)


def attend_expanded(
    attend: _Attend,
    expand: TokenFunction,
    inputs: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Attend cached rows, expanded ``rows`` tokens at a time.

    Args:
        attend: Attends expanded K and V; as a kernel, without scale.
        expand: What makes K and V.
        inputs: The site's inputs.
        q: ``[B, H, n, D]``.
        k: ``[B, 1, m, *]``, what the cache holds as K.
        v: ``[B, 1, m, *]``, what the cache holds as V.
        causal: Square and top-left: n == m.
        mask: Broadcasts to ``[B, H, n, m]``, or None.
        rows: Tokens of a piece.

    Returns:
        out ``[B, H, n, Dv]``, fp32 if there are several pieces, and lse fp32 ``[B, H, n]``.
    """
    extra = [inputs[place] for place in expand.inputs]
    keys, queries = k.shape[2], q.shape[2]
    acc: tuple[Tensor, Tensor] | None = None
    for low in range(0, keys, rows):
        high = min(keys, low + rows)
        block = expand.function(k[:, :, low:high], v[:, :, low:high], high - low, *extra)
        part = mask[..., low:high] if mask is not None and mask.shape[-1] > 1 else mask
        if low == 0 and high == keys:
            return attend(q, *block, causal, part)
        if acc is None:
            shape = (*q.shape[:3], block[1].shape[3])
            out = q.new_zeros(shape, dtype=torch.float32)
            acc = out, q.new_full(shape[:3], -math.inf, dtype=torch.float32)
        # Of a causal square, the piece's own queries see a smaller square, later ones all of it.
        for first, last, square in _query_parts(low, high, queries, causal):
            one = attend(q[:, :, first:last], *block, square, part)
            merge_(acc[0][:, :, first:last], acc[1][:, :, first:last], *one)
    assert acc is not None
    return acc


def _query_parts(low: int, high: int, queries: int, causal: bool) -> list[tuple[int, int, bool]]:
    if not causal:
        return [(0, queries, False)]
    parts = [(low, high, high - low > 1), (high, queries, False)]
    return [part for part in parts if part[0] < part[1]]
