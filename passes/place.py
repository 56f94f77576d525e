"""Start a site schedule: one attention over the KV blocks that the placement names.

Given: a ``PlanKey``: how many KV blocks are on the GPU and on the host, for one placement class.
Result::

    def site(handle, q, k, v, masks, layer, next_layer, base, r0, r1):
        out = whole_site(q, k, v)
        return out, r0, r1

Requires: an empty graph.
Ensures: every input that later passes use exists; the ring passes through unchanged.
Declines when: never. The placement itself is the byte-budget policy of ``runtime/block_plan.py``:
blocks stay on the GPU while ``gpu_budget`` holds them, later ones go to the host.
"""

from __future__ import annotations

from torch.fx import GraphModule

from headinfer_compile.passes.schedule import PlanContext, whole_site

FIXED_INPUTS = ("handle", "q", "k", "v", "masks", "layer", "next_layer", "base")


def run(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Fill the empty graph of ``gm``."""
    graph = gm.graph
    inputs = {name: graph.placeholder(name) for name in FIXED_INPUTS}
    ring = [graph.placeholder(f"r{i}") for i in range(ctx.key.num_slots)]
    out = graph.call_function(whole_site, (inputs["q"], inputs["k"], inputs["v"]))
    graph.output((out, *ring))
    return gm
