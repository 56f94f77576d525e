"""The site schedule: what decides its shape (``PlanKey``), what it is (``Schedule``), its markers.

A schedule is an FX graph over ``torch.ops.headinfer`` with these inputs::

    def site(handle, q, k, v, masks, layer, next_layer, base, r0, ..., rN-1): ...
        return out, r0', ..., rN-1'

``r_i`` is the token of slot ``(base + i) % N``: the transfer in flight there (the first ``entry``
of them) or the last release. The exit tokens are in the order of the next site's base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes.context import META
from headinfer_compile.runtime.step import APPEND as APPEND
from headinfer_compile.runtime.step import HOST as HOST
from headinfer_compile.runtime.step import NEW as NEW
from headinfer_compile.runtime.step import NEW_PREFIX as NEW_PREFIX
from headinfer_compile.runtime.step import RESIDENT as RESIDENT
from headinfer_compile.runtime.step import TAIL as TAIL

#: ``(spec, group, block)`` of one transfer.
Transfer = tuple[int, int, int]


@dataclass(frozen=True)
class PieceKind:
    """What the schedule of a piece depends on."""

    source: str
    to_host: bool


@dataclass(frozen=True)
class PlanKey:
    """Everything the structure of a site schedule depends on; lengths are run-time values."""

    spec: int
    phase: str
    one_query: bool
    causal: bool
    appends: bool
    has_tail: bool
    """Tokens are in the tail before the step."""
    pieces: tuple[PieceKind, ...]
    groups: int
    chunks: int
    resident: int
    """KV blocks on the GPU; they come first in the numbering."""
    host: int
    """KV blocks on the host that are transferred; they come next."""
    num_slots: int
    distance: int
    """Transfers in flight ahead of the one attended; 0 without ``hoist_prefetch``."""
    padded: bool
    fused: bool = False
    """One kernel attends the tail and all resident blocks (span ``RESIDENT``)."""
    next_transfers: tuple[Transfer, ...] = ()
    """The first transfers of the next site, started by this one."""
    cpu: int = 0
    """KV blocks on the host that the CPU attends where they lie; they come last."""

    def transfers(self) -> tuple[Transfer, ...]:
        """This site's transfers in order: head group, query chunk, KV block."""
        blocks = range(self.resident, self.resident + self.host)
        return tuple(
            (self.spec, group, block)
            for group in range(self.groups)
            for _ in range(self.chunks)
            for block in blocks
        )

    @property
    def entry(self) -> int:
        """Transfers of this site that the one before has started."""
        return min(self.distance, self.groups * self.chunks * self.host)


@dataclass(frozen=True)
class SpanInfo:
    """Where the K and V of an attend come from, in ``meta["headinfer"]`` until transfers exist."""

    group: int
    chunk: int
    span: int


@dataclass
class PlanContext:
    """State of one build of a schedule."""

    key: PlanKey
    config: HeadInferConfig
    pass_name: str = ""
    node_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """A schedule that may run: verified, compiled, with the key it was built for."""

    key: PlanKey
    graph_module: GraphModule
    function: Callable[..., tuple[Any, ...]]
    num_transfers: int
    entry: int
    exit: int
    build_seconds: float
    verify_seconds: float

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph."""
        return len(self.graph_module.graph.nodes)


def whole_site(q: Any, k: Any, v: Any) -> Any:
    """Marker: one attention over everything; replaced by ``split_heads``."""
    raise AssertionError("the marker 'whole_site' was executed: split_heads did not run")


def group_site(out: Any, q: Any, k: Any, v: Any, group: int) -> Any:
    """Marker: one head group over everything; replaced by ``chunk_sequence``."""
    raise AssertionError("the marker 'group_site' was executed: chunk_sequence did not run")


def span_kv(k: Any, v: Any, group: int, chunk: int, span: int) -> Any:
    """Marker: K and V of one span; replaced by ``insert_transfers``."""
    raise AssertionError("the marker 'span_kv' was executed: insert_transfers did not run")


def inputs_of(graph: Graph) -> dict[str, Node]:
    """The placeholders of a schedule by name."""
    return {node.name: node for node in graph.nodes if node.op == "placeholder"}


def output_of(graph: Graph) -> Node:
    """The output node of a graph."""
    (node,) = (node for node in graph.nodes if node.op == "output")
    assert isinstance(node, Node)
    return node


def nodes_of(graph: Graph, target: object) -> list[Node]:
    """Nodes that call ``target``, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is target]


def copy_meta(node: Node, source: Node) -> Node:
    """Give an inserted node the stack trace and our metadata of the node it comes from."""
    node.stack_trace = source.stack_trace
    if META in source.meta:
        node.meta[META] = source.meta[META]
    return node
