"""One forward pass as the runtime sees it: which rows go where, and which KV blocks there are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from headinfer_compile.runtime.attention import Kernel
from headinfer_compile.runtime.masks import visible_range
from headinfer_compile.runtime.rows import Rows, on_host
from headinfer_compile.runtime.spec import SiteSpec
from headinfer_compile.runtime.token_block import TokenBlock

Phase = Literal["prefill", "decode"]

TAIL, NEW, NEW_PREFIX, RESIDENT, HOST = -1, -2, -3, -4, -5
"""``span`` of an attend that is no KV block: the tail; new tokens of the query chunk itself
(square); new tokens before the query chunk; the tail and all resident blocks in one kernel; the
blocks that the CPU attends."""

APPEND = -1
"""``piece`` of the ``pack`` that appends the new rows to the tail."""

DECODE_MAX_QUERIES = 64
"""Up to this many new tokens the link binds, so all heads of a page move in one copy."""


@dataclass(frozen=True)
class Segment:
    """Rows of one piece that go to one token block."""

    block: TokenBlock
    row: int
    rows: int
    offset: int
    """First row within the piece."""


@dataclass(frozen=True)
class Piece:
    """Rows that one ``pack`` handles."""

    source: Literal["tail", "new"]
    start: int
    """First row within the source."""
    rows: int
    segments: tuple[Segment, ...]

    @property
    def to_host(self) -> bool:
        """Whether any row needs a D2H copy."""
        return any(segment.block.tier == "host" for segment in self.segments)


@dataclass(frozen=True)
class KVBlock:
    """Consecutive pages attended as one block."""

    tier: Literal["gpu", "host"]
    start: int
    rows: int
    pages: tuple[tuple[TokenBlock, int], ...]
    """Token blocks with the tokens valid in each."""
    batch_rows: Rows
    """The row of the block's K and V that each batch row reads."""

    @functools.cached_property
    def batch(self) -> int:
        """Batch rows of K and V."""
        return len(set(self.batch_rows))

    @functools.cached_property
    def tag(self) -> tuple[object, ...]:
        """What a slot filled from this block holds, apart from layer and heads."""
        return tuple(
            (block.index, block.version, rows, block.stored_rows) for block, rows in self.pages
        )


@dataclass(frozen=True)
class UnmaskedAttend:
    """How the sites of one class attend a span that needs no mask tensor."""

    queries: tuple[slice, ...] | None
    """Of q, where it is not all of it."""
    keys: tuple[slice, ...] | None
    """Of k and v."""
    causal: bool
    kernel: Kernel


@dataclass
class Step:
    """State of one forward pass over one cache."""

    past: int
    new: int
    stored: int
    """Tokens in pages before the step; the other ``past - stored`` are in the tail."""
    phase: Phase
    appends: bool
    """New tokens go to the tail (decode); otherwise to pages through the staging ring."""
    flushes: bool
    """The tail fills up in this step and is written to its pages."""
    pieces: tuple[Piece, ...]
    regular: bool
    """Whether ``new`` is the chunk size that most chunks have."""
    groups: Rows = ()
    """Canonical map of the rows that the step stores in pages."""
    unequal: torch.Tensor | None = None
    """``rows.far_neighbours`` of all K and V so far, where rows share what is stored."""
    query_chunk: dict[int, int] = field(default_factory=dict)
    """Tokens of a query chunk, by spec."""
    padding: dict[int, bool] = field(default_factory=dict)
    """By id of a padding mask: whether any visible column is masked."""
    blocks: dict[SiteSpec, tuple[KVBlock, ...]] = field(default_factory=dict)
    unmasked: dict[tuple[int | None, ...], UnmaskedAttend] = field(default_factory=dict)
    """By spec, head group, query chunk, span and id of the padding mask, for all layers."""
    paged: bool = False
    """The device tables of ``runtime/paged.py`` are filled for this step."""
    eager_layers: set[int] = field(default_factory=set)
    """Layers that have come through the path without a schedule."""

    @property
    def tail_rows(self) -> int:
        """Tokens in the tail before the step."""
        return self.past - self.stored

    @property
    def stored_after(self) -> int:
        """Tokens in pages once the step is committed."""
        if self.appends and not self.flushes:
            return self.stored
        return self.past + self.new

    def rows_hold(self) -> bool:
        """Whether K and V were equal in the rows that share; the host waits."""
        if self.unequal is None:
            return True
        flags = enumerate(on_host(self.unequal))
        groups = self.groups
        return not any(differs and groups[row] == groups[row + 1] for row, differs in flags)

    def is_common_length(self, rows: int) -> bool:
        """Whether KV spans of ``rows`` rows are met often enough for a kernel that plans per shape.

        Chunked prefill ends its past at multiples of the chunk; the small multiples and the powers
        of two are few, and between them cover every block but a ragged last one.
        """
        count, rest = divmod(rows, self.new)
        return rest == 0 and (count <= 4 or count & (count - 1) == 0)

    def query_range(self, spec: int, chunk: int) -> tuple[int, int]:
        """Half-open range of new tokens in query chunk ``chunk`` of spec ``spec``."""
        start = chunk * self.query_chunk[spec]
        return start, min(self.new, start + self.query_chunk[spec])


