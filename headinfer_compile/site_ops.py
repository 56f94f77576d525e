"""What every op of a site schedule touches: slot, pages, bytes, FLOP, and the events it waits for.

The schedule says which ops there are; the step says which tokens the blocks hold. Both a picture of
a schedule and a prediction of its time start here. Slots count from the ``base`` of the layer: slot
``s`` of an op is ring slot ``(base + s) % num_slots``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from headinfer_compile.passes.schedule import (
    APPEND,
    NEW,
    NEW_PREFIX,
    RESIDENT,
    TAIL,
    Schedule,
    output_of,
)
from headinfer_compile.passes.schedule_text import statement
from headinfer_compile.runtime.ops import STREAMS
from headinfer_compile.runtime.spec import Geometry, SiteSpec
from headinfer_compile.runtime.step import KVBlock, Step

_SPAN_NAMES = {
    NEW: "new tokens",
    NEW_PREFIX: "new tokens before the query chunk",
    TAIL: "tail",
    RESIDENT: "tail and resident blocks",
}


@dataclass(frozen=True)
class StepShape:
    """The sizes of one step: what blocks, queries and heads its schedules are about."""

    step: Step
    specs: tuple[SiteSpec, ...]
    geometry: Geometry
    head_group: int
    num_slots: int

    def blocks(self, spec: int) -> tuple[KVBlock, ...]:
        """KV blocks of a class of sites."""
        return self.step.blocks.get(self.specs[spec], ())

    def heads(self, spec: int, group: int) -> tuple[int, int]:
        """Half-open range of the KV heads of a head group."""
        start = group * self.head_group
        return start, min(start + self.head_group, self.specs[spec].num_kv_heads)


@dataclass(frozen=True)
class Edge:
    """An event that an op waits for: recorded by ``op`` (or an earlier site) on ``stream``."""

    op: str
    """Name of the op in the same schedule, or the ring input ``r0``, ``r1``, ..."""
    stream: str
    event: str
    """What the event stands for, such as ``slot.freed``."""


@dataclass(frozen=True)
class SiteOp:
    """One op of a schedule."""

    name: str
    op: str
    stream: str
    code: str
    what: str
    """The tokens it is about, in words."""
    group: int | None = None
    chunk: int | None = None
    block: int | None = None
    slot: int | None = None
    """Counted from the layer's base."""
    next_layer: bool = False
    """The op works for the layer after this one."""
    pages: tuple[tuple[int, int], ...] = ()
    """Token blocks read or written, with rows."""
    slot_bytes: int = 0
    """Of the KV block in the slot."""
    link_bytes: int = 0
    """Moved between host and device by this op."""
    memory_bytes: int = 0
    """Read and written in device memory, at least."""
    flop: int = 0
    causal: bool = False
    """The queries attend a square of their own keys, half of which is hidden."""
    after: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class _Transfer:
    slot: int
    group: int
    block: int


