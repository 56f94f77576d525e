"""Make every attention and its cache update one ``headinfer.attention`` node.

Given::

    u = headinfer.update_kv(handle, k, v, layer, past)      # k: "bf16[B, Hkv, n, D]"
    K = u[0]; V = u[1]                                      # "bf16[B, Hkv, past + n, D]"
    K = repeat_kv(K); V = repeat_kv(V)                      # getitem / expand / reshape, optional
    o = scaled_dot_product_attention(q, K, V, attn_mask=m)  # q: "bf16[B, Hq, n, D]"

or the same written out: ``softmax(soft_cap(scale * q @ K^T) + m) @ V`` with or without sinks
(``eager_attention.py``), an operator of the flash packages (``attention_calls.py``) or the
higher-order operator ``flex_attention`` with its functions of score and mask
(``flex_attention.py``).

Result::

    o = headinfer.attention(handle, q, k, v, m, [sinks], layer, past, scale, is_causal)

with an ``AttentionSite`` in ``meta["headinfer"]``, which holds what the attention is besides.

Requires: a torch-level graph with ``meta["example_value"]``.
Ensures: no attention that was rewritten leaves its ``update_kv`` behind, and none of the tensors
of the size of its scores.
Declines when: K, V or the scores have another reader, dropout is not zero, the head counts are
symbolic, or something stands between the scores and the softmax that is none of the above.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from headinfer_compile.passes.attention_calls import Attention, reader
from headinfer_compile.passes.cached_kv import (
    UnsupportedError,
    reads_update,
    static_int,
    updates_of,
)
from headinfer_compile.passes.context import META, AttentionSite, PassContext, source_line
from headinfer_compile.passes.eager_attention import is_product, read_eager
from headinfer_compile.passes.flex_attention import is_flex, read_flex
from headinfer_compile.passes.graph_utils import has_effect, node_value


def run(gm: GraphModule, ctx: PassContext) -> GraphModule:
    """Rewrite every attention over a HeadInferCache in ``gm``."""
    # Dynamo leaves views behind that only a size was read of; they would count as readers.
    gm.graph.eliminate_dead_code(has_effect)
    for node in list(gm.graph.nodes):
        read = _reader(node)
        if read is None or not any(map(reads_update, node.all_input_nodes)):
            continue
        try:
            found = read(node)
            if found is not None:
                _rewrite(gm, ctx, found)
        except UnsupportedError as reason:
            ctx.decline(node, str(reason))
    _decline_other_readers(gm, ctx)
    return gm


def _reader(node: Node) -> Callable[[Node], Attention | None] | None:
    if is_flex(node):
        return read_flex
    return reader(node) or (read_eager if is_product(node) else None)


def _rewrite(gm: GraphModule, ctx: PassContext, found: Attention) -> None:
    update, node = found.kv.update, found.node
    handle, k, v, layer, past = update.args
    assert isinstance(k, Node) and isinstance(v, Node) and isinstance(layer, int)
    _check_readers(found)
    site = _site(ctx, found, node_value(k), node_value(v), layer)
    graph = gm.graph
    with graph.inserting_before(node):
        query = found.query
        if found.transposed:
            query = _transpose(query)
        options: tuple[Argument, ...] = (layer, past, site.scale, found.is_causal)
        if site.expand is not None:
            options = (*options, site.v_head_dim)
        inputs = [*found.kv.inputs, *([] if found.sinks is None else [found.sinks])]
        attention = graph.call_function(
            torch.ops.headinfer.attention.default,
            (handle, query, k, v, found.mask, inputs, *options),
        )
        attention.meta[META] = site
        attention.stack_trace = node.stack_trace
        out = node_value(found.outputs[0])
        attention.meta["example_value"] = out.transpose(1, 2) if found.transposed else out
        result = _transpose(attention) if found.transposed else attention
    for output in found.outputs:
        output.replace_all_uses_with(result)
    _erase(graph, [*found.outputs, node, update, *found.inner, *found.kv.nodes])
    ctx.sites.append(site)


def _site(
    ctx: PassContext, found: Attention, k: torch.Tensor, v: torch.Tensor, layer: int
) -> AttentionSite:
    query, out = node_value(found.query), node_value(found.outputs[0])
    heads = static_int(query.shape[2 if found.transposed else 1], "the number of query heads")
    kv_heads = static_int(k.shape[1], "the number of KV heads")
    head_dim = static_int(query.shape[3], "head_dim")
    expand = found.kv.expand
    if heads % (kv_heads if expand is None else expand.num_heads) or (
        expand is None and k.shape[3] != head_dim
    ):
        raise UnsupportedError(
            f"{heads} query heads of {head_dim} do not group over {kv_heads} KV heads"
        )
    scale = head_dim**-0.5 if found.scale is None else found.scale
    if isinstance(scale, Node) and isinstance(node_value(scale), torch.SymFloat):
        # A float that differs between two models of one class; this guards on its value.
        scale = float(node_value(scale))
    if not isinstance(scale, (int, float)):
        raise UnsupportedError("its scale is not a constant")
    sinks = None if found.sinks is None else node_value(found.sinks)
    if sinks is not None and sinks.numel() != heads:
        raise UnsupportedError(f"it has sinks of shape {list(sinks.shape)} for {heads} heads")
    return AttentionSite(
        index=len(ctx.sites),
        layer=layer,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=static_int((v if expand is None else out).shape[3], "head_dim of V"),
        scale=float(scale),
        is_causal=found.is_causal,
        mask=None,
        source=source_line(found.node),
        bottom_right=found.bottom_right,
        soft_cap=found.soft_cap,
        sinks=None if sinks is None else len(found.kv.inputs),
        expand=expand,
        window=found.window,
    )


def _transpose(node: Node) -> Node:
    """``node`` with its second and third dimensions exchanged."""
    result = node.graph.call_method("transpose", (node, 1, 2))
    result.meta["example_value"] = node_value(node).transpose(1, 2)
    return result


def _check_readers(found: Attention) -> None:
    """Refuse an attention whose K, V or scores something else reads as well."""
    own = {found.node, *found.inner, *found.kv.nodes}
    for node in (found.kv.update, *found.kv.nodes, *found.inner):
        for user in node.users:
            if user not in own:
                what = "its scores are" if node in found.inner else "K or V of the cache is"
                raise UnsupportedError(f"{what} also read by {user.name}")


def _erase(graph: torch.fx.Graph, nodes: list[Node]) -> None:
    """Erase nodes that only served an attention, users first."""
    doomed = set(nodes)
    for node in reversed(list(graph.nodes)):
        if node in doomed:
            graph.erase_node(node)


def _decline_other_readers(gm: GraphModule, ctx: PassContext) -> None:
    """Say so where K and V of an update go to something that is no attention we match."""
    declined = {decline.node for decline in ctx.declines}
    for update in updates_of(gm.graph):
        readers = _readers(update)
        if readers and declined.isdisjoint(reader.name for reader in readers):
            ctx.decline(
                readers[0],
                "it reads K or V of the cache and is no attention that this pass knows, such as "
                "scaled_dot_product_attention (attn_implementation='sdpa')",
            )


def _readers(update: Node) -> list[Node]:
    """The first nodes that compute with K or V of an update."""
    readers, stack = [], list(update.users)
    while stack:
        user = stack.pop()
        is_view = user.op == "call_method" and user.target in (
            *("expand", "reshape", "view", "transpose", "contiguous", "clone"),
        )
        if is_view or user.target is operator.getitem:
            stack.extend(user.users)
        else:
            readers.append(user)
    return readers