def split_rows(
    source: Literal["tail", "new"],
    rows: int,
    position: int,
    limit: int,
    blocks: Sequence[TokenBlock],
) -> list[Piece]:
    """Cut ``rows`` rows that belong at token ``position`` into pieces of at most ``limit`` rows."""
    pieces = []
    for start in range(0, rows, limit):
        count = min(limit, rows - start)
        first, segments = position + start, []
        for block in blocks:
            low, high = max(first, block.start), min(first + count, block.start + block.tokens)
            if low < high:
                segments.append(Segment(block, low - block.start, high - low, low - first))
        assert sum(segment.rows for segment in segments) == count
        pieces.append(Piece(source, start, count, tuple(segments)))
    return pieces


def pieces_of(step: Step, blocks: Sequence[TokenBlock], limit: int) -> tuple[Piece, ...]:
    """What a step writes to pages: the tail, then new rows in pieces of at most ``limit`` rows."""
    if step.appends:
        rows = step.tail_rows + step.new
        return tuple(split_rows("tail", rows, step.stored, rows, blocks))
    old = split_rows("tail", step.tail_rows, step.stored, max(1, step.tail_rows), blocks)
    return (*old, *split_rows("new", step.new, step.past, limit, blocks))


def group_blocks(
    step: Step, spec: SiteSpec, table: Sequence[TokenBlock], slot_tokens: int
) -> tuple[KVBlock, ...]:
    """KV blocks of the pages that some query of the step can see: resident first, then host's.

    Resident pages are blocks of their own; host pages are joined up to ``slot_tokens`` tokens where
    the same batch rows share.
    """
    low, high = visible_range(spec.mask, past=step.past, q_start=0, q_stop=step.new)
    resident: list[KVBlock] = []
    host: list[KVBlock] = []
    run: list[tuple[TokenBlock, int]] = []

    def close_run() -> None:
        if run:
            rows = sum(count for _, count in run)
            first = run[0][0]
            host.append(KVBlock("host", first.start, rows, tuple(run), first.groups))
            run.clear()

    for block in table:
        rows = min(block.tokens, step.stored - block.start)
        if rows <= 0:
            break
        if block.start + rows <= low or block.start >= high:
            continue
        if block.tier == "gpu":
            resident.append(KVBlock("gpu", block.start, rows, ((block, rows),), block.rows))
            continue
        full = sum(count for _, count in run) + rows > slot_tokens
        if full or (run and run[0][0].groups != block.groups):
            close_run()
        run.append((block, rows))
    close_run()
    return (*resident, *host)


def padding_masks_anything(mask: torch.Tensor) -> bool:
    """Whether a padding mask ``[B, kv]`` hides any column; synchronises with the device."""
    return not bool(mask.to(torch.bool).all())
