"""Sizes of the buffers whose bytes do not depend on the context, from geometry and options alone.

The runtime allocates by these and the planner predicts by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.runtime.step import Phase

STAGING_SLOTS = 2
_STAGING_TOKENS, _STAGING_BYTES = 16384, 32 << 20
_TAIL_TOKENS, _TAIL_BYTES = 256, 64 << 20


class KVShape(Protocol):
    """What sizes are made of; ``spec.Geometry`` is one."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_token_bytes(self) -> int: ...
    @property
    def layer_token_bytes(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """How a phase cuts KV: heads per group and tokens per slot."""

    head_group: int
    slot_tokens: int


def phase_layout(config: HeadInferConfig, shape: KVShape, page: int, phase: Phase) -> Layout:
    """Head group and slot tokens of a phase, where the largest page has ``page`` tokens."""
    heads = shape.num_kv_heads
    group = config.per_phase("head_group", phase) or (1 if phase == "prefill" else heads)
    tokens = config.per_phase("slot_tokens", phase) or page * heads // min(group, heads)
    return Layout(min(group, heads), max(page, tokens // page * page))


def slot_bytes(config: HeadInferConfig, shape: KVShape, page: int) -> int:
    """Bytes of one slot: the larger of what the two phases need."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    layouts = [phase_layout(config, shape, page, phase) for phase in phases]
    return max(item.head_group * item.slot_tokens * shape.head_token_bytes for item in layouts)


def tail_tokens(shape: KVShape, given: int | None) -> int:
    """Tokens of the tail: 256, or fewer where they would exceed 64 MiB."""
    return given or max(1, min(_TAIL_TOKENS, _TAIL_BYTES // shape.token_bytes))


def staging_tokens(shape: KVShape, page_tokens: int | None) -> int:
    """Tokens of one staging buffer: 32 MiB or 16,384, or four pages where they are given.

    It does not depend on the prompt, so the fixed bytes are the same for every context.
    """
    limit = max(1, min(_STAGING_TOKENS, _STAGING_BYTES // shape.layer_token_bytes))
    return limit if page_tokens is None else min(limit, 4 * page_tokens)


def staging_bytes(shape: KVShape, page_tokens: int | None) -> int:
    """Bytes of the staging ring."""
    return STAGING_SLOTS * staging_tokens(shape, page_tokens) * shape.layer_token_bytes


def query_bytes(
    heads: int, v_head_dim: int, itemsize: int, *, batch: int = 1, mask_columns: int = 0
) -> int:
    """Workspace of one query token: accumulator, kernel output and two LSE rows, and its mask.

    Args:
        heads: Query heads attended at once, over all batch rows.
        v_head_dim: Dv.
        itemsize: Bytes of an element of K and V.
        batch: Rows of the batch, each with a mask of its own.
        mask_columns: Keys that a block mask covers; 0 where none is made.
    """
    # Of a block mask there is the mask itself and the bias that kernels make of it.
    return heads * (v_head_dim * (4 + itemsize) + 8) + batch * mask_columns * (1 + itemsize)


def query_chunk(workspace_bytes: int, per_query: int, new: int) -> int:
    """Query tokens attended at once, so that they keep to the workspace."""
    return min(max(16, workspace_bytes // per_query // 16 * 16), new)