@dataclass
class _Reader:
    """State of one walk over a schedule."""

    schedule: Schedule
    shape: StepShape
    transfers: dict[str, _Transfer] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    """The transfer whose slot a value is a view of, by name of the value."""
    offloads: list[str] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)
    """Packs into the staging ring, each with its offload."""

    def __post_init__(self) -> None:
        key = self.schedule.key
        for index, (_, group, block) in enumerate(key.transfers()[: key.entry]):
            self.transfers[f"r{index}"] = _Transfer(index, group, block)

    def read(self, node: Node) -> SiteOp:
        """The facts of one op."""
        name = str(getattr(node.target, "_opname", node.target))
        stream = STREAMS[name]
        base = SiteOp(node.name, name, stream, statement(node), "")
        handler = getattr(self, f"_{name}", None)
        return base if handler is None else handler(base, *node.args[1:])

    # -- moving -----------------------------------------------------------------------------

    def _pack(self, op: SiteOp, layer: Node, k: Node, v: Node, piece: int) -> SiteOp:
        step = self.shape.step
        token_bytes = self.shape.geometry.layer_token_bytes
        if piece == APPEND:
            what = f"{step.new:,} new tokens, appended to the tail"
            return replace(op, what=what, memory_bytes=2 * step.new * token_bytes)
        part = step.pieces[piece]
        after: tuple[Edge, ...] = ()
        if part.source == "new" and part.to_host:
            if len(self.staged) >= 2:
                after = (Edge(self.staged[-2], "d2h", "staging.copied"),)
            self.staged.append(op.name)
        where = "the staging ring" if part.to_host else "resident pages"
        what = f"{part.rows:,} tokens from {part.source}, to {where}"
        moved = part.rows if part.source == "new" or not part.to_host else 0
        pages = tuple((segment.block.index, segment.rows) for segment in part.segments)
        return replace(
            op, what=what, pages=pages, memory_bytes=2 * moved * token_bytes, after=after
        )

    def _offload(self, op: SiteOp, layer: Node, pack: Node) -> SiteOp:
        piece: Any = pack.args[4]
        part = self.shape.step.pieces[piece]
        host = [segment for segment in part.segments if segment.block.tier == "host"]
        rows = sum(segment.rows for segment in host)
        if pack.name in self.staged:
            self.staged[self.staged.index(pack.name)] = op.name
        self.offloads.append(op.name)
        return replace(
            op,
            what=f"{rows:,} tokens to host pages",
            pages=tuple((segment.block.index, segment.rows) for segment in host),
            link_bytes=rows * self.shape.geometry.layer_token_bytes,
            after=(Edge(pack.name, "compute", "packed"),),
        )

    def _prefetch(
        self, op: SiteOp, layer: Node, spec: int, group: int, block: int, base: Node, slot: int,
        after: Node,
    ) -> SiteOp:  # fmt: skip
        slot %= self.shape.num_slots
        self.transfers[op.name] = _Transfer(slot, group, block)
        edges = [Edge(after.name, "compute", "slot.freed")]
        ahead = layer.name == "next_layer"
        if self.offloads and not ahead:
            edges.append(Edge(self.offloads[-1], "d2h", "pages.written"))
        return self._of_block(op, spec, group, block, slot, tuple(edges), ahead)

    def _of_block(
        self, op: SiteOp, spec: int, group: int, block: int, slot: int, after: tuple[Edge, ...],
        next_layer: bool = False,
    ) -> SiteOp:  # fmt: skip
        kv, (low, high) = self.shape.blocks(spec)[block], self.shape.heads(spec, group)
        what = (
            f"KV block {block}, tokens {kv.start:,}-{kv.start + kv.rows - 1:,}, "
            f"KV heads {low}-{high - 1}"
        )
        moved = kv.rows * (high - low) * self.shape.geometry.head_token_bytes
        return replace(
            op, what=what, group=group, block=block, slot=slot, next_layer=next_layer, after=after,
            pages=tuple((page.index, rows) for page, rows in kv.pages),
            slot_bytes=moved, link_bytes=moved if op.stream == "h2d" else 0,
        )  # fmt: skip

    def _wait(self, op: SiteOp, token: Node) -> SiteOp:
        self.source[op.name] = token.name
        return self._of_transfer(op, token, (Edge(token.name, "h2d", "slot.filled"),))

    def _release(self, op: SiteOp, token: Node, last: Node) -> SiteOp:
        return self._of_transfer(op, token, ())

    def _of_transfer(self, op: SiteOp, token: Node, after: tuple[Edge, ...]) -> SiteOp:
        spec, found = self.schedule.key.spec, self.transfers[token.name]
        return self._of_block(op, spec, found.group, found.block, found.slot, after)

    def _tail(self, op: SiteOp, *_: object) -> SiteOp:
        return replace(op, what="the newest tokens, a view")

    def _resident(
        self, op: SiteOp, layer: Node, spec: int, group: int, block: int, *_: object
    ) -> SiteOp:
        kv = self.shape.blocks(spec)[block]
        what = f"KV block {block} on the GPU, tokens {kv.start:,}-{kv.start + kv.rows - 1:,}"
        return replace(op, what=what, group=group, block=block)

    # -- attending --------------------------------------------------------------------------

    def _attend(
        self, op: SiteOp, q: Node, k: Node, v: Node, masks: Any, spec: int, group: int, chunk: int,
        span: int, *_: object,
    ) -> SiteOp:  # fmt: skip
        step = self.shape.step
        start, stop = step.query_range(spec, chunk)
        pairs, rows = self._pairs(spec, span, start, stop)
        what = f"queries {start:,}-{stop - 1:,} over " if stop - start > 1 else "1 query over "
        slot = None
        if span >= 0:
            kv = self.shape.blocks(spec)[span]
            what += f"KV block {span}, tokens {kv.start:,}-{kv.start + kv.rows - 1:,}"
            value: Any = k.args[0] if k.target is operator.getitem else k
            token = self.source.get(value.name)
            slot = None if token is None else self.transfers[token].slot
        else:
            what += _SPAN_NAMES[span]
        low, high = self.shape.heads(spec, group)
        return self._work(
            replace(op, what=what, group=group, chunk=chunk, slot=slot,
                    block=span if span >= 0 else None,
                    causal=span == NEW and self.schedule.key.causal),
            spec, high - low, pairs, rows, stop - start,
        )  # fmt: skip

    def _attend_merge(self, op: SiteOp, acc: Node, lse: Node, *rest: Any) -> SiteOp:
        return self._attend(op, *rest)

    def _attend_resident(self, op: SiteOp, layer: Node, q: Node, spec: int, *_: object) -> SiteOp:
        gpu = [block.rows for block in self.shape.blocks(spec) if block.tier == "gpu"]
        rows = sum(gpu) + self.shape.step.tail_rows + 1
        what = f"1 query over the tail and {len(gpu)} resident KV blocks"
        heads = self.shape.specs[spec].num_kv_heads
        return self._work(replace(op, what=what, group=0, chunk=0), spec, heads, rows, rows, 1)

    def _pairs(self, spec: int, span: int, start: int, stop: int) -> tuple[int, int]:
        """Pairs of query and key that are scored, and the keys, of one span."""
        step, queries = self.shape.step, stop - start
        if span >= 0:
            rows = self.shape.blocks(spec)[span].rows
        elif span == TAIL:
            rows = step.tail_rows + (1 if step.new == 1 and step.appends else 0)
        elif span == NEW_PREFIX:
            rows = start
        elif self.schedule.key.causal:
            return queries * (queries + 1) // 2, queries
        else:
            rows = step.new
        return queries * rows, rows

    def _work(
        self, op: SiteOp, spec: int, heads: int, pairs: int, rows: int, queries: int
    ) -> SiteOp:
        """FLOP and bytes of attention of ``heads`` KV heads with their query heads."""
        site, geometry = self.shape.specs[spec], self.shape.geometry
        q_heads = geometry.batch * heads * site.queries_per_kv
        dims = site.head_dim + site.v_head_dim
        # q is read, and an fp32 accumulator with its LSE is read and written.
        per_query = q_heads * (site.head_dim * geometry.dtype.itemsize + 8 * site.v_head_dim + 8)
        read = rows * heads * geometry.head_token_bytes
        return replace(op, flop=2 * q_heads * pairs * dims, memory_bytes=read + queries * per_query)

    def _attend_host(
        self, op: SiteOp, layer: Node, q: Node, spec: int, block: int, count: int
    ) -> SiteOp:
        kv = self.shape.blocks(spec)[block : block + count]
        rows, heads = sum(part.rows for part in kv), self.shape.specs[spec].num_kv_heads
        queries = self.shape.step.new
        pages = tuple((page.index, held) for part in kv for page, held in part.pages)
        what = f"{queries} queries over {count} KV blocks where they lie, {rows:,} tokens"
        return self._work(
            replace(op, what=what, pages=pages), spec, heads, queries * rows, rows, queries
        )

    def _wait_host(self, op: SiteOp, token: Node) -> SiteOp:
        return replace(op, what="the CPU's result", after=(Edge(token.name, "cpu", "host.done"),))

    def _merge_host(
        self, op: SiteOp, acc: Node, lse: Node, out: Node, other: Node, spec: int, group: int,
        chunk: int,
    ) -> SiteOp:  # fmt: skip
        return replace(op, what="the CPU's result, joined", group=group, chunk=chunk)

    def _store(self, op: SiteOp, out: Node, acc: Node, spec: int, group: int, chunk: int) -> SiteOp:
        site, step = self.shape.specs[spec], self.shape.step
        start, stop = step.query_range(spec, chunk)
        low, high = self.shape.heads(spec, group)
        count = self.shape.geometry.batch * (high - low) * site.queries_per_kv * (stop - start)
        return replace(
            op, what=f"the result of queries {start:,}-{stop - 1:,}", group=group, chunk=chunk,
            memory_bytes=count * site.v_head_dim * (4 + self.shape.geometry.dtype.itemsize),
        )  # fmt: skip


def site_ops(schedule: Schedule, shape: StepShape) -> tuple[SiteOp, ...]:
    """The ops of a schedule in the order they are issued.

    Args:
        schedule: Built for the step of ``shape``.
        shape: The step, with the KV blocks and query chunks of the schedule's class.
    """
    reader = _Reader(schedule, shape)
    return tuple(
        reader.read(node)
        for node in schedule.graph_module.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    )


def ring_tokens(schedule: Schedule) -> list[str]:
    """Names of the tokens that a schedule hands to the next site: its ``r0``, ``r1``, ..."""
    (returned,) = output_of(schedule.graph_module.graph).args
    assert isinstance(returned, tuple)
    return [str(node) for node in returned[1:]]
