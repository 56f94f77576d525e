"""Fills caches with random K and V, so that decode at a length needs no prefill of that length.

Decode reads the same bytes in the same order whatever they hold, so its times are those of a real
context; rows measured this way say ``"synthetic": true``.
"""

from __future__ import annotations

import torch
from transformers import Cache

from benchmarks.models import Shape
from headinfer_compile import HeadInferCache


def fill_transformers(
    cache: Cache, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Give every layer of an empty cache ``tokens`` random tokens, through its own ``update``."""
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    for layer in range(shape.layers):
        cache.update(k, v, layer)


def fill_headinfer(cache: HeadInferCache, tokens: int) -> None:
    """Bring a cache that holds some real tokens to ``tokens`` tokens.

    Pages are made as a prefill makes them; those that reach past the real tokens are overwritten
    whole with random values, and the committed length is set.

    Args:
        cache: Has run at least one chunk, so that its geometry is known, and no step is running.
        tokens: At least what it holds.
    """
    session = cache.session
    geometry = session.geometry
    assert geometry is not None and session.step is None and tokens >= session.length
    session.drain()
    session.streams.drain()
    real = session.length - session.tail_rows
    session.table.ensure(tokens)
    largest = max(block.tokens for block in session.table.blocks)
    elements = largest * geometry.layer_token_bytes // geometry.dtype.itemsize
    source = torch.randn(elements, device=geometry.device, dtype=geometry.dtype)
    for block in session.table.blocks:
        if block.start + block.tokens <= real:
            continue
        count = block.tokens * geometry.layer_token_bytes // geometry.dtype.itemsize
        for k, _ in block.pages.values():
            # K's view begins the page: the page as one run, which copies at the link's rate.
            page = k.as_strided((count,), (1,), k.storage_offset())
            page.copy_(source[:count], non_blocking=True)
        block.version += 1
    if geometry.device.type == "cuda":
        torch.cuda.synchronize(geometry.device)
    session.hold(tokens, 0)
    cache.length = tokens
