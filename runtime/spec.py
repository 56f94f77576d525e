"""Shapes that buffers, operators and passes agree on.

Legend: B batch, L layers, Hq query heads, Hkv KV heads, D head dim of K, Dv head dim of V.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace

import torch

from headinfer_compile.runtime.expand import TokenFunction
from headinfer_compile.runtime.masks import MaskForm


@dataclass(frozen=True)
class Geometry:
    """Shape of the KV of one token in one cache."""

    num_layers: int
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    kv_layers: tuple[int, ...] = ()
    """The layers that keep K and V; empty: all."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that keep K and V."""
        return self.kv_layers or tuple(range(self.num_layers))

    @property
    def row_elements(self) -> int:
        """Elements of K and V of one head and one batch row for one token."""
        return self.head_dim + self.v_head_dim

    @property
    def head_token_bytes(self) -> int:
        """Bytes of one KV head of one layer for one token, all batch rows."""
        return self.batch * self.row_elements * self.dtype.itemsize

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one layer for one token."""
        return self.num_kv_heads * self.head_token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of all layers for one token."""
        return len(self.layers) * self.layer_token_bytes

    def with_batch(self, rows: int) -> Geometry:
        """The same with ``rows`` batch rows."""
        return replace(self, batch=rows)


@dataclass(frozen=True)
class SiteSpec:
    """What all sites of one placement class have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    mask: MaskForm
    soft_cap: float | None = None
    """Scores s become ``soft_cap * tanh(s / soft_cap)`` before the mask."""
    sinks: int | None = None
    """Place among the site's inputs (``masks`` of a schedule) of a tensor of ``Hq`` elements: for
    each head the score of one more key, which every query sees and whose value is zero."""
    expand: TokenFunction | None = None
    """What makes K and V of the cached rows, of which ``num_kv_heads`` is the number of heads;
    ``head_dim`` and ``v_head_dim`` are those after it."""

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Asked for several times a site; that of a mask form takes 10 us.
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))


def kv_views(
    buffer: torch.Tensor, geometry: Geometry, heads: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a page-layout buffer.

    Args:
        buffer: 1-D, of the cache's dtype, at least ``heads * B * tokens * (D + Dv)`` elements.
        geometry: The cache's geometry.
        heads: KV heads in the buffer.
        tokens: Tokens the buffer has room for.

    Returns:
        K ``[heads, B, tokens, D]`` and V ``[heads, B, tokens, Dv]``; with D == Dv the buffer is
        ``[heads, 2, B, tokens, D]``.
    """
    batch, dim, v_dim = geometry.batch, geometry.head_dim, geometry.v_head_dim
    head_stride = batch * tokens * (dim + v_dim)
    base = buffer.storage_offset()
    k = buffer.as_strided((heads, batch, tokens, dim), (head_stride, tokens * dim, dim, 1), base)
    v = buffer.as_strided(
        (heads, batch, tokens, v_dim),
        (head_stride, tokens * v_dim, v_dim, 1),
        base + batch * tokens * dim,
    )
    return k, v
