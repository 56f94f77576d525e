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
from typing import Any, Literal

import torch

from headinfer_compile.config import HeadInferConfig, format_bytes
from headinfer_compile.errors import CacheError, ClosedError, DoesNotFitError
from headinfer_compile.runtime.attention import AttentionRequest, Kernel
from headinfer_compile.runtime.budget import default_gpu_budget, default_host_budget
from headinfer_compile.runtime.paged import PagedTables, is_supported
from headinfer_compile.runtime.pages import BlockTable
from headinfer_compile.runtime.slots import NEVER_USED, SlotRing
from headinfer_compile.runtime.spec import Geometry, SiteSpec
from headinfer_compile.runtime.staging import StagingRing, Tail
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
from headinfer_compile.runtime.streams import Event, Streams

log = logging.getLogger(__name__)

_STAGING_TOKENS = (1024, 16384)
_TAIL_TOKENS, _TAIL_BYTES = 256, 64 << 20


@dataclass(frozen=True)
class SessionOptions:
    """Budgets and sizes given to the cache; None means ``"auto"``."""

    gpu_budget: int | None = None
    host_budget: int | None = None
    page_tokens: int | None = None
    tail_tokens: int | None = None


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


@dataclass(frozen=True)
class Layout:
    """How a phase cuts KV: heads per group and tokens per slot."""

    head_group: int
    slot_tokens: int


