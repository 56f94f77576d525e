"""Split a site into its head groups.

Given::

    out = whole_site(q, k, v)

Result, with two head groups::

    out = headinfer.output(handle, q, spec)
    g0 = group_site(out, q, k, v, 0)
    g1 = group_site(g0, q, k, v, 1)

Requires: one ``whole_site``.
Ensures: every KV head is in exactly one group; groups follow each other by data dependence.
Declines when: never; a group size that does not divide Hkv leaves a smaller last group.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from headinfer_compile.passes.schedule import (
    PlanContext,
    copy_meta,
    group_site,
    inputs_of,
    nodes_of,
    whole_site,
)


def run(gm: GraphModule, ctx: PlanContext) -> GraphModule:
    """Replace ``whole_site`` by ``ctx.key.groups`` calls of ``group_site``."""
    graph = gm.graph
    (site,) = nodes_of(graph, whole_site)
    inputs = inputs_of(graph)
    with graph.inserting_before(site):
        out = graph.call_function(
            torch.ops.headinfer.output.default, (inputs["handle"], inputs["q"], ctx.key.spec)
        )
        copy_meta(out, site)
        for group in range(ctx.key.groups):
            out = graph.call_function(group_site, (out, *site.args, group))
            copy_meta(out, site)
    site.replace_all_uses_with(out)
    graph.erase_node(site)
    return gm
