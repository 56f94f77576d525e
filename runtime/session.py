"""The state behind one cache: blocks, slots, staging, tail, streams and the committed length.

A session is written only between ``begin`` and ``commit``. ``abort`` returns to the last committed
length: rows past it are never read, so nothing has to be undone. An exception, an interrupt of the
user too, may come between any two statements: what belongs together is assigned at once, and what
was left half done is marked so and finished by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import CacheError
from headinfer_compile.runtime.attention import AttentionRequest, Kernel
from headinfer_compile.runtime.batch import Sharing, open_rows, rows_to_store
from headinfer_compile.runtime.caller import Caller
from headinfer_compile.runtime.counters import Counters
from headinfer_compile.runtime.masks import MaskForm
from headinfer_compile.runtime.paged import PagedTables, is_supported
from headinfer_compile.runtime.retention import give_up_pages
from headinfer_compile.runtime.rows import Rows
from headinfer_compile.runtime.sizes import query_bytes, query_chunk
from headinfer_compile.runtime.slots import NEVER_USED
from headinfer_compile.runtime.spec import SiteSpec
from headinfer_compile.runtime.step import (
    DECODE_MAX_QUERIES,
    KVBlock,
    Phase,
    Step,
    group_blocks,
    padding_masks_anything,
    pieces_of,
)
from headinfer_compile.runtime.store import SessionOptions, Store


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
        self._held = self._held_before = (0, 0)
        self.step: Step | None = None
        self.counters = Counters()
        self.specs: list[SiteSpec] = []
        self.forms: Mapping[int, Sequence[MaskForm]] = {}
        """By layer: the masks of its sites in the running call, if all that read it are sites."""
        self.kernels: dict[AttentionRequest, Kernel] = {}
        self.ring: tuple[int, ...] = (NEVER_USED,) * self.config.slots
        self.base = 0
        self.in_flight: tuple[object, ...] = ()
        """What the transfers carried over to the next site bring (``transfer_tags``)."""
        self.schedule_overrides: dict[Any, Any] = {}
        """Schedules loaded by the user, by plan key; they run instead of the built ones."""
        self.plans: dict[Any, Any] = {}
        """The schedules of the compiled call that is running, by class of sites."""
        self.sharing = Sharing()
        self._unsettled = False
        """A step or a drain was begun and has not come to its end: the next call aborts first."""
        self._caller = Caller()
        self.claimed_by: tuple[int, int] | None = None
        """The graph and parameter of the last call; any other call is checked by ``claim``."""
        self._owner: frozenset[int] = frozenset()
        self._known_columns = 0
        self._column_padded = False
        self.around_call: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered for each compiled call; a simulator plugs in here and in ``make_streams``."""

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._held[0]

    @property
    def tail_rows(self) -> int:
        """Committed tokens that are in the tail and not in pages."""
        return self._held[1]

    def hold(self, length: int, tail_rows: int) -> None:
        """Commit to ``length`` tokens, the last ``tail_rows`` of which are in the tail."""
        self._held = (length, tail_rows)

    # -- who calls --------------------------------------------------------------------------

    @property
    def managed(self) -> bool:
        """A compiled graph is running and will commit or abort the step."""
        return self._caller.busy

    def enter_call(self) -> None:
        """Begin a compiled call, after the clean-up that an earlier one was kept from.

        Raises:
            CacheError: Another thread or process uses the cache.
        """
        self._caller.check()
        if self._unsettled:
            self.abort()
        self.sharing.settle(self)
        self._caller.enter()
        self.plans.clear()

    def cancel_call(self) -> None:
        """Abort the step of the call that this thread is in, if it is in one."""
        if self._caller.is_this_thread:
            self.abort()

    def leave_call(self) -> None:
        """End the call that this thread is in, after ``commit`` or ``cancel_call``."""
        self.forms = {}
        self._caller.leave()

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
            self.drop_slots_unless(config)
        self.ring, self.base = (NEVER_USED,) * config.slots, 0
        # Last: an equal config says that all above is done.
        self.config = config

    # -- steps ------------------------------------------------------------------------------

    def start(self, k: torch.Tensor, v: torch.Tensor, past: int, activation_bytes: int) -> Step:
        """Bind the geometry and begin a step; raises as ``bind`` and ``begin``."""
        self.sharing.settle(self)
        if self.geometry not in (None, self.geometry_of(k, v)) and self.length == 0:
            # Nothing is held, so another batch or dtype may take the cache over.
            self.drain()
            self.free()
        self.bind(k, v, activation_bytes)
        groups = rows_to_store(self, past, k.shape[2])
        step = self.begin(past, k.shape[2], groups)
        if groups is not None:
            step.unequal = torch.zeros(len(groups) - 1, dtype=torch.bool, device=k.device)
        return step

    def begin(self, past: int, new: int, groups: Rows | None = None) -> Step:
        """Start a forward pass of ``new`` tokens after ``past`` cached ones.

        Args:
            past: Tokens cached before.
            new: New tokens.
            groups: Canonical map of the rows to store in pages; None: one for each batch row.

        Raises:
            CacheError: ``past`` is more than the cache holds, or another thread or
                process uses it.
            DoesNotFitError: There is no room for the new tokens; the cache is as before.
        """
        assert self.geometry is not None and self.step is None
        self._caller.check()
        if self._unsettled:
            self.abort()
        if past > self.length:
            raise CacheError(
                f"the graph was called with past length {past}, and the cache holds {self.length} "
                "tokens: the cache was changed outside of a forward; crop() or reset() the cache "
                "and call again"
            )
        self._unsettled = True
        if past < self.length:
            # The last call was cut short after its commit, before the cache counted its tokens. Its
            # predecessor's rows of the tail are still there.
            held = self._held_before
            self._return_to(*(held if held[0] == past else (past, 0)))
        if self.lane is not None:
            self.lane.begin_step(past)
        self.warn_beyond_positions(past, new)
        self.streams.begin_step()
        stored, tail_rows, room = past - self.tail_rows, self.tail_rows, self.tail.tokens
        appends = tail_rows + new <= room
        flushes = appends and tail_rows + new == room
        phase: Phase = "decode" if new <= DECODE_MAX_QUERIES else "prefill"
        regular = new == self.regular_chunk
        step = Step(past, new, stored, phase, appends, flushes, (), regular)
        self.check_announced(None if groups is None else len(set(groups)))
        if step.stored_after > stored:
            step.groups = tuple(range(self.geometry.batch)) if groups is None else groups
            give_up_pages(self, past, stored, step.stored_after)
            open_rows(self, stored, step.groups)
            self.table.ensure(step.stored_after, step.groups, stored)
            limit = self.staging_tokens(self.geometry)
            step.pieces = pieces_of(step, self.table.blocks, limit)
        if not appends:
            self.make_staging()
        self.step = step
        return step

    def commit(self) -> None:
        """Make the step's tokens part of the cache."""
        step = self.step
        assert step is not None
        length = step.past + step.new
        if self.lane is not None:
            self.lane.check(length)
        self._held_before = self._held
        self.hold(length, length - step.stored_after)
        self.step, self._unsettled = None, False
        # A prefill chunk is mostly followed by another; after that only the tail is written back.
        if step.phase == "prefill":
            self.prepare_chunk(self.length, step.new, len(set(step.groups)) or None)
        elif step.flushes or step.tail_rows == 0:
            soon = self.length + self.tail.tokens
            self.table.prepare(max(soon, self.reserved), soon=soon)

    def abort(self) -> None:
        """Forget the step; the cache is as it was before it."""
        self._unsettled = True
        self.step = None
        # The mask of the call that takes this one's place may be another.
        self._known_columns = min(self._known_columns, self.length)
        if self.geometry is not None:
            self.drain()
        self._unsettled = False

    def drain(self) -> None:
        """Order all later work after every transfer and reader; no slot is in use afterwards."""
        unsettled, self._unsettled = self._unsettled, True
        # In this order: compute then stands for the others. D2H itself follows a pack on compute.
        for other in ("h2d", "d2h", "cpu"):
            self.streams.join("compute", other)
        self.streams.join("h2d", "compute")
        if self.slots is not None:
            self.slots.forget()
        self.ring, self.base = (NEVER_USED,) * self.config.slots, 0
        self.in_flight = ()
        self._unsettled = unsettled

    def wait_idle(self) -> None:
        """Block the host until nobody reads or writes KV, so that its memory may be given up."""
        self.drain()
        self.streams.drain()

    def kv_blocks(self, spec: SiteSpec) -> tuple[KVBlock, ...]:
        """The KV blocks of the current step for one class of sites."""
        step = self.step
        assert step is not None
        if (found := step.blocks.get(spec)) is None:
            tokens = self.layout(step.phase).slot_tokens
            found = step.blocks[spec] = group_blocks(step, spec, self.table.blocks, tokens)
        return found

    def query_chunks(self, index: int) -> int:
        """Query chunks of spec ``index`` in this step, so that accumulators fit the workspace."""
        step, spec, geometry = self.step, self.specs[index], self.geometry
        assert step is not None and geometry is not None
        if index not in step.query_chunk:
            layout = self.layout(step.phase)
            heads = geometry.batch * layout.head_group * spec.queries_per_kv
            form = spec.mask
            masked = form.window is not None or form.expr is not None or any(step.padding.values())
            per_query = query_bytes(
                heads,
                spec.v_head_dim,
                geometry.dtype.itemsize,
                batch=geometry.batch,
                mask_columns=max(layout.slot_tokens, step.new) if masked else 0,
            )
            tokens = query_chunk(int(self.config.workspace_bytes), per_query, step.new)
            step.query_chunk[index], used = tokens, per_query * tokens
            self.counters.workspace_bytes = max(self.counters.workspace_bytes, used)
        return -(-step.new // step.query_chunk[index])

    def fuses_resident(self, spec: SiteSpec) -> bool:
        """Whether one kernel attends the tail and all resident blocks of this step."""
        step, geometry = self.step, self.geometry
        assert step is not None and geometry is not None
        return (
            step.new == 1
            and self._is_plain(spec)
            and all(block.is_plain for block in self.table.blocks if block.tier == "gpu")
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
            and all(block.tier == "gpu" and block.is_plain for block in self.table.blocks)
            and all(self._is_plain(spec) for spec in self.specs)
            and is_supported(self.geometry)
        )

    def _is_plain(self, spec: SiteSpec) -> bool:
        form = spec.mask
        all_heads = self.layout("decode").head_group == spec.num_kv_heads
        plain = form.window is None and form.expr is None
        plain = plain and spec.soft_cap is None and spec.sinks is None and spec.expand is None
        return plain and all_heads

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
        """Drop the newest ``count`` tokens, which ``check_crop`` allows."""
        self.sharing.settle(self)
        if self.geometry is not None and count != 0:
            stored, length = self.length - self.tail_rows, self.length - count
            self._return_to(length, max(0, length - stored))

    def _return_to(self, length: int, tail_rows: int) -> None:
        stored = length - tail_rows
        if stored < self.length - self.tail_rows:
            # Before the rows are given up: what was transferred must not pass for what comes.
            self.drain()
            for block in self.table.blocks:
                if block.start + block.tokens > stored:
                    block.version += 1
        self._known_columns = min(self._known_columns, length)
        self.hold(length, tail_rows)

    def reset(self) -> None:
        """Hold no tokens; buffers stay."""
        self.crop(self.length)
        self.counters, self.reserved = Counters(), 0
        self._known_columns, self._column_padded, self.sharing = 0, False, Sharing()

    def close(self) -> None:
        """Wait for the copies in flight and give all memory back."""
        self.closed = True
        if self.geometry is not None and self._caller.is_this_process:
            self.free()
        self.hold(0, 0)