class Session:
    """KV store and transfer state of one cache."""

    def __init__(self, num_layers: int, last_layer: int, options: SessionOptions) -> None:
        """Hold nothing yet.

        Args:
            num_layers: Layers of the model, with or without KV of their own.
            last_layer: The last layer that updates the cache; its update commits a step.
            options: Budgets and sizes.
        """
        self.num_layers = num_layers
        self.last_layer = last_layer
        self.options = options
        self.config = HeadInferConfig()
        self.length = 0
        self.tail_rows = 0
        self.closed = False
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
        self.capability: tuple[int, int] | None = None
        self.regular_chunk = 0
        self.reserved = 0
        """Tokens announced by ``check_room``; their slabs are made in the background."""
        self.claimed_by: tuple[int, int] | None = None
        """The graph and parameter of the last call; any other call is checked by ``claim``."""
        self._owner: frozenset[int] = frozenset()
        self._known_columns = 0
        self._column_padded = False
        self.geometry: Geometry | None = None
        self.make_streams: Callable[[torch.device], Streams] = Streams
        self.around_call: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered for each compiled call; this and ``make_streams`` are where a simulator plugs in."""
        self.streams: Streams
        self.table: BlockTable
        self.slots: SlotRing | None = None
        self.staging: StagingRing | None = None
        self.tail: Tail
        self._paged: PagedTables | None = None

    # -- geometry ---------------------------------------------------------------------------

    def bind(self, k: torch.Tensor, v: torch.Tensor, activation_bytes: int) -> Geometry:
        """Fix the geometry by the first K ``[B, Hkv, n, D]`` and V ``[B, Hkv, n, Dv]``.

        Raises:
            ClosedError: The cache was closed.
            CacheError: A later call has another batch, shape, dtype or device.
            DoesNotFitError: The device has no room for the fixed buffers.
        """
        if self.closed:
            raise ClosedError("this HeadInferCache was closed and holds nothing: make a new one")
        found = Geometry(
            self.num_layers, k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device
        )
        if self.geometry is None:
            self.regular_chunk = k.shape[2]
            self._allocate(found, activation_bytes)
        elif found != self.geometry:
            self._explain_mismatch(found)
        assert self.geometry is not None
        return self.geometry

    def _explain_mismatch(self, found: Geometry) -> None:
        held = self.geometry
        assert held is not None
        causes = {
            "batch": "batch size changed; use a new cache (or reset()) for another batch",
            "num_kv_heads": "this cache belongs to another model; use one cache per model",
            "head_dim": "this cache belongs to another model; use one cache per model",
            "v_head_dim": "this cache belongs to another model; use one cache per model",
            "dtype": "the dtype of K and V changed; use a new cache for another dtype",
            "device": "K and V moved to another device; use a new cache for another device",
        }
        for name, cause in causes.items():
            if getattr(held, name) != getattr(found, name):
                raise CacheError(
                    f"the cache holds {self.length} tokens with {name}={getattr(held, name)}, and K "
                    f"and V came with {name}={getattr(found, name)}: {cause}. What is stored is intact"
                )

    def _allocate(self, geometry: Geometry, activation_bytes: int) -> None:
        options = self.options
        self.streams = self.make_streams(geometry.device)
        tail_tokens = options.tail_tokens or max(
            1, min(_TAIL_TOKENS, _TAIL_BYTES // geometry.token_bytes)
        )
        table = BlockTable(geometry, options.page_tokens, 0, 0, options.gpu_budget is None)
        page_bytes = table.largest_page_tokens * geometry.layer_token_bytes
        fixed = (
            self.config.num_slots * page_bytes
            + tail_tokens * geometry.token_bytes
            + 2 * min(self.regular_chunk, _STAGING_TOKENS[1]) * geometry.layer_token_bytes
        )
        workspace = int(self.config.workspace_bytes)
        table.gpu_budget = (
            default_gpu_budget(geometry.device, fixed + workspace + activation_bytes)
            if options.gpu_budget is None
            else options.gpu_budget
        )
        table.host_budget = (
            default_host_budget() if options.host_budget is None else options.host_budget
        )
        try:
            self.tail = Tail(geometry, tail_tokens, self.streams)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"the GPU has no room for the fixed buffers: {format_bytes(fixed)} of slots, staging "
                f"and tail, beside {format_bytes(workspace)} of workspace. Lower tail_tokens, "
                "page_tokens or num_slots, or free GPU memory"
            ) from error
        self._written = [
            self.streams.new_event("pages.written") for _ in range(geometry.num_layers)
        ]
        if geometry.device.type == "cuda":
            self.capability = torch.cuda.get_device_capability(geometry.device)
        self.table = table
        self.geometry = geometry

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

    def layout(self, phase: Phase) -> Layout:
        """Head group and slot tokens of a phase (``HeadInferConfig``)."""
        geometry = self.geometry
        assert geometry is not None
        heads = geometry.num_kv_heads
        group = self.config.per_phase("head_group", phase) or (1 if phase == "prefill" else heads)
        page = self.table.largest_page_tokens
        tokens = self.config.per_phase("slot_tokens", phase) or page * heads // min(group, heads)
        return Layout(min(group, heads), max(page, tokens // page * page))

    def slot_ring(self) -> SlotRing:
        """The slots, made when the first streamed step needs them.

        Raises:
            DoesNotFitError: The device has no room for them.
        """
        if self.slots is None:
            geometry = self.geometry
            assert geometry is not None
            phases: tuple[Phase, ...] = ("prefill", "decode")
            nbytes = max(
                layout.head_group * layout.slot_tokens * geometry.head_token_bytes
                for layout in map(self.layout, phases)
            )
            count = self.config.num_slots
            try:
                self.slots = SlotRing(geometry, count, nbytes, self.streams)
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(
                    f"the GPU has no room for {count} slots of {format_bytes(nbytes)}: lower "
                    "slot_tokens, page_tokens or num_slots, or free GPU memory"
                ) from error
        return self.slots

    # -- steps ------------------------------------------------------------------------------

    def start(self, k: torch.Tensor, v: torch.Tensor, past: int, activation_bytes: int) -> Step:
        """Bind the geometry and begin a step; raises as ``bind`` and ``begin``."""
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
            self._make_staging(new)
        self.step = step
        return step

    def _make_staging(self, new: int) -> None:
        if self.staging is None:
            assert self.geometry is not None
            low, high = _STAGING_TOKENS
            self.staging = StagingRing(self.geometry, min(max(new, low), high), self.streams)

    def _pieces(self, step: Step) -> tuple[Piece, ...]:
        blocks = self.table.blocks
        if step.appends:
            rows = step.tail_rows + step.new
            return tuple(split_rows("tail", rows, step.stored, rows, blocks))
        limit = self.staging.tokens if self.staging else min(max(step.new, 1024), 16384)
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

    def check_room(self, tokens: int, token_bytes: int) -> None:
        """Check that ``tokens`` tokens of ``token_bytes`` bytes (all layers) can be held.

        Raises:
            DoesNotFitError: The budgets do not hold them.
        """
        self.reserved = tokens
        if self.geometry is not None:
            self.table.plan(tokens)
            return
        host = self.options.host_budget
        host = default_host_budget() if host is None else host
        needed = tokens * token_bytes
        gpu = self.options.gpu_budget
        if gpu is None:
            # Not known before the first forward; whatever is free now is the most it can be.
            gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        if needed > host + gpu:
            raise DoesNotFitError(
                f"{tokens} tokens of KV take {format_bytes(needed)}; there is room for "
                f"{format_bytes(host)} on the host and {format_bytes(gpu)} on the GPU: shorten the "
                f"context to about {(host + gpu) // token_bytes} tokens, or raise host_budget or "
                "gpu_budget"
            )

    def check_materialised(self, tokens: int) -> None:
        """Refuse to put all K and V of one layer on the GPU where the budget forbids it.

        Raises:
            DoesNotFitError: ``tokens`` tokens of one layer exceed ``gpu_budget``, which the user set.
        """
        assert self.geometry is not None
        needed, budget = tokens * self.geometry.layer_token_bytes, self.options.gpu_budget
        if self.geometry.device.type == "cuda" and budget is not None and needed > budget:
            raise DoesNotFitError(
                f"all K and V of one layer take {format_bytes(needed)} on the GPU and gpu_budget is "
                f"{format_bytes(budget)}: compile the model with model.compile(backend='headinfer'), "
                "so that attention runs block by block, or raise gpu_budget. What is stored is intact"
            )

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
            if spec.mask.window is not None or spec.mask.expr is not None or any(step.padding.values()):
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

    def paged_tables(self) -> PagedTables:
        """The tables of ``attend_resident``; ``sync_paged`` fills them."""
        if self._paged is None:
            assert self.geometry is not None
            self._paged = PagedTables(self.geometry, self.tail)
        return self._paged

    def sync_paged(self, mask: torch.Tensor | None) -> PagedTables:
        """Fill the tables for the current step; ``mask`` is the ``[B, kv]`` padding mask, if any."""
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

    def written_event(self, layer: int) -> Event:
        """Recorded on d2h after the last offload of a layer."""
        return self._written[layer]

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
        if self.closed:
            return
        self.closed = True
        if self.geometry is not None:
            self.streams.drain()
            self.table.close()
            del self.tail
        self.slots = self.staging = self.geometry = self._paged = None
        self.length = self.tail_rows = 0

    def bytes_of(self, part: Literal["slots", "staging", "tail"]) -> int:
        """Device bytes of a fixed buffer."""
        if self.geometry is None:
            return 0
        buffer = {"slots": self.slots, "staging": self.staging, "tail": self.tail}[part]
        return buffer.nbytes if buffer is not None else 0
