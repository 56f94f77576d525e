"""The state behind one cache: blocks, slots, staging, tail, streams and the committed length.

A session is written only between ``begin`` and ``commit``. ``abort`` returns to the last committed
length: rows past it are never read, so nothing has to be undone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import CacheError
from headinfer_compile.runtime.attention import AttentionRequest, Kernel
from headinfer_compile.runtime.paged import PagedTables, is_supported
from headinfer_compile.runtime.slots import NEVER_USED
from headinfer_compile.runtime.spec import SiteSpec
from headinfer_compile.runtime.step import (
    DECODE_MAX_QUERIES,
    KVBlock,
    Phase,
    Piece,
    Step,
    group_blocks,
    padding_masks_anything,
    split_rows,
)
from headinfer_compile.runtime.store import SessionOptions, Store

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a session has done since it was made or reset."""

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    cpu_bytes: int = 0
    eager_updates: int = 0
    materialised_layers: set[int] = field(default_factory=set)
    sites: set[int] = field(default_factory=set)
    op_calls: Counter[str] = field(default_factory=Counter)
    workspace_bytes: int = 0


class Session(Store):
    """KV store and transfer state of one cache."""

    def __init__(self, num_layers: int, last_layer: int, options: SessionOptions) -> None:
        """Hold nothing yet.

        Args:
            num_layers: Layers of the model, with or without KV of their own.
            last_layer: The last layer that updates the cache; its update commits a step.
            options: Budgets and sizes.
        """
        super().__init__(num_layers, options)
        self.last_layer = last_layer
        self.length = 0
        self.tail_rows = 0
        self.step: Step | None = None
        self.counters = Counters()
        self.specs: list[SiteSpec] = []
        self.kernels: dict[AttentionRequest, Kernel] = {}
        self.ring: tuple[int, ...] = (NEVER_USED,) * self.config.num_slots
        self.base = 0
        self.in_flight: tuple[object, ...] = ()
        """What the transfers carried over to the next site bring (``transfer_tags``)."""
        self.schedule_overrides: dict[Any, Any] = {}
        """Schedules loaded by the user, by plan key; they run instead of the built ones."""
        self.managed = False
        """A compiled graph is running and will commit or abort the step."""
        self.claimed_by: tuple[int, int] | None = None
        """The graph and parameter of the last call; any other call is checked by ``claim``."""
        self._owner: frozenset[int] = frozenset()
        self._known_columns = 0
        self._column_padded = False
        self.around_call: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered for each compiled call; a simulator plugs in here and in ``make_streams``."""

    def claim(self, parameters: frozenset[int]) -> None:
        """Tie the cache to the model whose parameters have these ids.

        Raises:
            CacheError: It holds tokens of another model.
        """
        if self.length and self._owner and not self._owner & parameters:
            raise CacheError(
                f"this cache holds {self.length} tokens of another model: use one cache per model, "
                "or reset() it first"
            )
        self._owner = parameters

    def configure(self, config: HeadInferConfig) -> None:
        """Take the options of the compiled call; another slot geometry drains and rebinds."""
        if config is self.config or config == self.config:
            return
        if self.slots is not None:
            self.drain()
            self.slots = None
        self.config = config
        self.ring, self.base = (NEVER_USED,) * config.num_slots, 0

    # -- steps ------------------------------------------------------------------------------

    def start(self, k: torch.Tensor, v: torch.Tensor, past: int, activation_bytes: int) -> Step:
        """Bind the geometry and begin a step; raises as ``bind`` and ``begin``."""
        if self.geometry not in (None, self.geometry_of(k, v)) and self.length == 0:
            # Nothing is held, so another batch or dtype may take the cache over.
            self.drain()
            self.free()
        self.bind(k, v, activation_bytes)
        return self.begin(past, k.shape[2])

    def begin(self, past: int, new: int) -> Step:
        """Start a forward pass of ``new`` tokens after ``past`` cached ones.

        Raises:
            CacheError: ``past`` is not what the cache holds.
            DoesNotFitError: There is no room for the new tokens; the cache is as before.
        """
        assert self.geometry is not None and self.step is None
        if past != self.length:
            raise CacheError(
                f"the graph was called with past length {past}, and the cache holds {self.length} "
                "tokens: an earlier forward was cut short or the cache was changed outside of it; "
                "crop() or reset() the cache and call again"
            )
        self.streams.begin_step()
        stored, tail_rows, room = past - self.tail_rows, self.tail_rows, self.tail.tokens
        appends = tail_rows + new <= room
        flushes = appends and tail_rows + new == room
        phase: Phase = "decode" if new <= DECODE_MAX_QUERIES else "prefill"
        regular = new == self.regular_chunk
        step = Step(past, new, stored, phase, appends, flushes, (), regular)
        if step.stored_after > stored:
            self.table.ensure(step.stored_after)
            step.pieces = self._pieces(step)
        if not appends:
            self.make_staging()
        self.step = step
        return step

    def _pieces(self, step: Step) -> tuple[Piece, ...]:
        blocks = self.table.blocks
        if step.appends:
            rows = step.tail_rows + step.new
            return tuple(split_rows("tail", rows, step.stored, rows, blocks))
        assert self.geometry is not None
        limit = self.staging_tokens(self.geometry)
        old = split_rows("tail", step.tail_rows, step.stored, max(1, step.tail_rows), blocks)
        return (*old, *split_rows("new", step.new, step.past, limit, blocks))

    def commit(self) -> None:
        """Make the step's tokens part of the cache."""
        step = self.step
        assert step is not None
        self.length = step.past + step.new
        self.tail_rows = self.length - step.stored_after
        self.step = None
        # A prefill chunk is mostly followed by another; after that only the tail is written back.
        if step.phase == "prefill":
            self.table.prepare(max(self.length + step.new, self.reserved))
        elif step.flushes or step.tail_rows == 0:
            self.table.prepare(max(self.length + self.tail.tokens, self.reserved))

    def abort(self) -> None:
        """Forget the step; the cache is as it was before it."""
        self.step = None
        if self.geometry is not None:
            self.drain()

    def drain(self) -> None:
        """Order all later work after every transfer and reader; no slot is in use afterwards."""
        for role, other in (("compute", "h2d"), ("h2d", "compute"), ("d2h", "h2d")):
            self.streams.join(role, other)
        if self.slots is not None:
            self.slots.forget()
        self.ring, self.base = (NEVER_USED,) * self.config.num_slots, 0
        self.in_flight = ()

    def kv_blocks(self, spec: SiteSpec) -> tuple[KVBlock, ...]:
        """The KV blocks of the current step for one class of sites."""
        step = self.step
        assert step is not None
        if spec not in step.blocks:
            tokens = self.layout(step.phase).slot_tokens
            step.blocks[spec] = group_blocks(step, spec, self.table.blocks, tokens)
        return step.blocks[spec]

    def query_chunks(self, index: int) -> int:
        """Query chunks of spec ``index`` in this step, so that accumulators fit the workspace."""
        step, spec, geometry = self.step, self.specs[index], self.geometry
        assert step is not None and geometry is not None
        if index not in step.query_chunk:
            layout = self.layout(step.phase)
            heads = geometry.batch * layout.head_group * spec.queries_per_kv
            item = geometry.dtype.itemsize
            # An fp32 accumulator, the kernel's own output and two LSE rows for each query.
            per_query = heads * (spec.v_head_dim * (4 + item) + 8)
            if (
                spec.mask.window is not None
                or spec.mask.expr is not None
                or any(step.padding.values())
            ):
                # A block mask and the bias that kernels make of it.
                per_query += geometry.batch * max(layout.slot_tokens, step.new) * (1 + item)
            limit = max(16, int(self.config.workspace_bytes) // per_query // 16 * 16)
            step.query_chunk[index] = min(limit, step.new)
            used = per_query * step.query_chunk[index]
            self.counters.workspace_bytes = max(self.counters.workspace_bytes, used)
        return -(-step.new // step.query_chunk[index])

    def fuses_resident(self, spec: SiteSpec) -> bool:
        """Whether one kernel attends the tail and all resident blocks of this step."""
        step, geometry = self.step, self.geometry
        assert step is not None and geometry is not None
        return (
            step.new == 1
            and self._is_plain(spec)
            and not any(step.padding.values())
            and is_supported(geometry)
        )

    def can_capture(self, past: int) -> bool:
        """Whether a one-token step after ``past`` tokens touches resident KV only, and no flush."""
        return (
            self.geometry is not None
            and self.step is None
            and past == self.length
            and self.tail_rows + 1 < self.tail.tokens
            and all(block.tier == "gpu" for block in self.table.blocks)
            and all(self._is_plain(spec) for spec in self.specs)
            and is_supported(self.geometry)
        )

    def _is_plain(self, spec: SiteSpec) -> bool:
        form = spec.mask
        all_heads = self.layout("decode").head_group == spec.num_kv_heads
        return form.window is None and form.expr is None and all_heads

    def sync_paged(self, mask: torch.Tensor | None) -> PagedTables:
        """Fill the tables for the step; ``mask`` is the ``[B, kv]`` padding mask, if any."""
        step = self.step
        assert step is not None
        blocks = []
        for block in self.table.blocks:
            rows = min(block.tokens, step.stored - block.start)
            if block.tier == "gpu" and rows > 0:
                blocks.append((block, rows))
        tables = self.paged_tables()
        tables.sync(blocks, step.tail_rows + 1, mask, step.stored)
        step.paged = True
        return tables

    def transfer_tags(
        self, layer: int, transfers: tuple[tuple[int, int, int], ...]
    ) -> tuple[object, ...]:
        """What ``(spec, group, block)`` transfers of a layer bring: heads and rows of pages."""
        tags = []
        for spec, group, block in transfers:
            size = self.layout(self.step.phase).head_group if self.step else 0
            tags.append((layer, group * size, size, self.kv_blocks(self.specs[spec])[block].tag))
        return tuple(tags)

    def learn_padding(self, mask: torch.Tensor) -> bool:
        """Whether a ``[B, kv]`` padding mask hides any column before the newest tokens.

        One reduction a prefill chunk; in decode only the columns that leave the tail are looked at,
        since the tail is attended under its own mask.
        """
        step = self.step
        assert step is not None
        if id(mask) not in step.padding:
            end = step.stored if step.new == 1 else step.past + step.new
            start = min(self._known_columns, end)
            if start < end:
                fresh = padding_masks_anything(mask[:, start:end])
                self._column_padded = (self._column_padded and start > 0) or fresh
                self._known_columns = end
            step.padding[id(mask)] = self._column_padded
        return step.padding[id(mask)]

    # -- life cycle -------------------------------------------------------------------------

    def crop(self, count: int) -> None:
        """Drop the newest ``count`` tokens."""
        if self.geometry is None or count == 0:
            return
        stored = self.length - self.tail_rows
        self.length -= count
        self.tail_rows = max(0, self.length - stored)
        self._known_columns = min(self._known_columns, self.length)
        if self.length < stored:
            self.drain()
            for block in self.table.blocks:
                if block.start + block.tokens > self.length:
                    block.version += 1

    def reset(self) -> None:
        """Hold no tokens; buffers stay."""
        self.crop(self.length)
        self.counters, self.reserved = Counters(), 0
        self._known_columns, self._column_padded = 0, False

    def close(self) -> None:
        """Wait for the copies in flight and give all memory back."""
        if not self.closed:
            self.closed = True
            self.free()
        self.length = self.tail_rows = 0
