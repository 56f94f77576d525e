"""Start transfers ``distance`` ahead of their use, across head groups, layers and decode steps.

Given, transfers 0 and 1 of a site with two slots::

    x0 = prefetch(.., base, 0, r0); w0 = wait(x0); a0 = attend_merge(.., w0); f0 = release(x0, a0)
    x1 = prefetch(.., base, 1, r1); w1 = wait(x1); a1 = attend_merge(.., w1); f1 = release(x1, a1)
    return out, f0, f1

Result, with distance 1 (the next site's transfer 0 is ``y``)::

    x1 = prefetch(..., base, 1, r1);  w0 = wait(r0);  a0 = ...;  f0 = release(r0, a0)
    y = prefetch(next_layer, ..., base, 2, f0);  w1 = wait(x1);  a1 = ...;  f1 = release(x1, a1)
    return out, y, f1

Requires: the order of ``insert_transfers``.
Ensures: at most ``distance + 1`` slots are filled or being read; the first ``key.entry`` transfers
come in by the ring, and ``key.next_transfers`` leave by it.
Declines when: the site neither transfers nor starts a transfer, or distance is 0.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.place import FIXED_INPUTS
from headinfer_compile.passes.schedule import PlanContext, inputs_of, nodes_of, output_of


def run(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Move the prefetches of ``gm`` and add those of the next site."""
    graph, key = gm.graph, ctx.key
    prefetch = torch.ops.headinfer.prefetch.default
    prefetches = nodes_of(graph, prefetch)
    if key.distance == 0 or not (prefetches or key.next_transfers):
        return gm
    inputs = inputs_of(graph)
    waits = nodes_of(graph, torch.ops.headinfer.wait.default)
    for index, node in enumerate(prefetches):
        if index < key.entry:
            node.replace_all_uses_with(inputs[f"r{index}"])
            graph.erase_node(node)
        else:
            waits[index - key.distance].prepend(node)
    output = output_of(graph)
    (returned,) = output.args
    assert isinstance(returned, tuple)
    out, *ring = returned
    assert isinstance(out, Node)
    total = len(waits)
    for index, (spec, group, block) in enumerate(key.next_transfers):
        ahead = total + index - key.distance
        place = waits[ahead] if ahead >= 0 else _first_use(graph, out)
        with graph.inserting_before(place):
            ring[index] = graph.call_function(
                prefetch,
                (
                    inputs["handle"], inputs["next_layer"], spec, group, block,
                    inputs["base"], total + index, ring[index],
                ),
            )  # fmt: skip
    output.args = ((out, *ring),)
    return gm


def _first_use(graph: Graph, out: Node) -> Node:
    """Where a transfer that waits for nothing of this site may start: before the first attend."""
    attends = (
        torch.ops.headinfer.attend.default,
        torch.ops.headinfer.attend_resident.default,
    )
    return next((node for node in graph.nodes if node.target in attends), out)


def prologue(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Fill the empty graph of ``gm`` with the entry transfers of a site that starts cold.

    Result: ``def prologue(handle, q, k, v, masks, layer, next_layer, base, r0, ...)`` that starts
    transfers ``0 .. key.entry - 1`` of ``layer`` and returns None and the ring.
    """
    graph, key = gm.graph, ctx.key
    inputs = {name: graph.placeholder(name) for name in FIXED_INPUTS}
    ring = [graph.placeholder(f"r{i}") for i in range(key.num_slots)]
    for index, (spec, group, block) in enumerate(key.transfers()[: key.entry]):
        where = (inputs["layer"], spec, group, block, inputs["base"], index, ring[index])
        ring[index] = graph.call_function(
            torch.ops.headinfer.prefetch.default, (inputs["handle"], *where)
        )
    graph.output((None, *ring))
    return gm
