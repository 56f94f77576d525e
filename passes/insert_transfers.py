"""Give every span its K and V: pack and offload, prefetch / wait / release of host blocks.

Given::

    b = span_kv(k, v, 0, 0, 0)                                   # a KV block on the host
    a = headinfer.attend_merge(handle, a0, l0, q, b[0], b[1], ...)

Result::

    p = headinfer.pack(handle, layer, k, v, piece)               # compute
    o = headinfer.offload(handle, layer, p)                      # d2h, after pack
    x = headinfer.prefetch(handle, layer, spec, 0, 0, base, 0, r0)  # h2d, after release r0
    b = headinfer.wait(handle, x)                                # compute, after x
    a = headinfer.attend_merge(handle, a0, l0, q, b[0], b[1], ...)
    f = headinfer.release(handle, x, a[1])                       # compute, after the last reader

Requires: ``span_kv`` markers.
Ensures: each prefetch has one wait, each wait one release; transfer ``j`` uses slot ``base + j``
after the release of transfer ``j - num_slots``; the exit tokens are those of the slots from
``base + number of transfers`` on.
Declines when: never.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.context import META
from headinfer_compile.passes.schedule import (
    APPEND,
    NEW,
    NEW_PREFIX,
    TAIL,
    PlanContext,
    SpanInfo,
    inputs_of,
    nodes_of,
    output_of,
    span_kv,
)


def run(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Replace every ``span_kv`` and add the write-back."""
    graph, key = gm.graph, ctx.key
    inputs = inputs_of(graph)
    ring = [inputs[f"r{i}"] for i in range(key.num_slots)]
    packed = _insert_pack(graph, inputs, ctx)
    for node in nodes_of(graph, torch.ops.headinfer.attend_resident.default):
        node.update_arg(4, packed)
    slot_tokens: list[Node] = list(ring)
    for span in nodes_of(graph, span_kv):
        info = span.meta[META]
        assert isinstance(info, SpanInfo)
        if info.span in (NEW, NEW_PREFIX):
            _replace_pair(span, inputs["k"], inputs["v"])
            continue
        with graph.inserting_before(span):
            if info.span == TAIL:
                source = graph.call_function(
                    torch.ops.headinfer.tail.default, (inputs["handle"], inputs["layer"], packed)
                )
            elif info.span < key.resident:
                args = (inputs["handle"], inputs["layer"], key.spec, info.group, info.span, packed)
                source = graph.call_function(torch.ops.headinfer.resident.default, args)
            else:
                source = _insert_transfer(graph, inputs, ctx, span, info, slot_tokens)
        span.replace_all_uses_with(source)
        graph.erase_node(span)
    done = len(slot_tokens) - key.num_slots
    output = output_of(graph)
    (returned,) = output.args
    assert isinstance(returned, tuple)
    output.args = ((returned[0], *slot_tokens[done : done + key.num_slots]),)
    return gm


def _insert_pack(graph: Graph, inputs: dict[str, Node], ctx: PlanContext) -> Node | int:
    """Write-back before the attends; returns the token of the pack that the reads follow."""
    asked = torch.ops.headinfer.attend_host.default
    first = next(n for n in graph.nodes if n.op != "placeholder" and n.target is not asked)
    handle, layer, k, v = (inputs[name] for name in ("handle", "layer", "k", "v"))
    packed: Node | int = APPEND
    with graph.inserting_before(first):
        pieces = list(range(len(ctx.key.pieces)))
        for piece in [APPEND, *pieces] if ctx.key.appends else pieces:
            token = graph.call_function(
                torch.ops.headinfer.pack.default, (handle, layer, k, v, piece)
            )
            if piece == APPEND:
                packed = token
            elif ctx.key.pieces[piece].to_host:
                graph.call_function(torch.ops.headinfer.offload.default, (handle, layer, token))
    return packed


def _replace_pair(span: Node, k: Node, v: Node) -> None:
    for user in list(span.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with((k, v)[user.args[1]])  # type: ignore[index]
        span.graph.erase_node(user)
    span.graph.erase_node(span)


def _insert_transfer(
    graph: Graph,
    inputs: dict[str, Node],
    ctx: PlanContext,
    span: Node,
    info: SpanInfo,
    slot_tokens: list[Node],
) -> Node:
    """Prefetch, wait and release of one host block; appends the release to ``slot_tokens``."""
    index = len(slot_tokens) - ctx.key.num_slots
    handle = inputs["handle"]
    prefetch = graph.call_function(
        torch.ops.headinfer.prefetch.default,
        (
            handle,
            inputs["layer"],
            ctx.key.spec,
            info.group,
            info.span,
            inputs["base"],
            index,
            slot_tokens[index],
        ),
    )
    prefetch.meta[META] = info
    wait = graph.call_function(torch.ops.headinfer.wait.default, (handle, prefetch))
    wait.meta[META] = info
    (k_item, *_) = list(span.users)
    (attend,) = list(k_item.users)
    acc = next(user for user in attend.users if user.args[1] == 0)
    with graph.inserting_after(acc):
        release = graph.call_function(torch.ops.headinfer.release.default, (handle, prefetch, acc))
        release.meta[META] = info
    slot_tokens.append(release)
    return wait
