"""Buffers that new K and V pass through: the staging ring of prefill and the tail of decode."""

from __future__ import annotations

import torch

from headinfer_compile.runtime.sizes import STAGING_SLOTS
from headinfer_compile.runtime.spec import Geometry, kv_views
from headinfer_compile.runtime.streams import Event, Streams

Views = tuple[torch.Tensor, torch.Tensor]


class StagingRing:
    """Two buffers in page layout; D2H reads only these, so outputs of regions may die at once."""

    def __init__(self, geometry: Geometry, tokens: int, streams: Streams) -> None:
        self.geometry = geometry
        self.tokens = tokens
        elements = tokens * geometry.layer_token_bytes // geometry.dtype.itemsize
        with torch.inference_mode(False):
            self._buffers = torch.empty(
                (STAGING_SLOTS, elements), dtype=geometry.dtype, device=geometry.device
            )
        self.nbytes = self._buffers.nbytes
        self.packed = [streams.new_event("staging.packed") for _ in range(STAGING_SLOTS)]
        self.copied = [streams.new_event("staging.copied") for _ in range(STAGING_SLOTS)]
        self._next = 0

    def advance(self) -> int:
        """Index of the buffer to pack into next."""
        self._next = (self._next + 1) % STAGING_SLOTS
        return self._next

    def views(self, index: int, offset: int, rows: int, batch: int | None = None) -> Views:
        """Tokens ``[offset, offset + rows)`` of a piece, as a page-layout buffer of their own.

        Each segment of a piece is contiguous by itself, so one that fills a page is one run. It
        holds the ``batch`` rows that are stored; None: as many as the cache has.
        """
        per_token = self.geometry.layer_token_bytes // self.geometry.dtype.itemsize
        buffer = self._buffers[index, offset * per_token : (offset + rows) * per_token]
        geometry = self.geometry if batch is None else self.geometry.with_batch(batch)
        return kv_views(buffer, geometry, geometry.num_kv_heads, rows)


class Tail:
    """The newest tokens of every layer, appended to in place and written back once when full."""

    def __init__(self, geometry: Geometry, tokens: int, streams: Streams) -> None:
        self.tokens = tokens
        elements = tokens * geometry.layer_token_bytes // geometry.dtype.itemsize
        with torch.inference_mode(False):
            buffer = torch.empty(
                (len(geometry.layers), elements), dtype=geometry.dtype, device=geometry.device
            )
        self.nbytes = buffer.nbytes
        self.layers: dict[int, Views] = {
            layer: kv_views(row, geometry, geometry.num_kv_heads, tokens)
            for layer, row in zip(geometry.layers, buffer.unbind(), strict=True)
        }
        k, v = (
            buffer.as_strided(
                (len(buffer), *x.shape), (buffer.stride(0), *x.stride()), x.storage_offset()
            )
            for x in self.layers[geometry.layers[0]]
        )
        self.all_layers: Views = (k, v)
        """K ``[L, Hkv, B, W, D]`` and V of every layer that keeps them."""
        self.packed: Event = streams.new_event("tail.packed")
        self.copied: list[Event] = [
            streams.new_event("tail.copied") for _ in range(geometry.num_layers)
        ]
