"""Cut a head group into query chunks x KV spans, joined by LSE merge.

Given::

    g0 = group_site(out, q, k, v, 0)

Result, with one query chunk, a tail and one KV block::

    n = span_kv(k, v, 0, 0, NEW)
    a = headinfer.attend(handle, q, n[0], n[1], masks, spec, 0, 0, NEW, True)
    t = span_kv(k, v, 0, 0, TAIL)
    a1 = headinfer.attend_merge(handle, a[0], a[1], q, t[0], t[1], ...)
    b = span_kv(k, v, 0, 0, 0)
    a2 = headinfer.attend_merge(handle, a1[0], a1[1], q, b[0], b[1], ...)
    g0 = headinfer.store(handle, out, a2[0], spec, 0, 0)

Of host blocks that the CPU attends (span ``HOST``), with the query copied down first of all, the
result is waited for and joined last::

    h = headinfer.attend_host(handle, layer, q, spec, 1, 2)
    ...
    w = headinfer.wait_host(handle, h)
    a3 = headinfer.merge_host(handle, a2[0], a2[1], w[0], w[1], spec, 0, 0)

In one-query decode on CUDA one kernel attends the tail and all resident blocks (span ``RESIDENT``).
Where that is all there is, what it makes is the result, and ``out`` is not made::

    a = headinfer.attend_resident(handle, layer, q, spec, APPEND, False)
    g0 = a[0]

Past and new tokens are always apart: over the past the mask is full (or a band), over the new
tokens it is a square. New tokens come first: they need no transfer, so transfers hide behind them.
Order: head group, query chunk, KV block; queries are split only when accumulators would exceed
``workspace_bytes``, and then KV is streamed once per query chunk.

Requires: ``group_site`` markers.
Ensures: every query of the group meets every key it may see exactly once.
Declines when: never.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.context import META
from headinfer_compile.passes.schedule import (
    APPEND,
    HOST,
    NEW,
    NEW_PREFIX,
    RESIDENT,
    TAIL,
    PlanContext,
    PlanKey,
    SpanInfo,
    copy_meta,
    group_site,
    inputs_of,
    nodes_of,
    span_kv,
)


def spans(key: PlanKey, chunk: int) -> list[int]:
    """The spans that query chunk ``chunk`` attends, in order."""
    on_cpu = [HOST] if key.cpu else []
    if key.fused:
        return [RESIDENT, *range(key.resident, key.resident + key.host), *on_cpu]
    found = []
    if not key.one_query:
        found.append(NEW)
        if key.causal and chunk > 0:
            found.append(NEW_PREFIX)
    if key.has_tail or key.one_query:
        found.append(TAIL)
    return found + list(range(key.resident + key.host)) + on_cpu


def is_direct(key: PlanKey) -> bool:
    """Whether one op makes the whole result."""
    return key.groups == key.chunks == 1 and spans(key, 0) == [RESIDENT]


def run(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Replace every ``group_site`` by attends over its spans."""
    graph = gm.graph
    inputs = inputs_of(graph)
    (made,) = nodes_of(graph, torch.ops.headinfer.output.default)
    result = _attend_host(graph, ctx.key, inputs) if ctx.key.cpu else None
    for site in nodes_of(graph, group_site):
        out = site.args[0]
        assert isinstance(out, Node)
        with graph.inserting_before(site):
            for chunk in range(ctx.key.chunks):
                out = _attend_chunk(graph, ctx.key, inputs, site, out, chunk, result)
        site.replace_all_uses_with(out)
        graph.erase_node(site)
    if is_direct(ctx.key):
        graph.erase_node(made)
    return gm


def _attend_chunk(
    graph: Graph, key: PlanKey, inputs: dict[str, Node], site: Node, out: Node, chunk: int,
    host: _HostResult | None,
) -> Node:  # fmt: skip
    group = site.args[4]
    assert isinstance(group, int)
    handle, q, masks = inputs["handle"], inputs["q"], inputs["masks"]
    todo = spans(key, chunk)
    acc: tuple[Node, Node] | None = None
    for span in todo:
        if span == RESIDENT:
            # `insert_transfers` puts the token of the pack in the place of APPEND.
            args = (handle, inputs["layer"], q, key.spec, APPEND, len(todo) > 1)
            attend = graph.call_function(torch.ops.headinfer.attend_resident.default, args)
            acc = _unpack(graph, attend, site, SpanInfo(group, chunk, span))
            continue
        if span == HOST:
            assert acc is not None and host is not None
            merge = graph.call_function(
                torch.ops.headinfer.merge_host.default,
                (handle, *acc, *host.views(graph), key.spec, group, chunk),
            )
            acc = _unpack(graph, merge, site, SpanInfo(group, chunk, span))
            continue
        kv = graph.call_function(span_kv, (inputs["k"], inputs["v"], group, chunk, span))
        kv.meta[META] = SpanInfo(group, chunk, span)
        k, v = (graph.call_function(operator.getitem, (kv, i)) for i in (0, 1))
        where = (masks, key.spec, group, chunk, span)
        if acc is None:
            attend = graph.call_function(
                torch.ops.headinfer.attend.default, (handle, q, k, v, *where, len(todo) > 1)
            )
        else:
            attend = graph.call_function(
                torch.ops.headinfer.attend_merge.default, (handle, *acc, q, k, v, *where)
            )
        acc = _unpack(graph, attend, site, SpanInfo(group, chunk, span))
    assert acc is not None
    if is_direct(key):
        return acc[0]
    store = torch.ops.headinfer.store.default
    return copy_meta(
        graph.call_function(store, (handle, out, acc[0], key.spec, group, chunk)), site
    )


@dataclass
class _HostResult:
    """The result of the CPU; compute waits for it where it is first needed."""

    handle: Node
    token: Node
    waited: tuple[Node, Node] | None = None

    def views(self, graph: Graph) -> tuple[Node, Node]:
        """Output and LSE of all heads."""
        if self.waited is None:
            wait = torch.ops.headinfer.wait_host.default
            node = graph.call_function(wait, (self.handle, self.token))
            out, lse = (graph.call_function(operator.getitem, (node, i)) for i in (0, 1))
            self.waited = out, lse
        return self.waited


def _attend_host(graph: Graph, key: PlanKey, inputs: dict[str, Node]) -> _HostResult:
    """Start the CPU before everything else."""
    handle, layer, q = (inputs[name] for name in ("handle", "layer", "q"))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        args = (handle, layer, q, key.spec, key.resident + key.host, key.cpu)
        token = graph.call_function(torch.ops.headinfer.attend_host.default, args)
    return _HostResult(handle, token)


def _unpack(graph: Graph, attend: Node, site: Node, info: SpanInfo) -> tuple[Node, Node]:
    copy_meta(attend, site)
    attend.meta[META] = info
    out = graph.call_function(operator.getitem, (attend, 0))
    return out, graph.call_function(operator.getitem, (attend, 1))
