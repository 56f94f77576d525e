"""Make every attention and its cache update one ``headinfer.attention`` node.

Given::

    u = headinfer.update_kv(handle, k, v, layer, past)      # k: "bf16[B, Hkv, n, D]"
    K = u[0]; V = u[1]                                      # "bf16[B, Hkv, past + n, D]"
    K = repeat_kv(K); V = repeat_kv(V)                      # getitem / expand / reshape, optional
    o = scaled_dot_product_attention(q, K, V, attn_mask=m)  # q: "bf16[B, Hq, n, D]"

Result::

    o = headinfer.attention(handle, q, k, v, m, [], layer, past, scale, is_causal)

with an ``AttentionSite`` in ``meta["headinfer"]``. The ops of the ``flash_attn`` package
(``[B, n, H, D]``, by their registered schema) are rewritten likewise.

Requires: a torch-level graph with ``meta["example_value"]``.
Ensures: no attention that was rewritten leaves its ``update_kv`` behind.
Declines when: K or V of the cache has another reader, dropout is not zero, the head counts are
symbolic, or the attention takes options that the block kernels lack (ALiBi, soft cap).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from headinfer_compile.passes.context import META, AttentionSite, PassContext, source_line
from headinfer_compile.passes.graph_utils import node_value

_SDPA = (
    torch._C._nn.scaled_dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SAME_VALUES = ("contiguous", "clone")


class _Unsupported(Exception):
    """Why an attention is left alone."""


def _value(node: Node) -> torch.Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value


def _is_update(node: object) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and node.target in (torch.ops.headinfer.update_kv, torch.ops.headinfer.update_kv.default)
    )


def _through_repeat(node: Node) -> Node | None:
    """The ``[B, Hkv, S, D]`` input of a ``repeat_kv`` that ends in ``node``."""
    if node.op != "call_method" or node.target not in ("reshape", "view"):
        return None
    expand = node.args[0]
    if not isinstance(expand, Node) or expand.op != "call_method" or expand.target != "expand":
        return None
    index = expand.args[0]
    if not isinstance(index, Node) or index.target is not operator.getitem:
        return None
    full = slice(None, None, None)
    if index.args[1] != (full, full, None, full, full):
        return None
    source = index.args[0]
    assert isinstance(source, Node)
    before, middle, after = _value(source), _value(expand), _value(node)
    heads = before.shape[1] * middle.shape[2]
    expected = (before.shape[0], heads, before.shape[2], before.shape[3])
    return source if tuple(after.shape) == expected else None


def _cache_source(node: object, index: int) -> Node:
    """The ``update_kv`` whose K (0) or V (1) ``node`` is, seen through ``repeat_kv`` and copies."""
    while isinstance(node, Node):
        if node.target is operator.getitem and _is_update(node.args[0]):
            if node.args[1] != index:
                raise _Unsupported("K and V of the cache are swapped")
            update = node.args[0]
            assert isinstance(update, Node)
            return update
        if node.op == "call_method" and node.target in _SAME_VALUES:
            node = node.args[0]
            continue
        source = _through_repeat(node)
        if source is None:
            break
        node = source
    raise _Unsupported("its K or V is not the output of a HeadInferCache update")


def _through_transpose(node: object) -> object:
    """The ``[B, H, S, D]`` tensor behind ``x.transpose(1, 2)``."""
    while isinstance(node, Node) and node.op == "call_method" and node.target in _SAME_VALUES:
        node = node.args[0]
    if isinstance(node, Node) and node.op == "call_method" and node.target == "transpose":
        if tuple(node.args[1:]) in ((1, 2), (2, 1)):
            return node.args[0]
    raise _Unsupported("its K or V is not a transposed output of a HeadInferCache update")


def _static(value: Any, what: str) -> int:
    if not isinstance(value, int):
        raise _Unsupported(f"{what} is symbolic")
    return value


class _Attention:
    """One attention call in the terms of ``scaled_dot_product_attention``."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.outputs: tuple[Node, ...] = (node,)
        self.transposed = False


class _Sdpa(_Attention):
    def __init__(self, node: Node) -> None:
        super().__init__(node)
        named: dict[str, Argument] = dict(zip(_SDPA_ARGS, node.args, strict=False))
        named.update(node.kwargs)
        if named.get("dropout_p", 0.0) != 0.0:
            raise _Unsupported(f"dropout_p={named['dropout_p']} is not zero")
        self.query = named["query"]
        self.update = _cache_source(named["key"], 0)
        if _cache_source(named["value"], 1) is not self.update:
            raise _Unsupported("K and V come from different cache updates")
        self.mask = named.get("attn_mask")
        self.is_causal = bool(named.get("is_causal", False))
        self.scale = named.get("scale")


class _FlashAttn(_Attention):
    """``flash_attn._flash_attn_forward``: ``[B, n, H, D]`` in, ``(out, lse, ...)`` out."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        schema = torch.ops.flash_attn._flash_attn_forward.default._schema
        named: dict[str, Argument] = {a.name: a.default_value for a in schema.arguments}
        named.update(zip(named, node.args, strict=False))
        named.update(node.kwargs)
        if (
            named["dropout_p"] != 0.0
            or named["softcap"] != 0.0
            or named["alibi_slopes"] is not None
        ):
            raise _Unsupported("dropout, soft cap or ALiBi slopes are given")
        if (named["window_size_left"], named["window_size_right"]) != (-1, -1):
            raise _Unsupported("a window is given")
        self.update = _cache_source(_through_transpose(named["k"]), 0)
        if _cache_source(_through_transpose(named["v"]), 1) is not self.update:
            raise _Unsupported("K and V come from different cache updates")
        self.query, self.mask, self.scale = named["q"], None, named["softmax_scale"]
        self.transposed = True
        users = tuple(node.users)
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
            raise _Unsupported("more than its output is used")
        self.outputs = users
        # The package aligns the causal mask bottom right: over the cache that is kv <= q + past.
        self.is_causal = bool(named["causal"])


def _matcher(node: Node) -> Callable[[Node], _Sdpa | _FlashAttn] | None:
    if node.op != "call_function":
        return None
    if node.target in _SDPA:
        return _Sdpa
    name = getattr(node.target, "_qualified_op_name", None) or str(node.target)
    if name.replace("::", ".").removesuffix(".default") == "flash_attn._flash_attn_forward":
        return _FlashAttn
    return None


def _rewrite(gm: GraphModule, ctx: PassContext, found: _Sdpa | _FlashAttn) -> None:
    update, node = found.update, found.node
    handle, k, v, layer, past = update.args
    assert isinstance(found.query, Node) and isinstance(k, Node) and isinstance(v, Node)
    q_value, k_value, v_value = _value(found.query), _value(k), _value(v)
    heads_dim = 2 if found.transposed else 1
    heads = _static(q_value.shape[heads_dim], "the number of query heads")
    kv_heads = _static(k_value.shape[1], "the number of KV heads")
    head_dim = _static(q_value.shape[3], "head_dim")
    if heads % kv_heads or k_value.shape[3] != head_dim:
        raise _Unsupported(
            f"{heads} query heads of {head_dim} do not group over {kv_heads} KV heads"
        )
    scale = head_dim**-0.5 if found.scale is None else found.scale
    if isinstance(scale, Node) and isinstance(node_value(scale), torch.SymFloat):
        # A float that differs between two models of one class; this guards on its value.
        scale = float(node_value(scale))
    if not isinstance(scale, (int, float)):
        raise _Unsupported("its scale is not a constant")
    outside = [u for u in _readers(update) if u is not node]
    if outside:
        raise _Unsupported(f"K or V of the cache is also read by {outside[0].name}")
    assert isinstance(layer, int)
    site = AttentionSite(
        index=len(ctx.sites),
        layer=layer,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=_static(v_value.shape[3], "head_dim of V"),
        scale=float(scale),
        is_causal=found.is_causal,
        mask=None,
        source=source_line(node),
        bottom_right=found.transposed,
    )
    graph = gm.graph
    with graph.inserting_before(node):
        query = found.query
        if found.transposed:
            query = graph.call_method("transpose", (query, 1, 2))
            query.meta["example_value"] = q_value.transpose(1, 2)
        options: tuple[Argument, ...] = (layer, past, float(scale), found.is_causal)
        attention = graph.call_function(
            torch.ops.headinfer.attention.default,
            (handle, query, k, v, found.mask, [], *options),
        )
        attention.meta[META] = site
        attention.stack_trace = node.stack_trace
        out = found.outputs[0]
        attention.meta["example_value"] = _value(out)
        result = attention
        if found.transposed:
            attention.meta["example_value"] = _value(out).transpose(1, 2)
            result = graph.call_method("transpose", (attention, 1, 2))
            result.meta["example_value"] = _value(out)
    for output in found.outputs:
        output.replace_all_uses_with(result)
        graph.erase_node(output)
    if node not in found.outputs:
        graph.erase_node(node)
    ctx.sites.append(site)


def _readers(update: Node) -> list[Node]:
    """Nodes that read K or V, seen through views that only the attention uses."""
    readers, stack = [], list(update.users)
    while stack:
        user = stack.pop()
        passes_on = user.target is operator.getitem or (
            user.op == "call_method"
            and user.target in ("expand", "reshape", "view", "transpose", *_SAME_VALUES)
        )
        if passes_on:
            stack.extend(user.users)
        else:
            readers.append(user)
    return readers


def run(gm: GraphModule, ctx: PassContext) -> GraphModule:
    """Rewrite every attention over a HeadInferCache in ``gm``."""
    for node in list(gm.graph.nodes):
        matcher = _matcher(node)
        if matcher is None:
            continue
        try:
            _rewrite(gm, ctx, matcher(node))
        except _Unsupported as reason:
            ctx.decline(node, str(reason))
    _erase_dead_updates(gm)
    _decline_other_readers(gm, ctx)
    return gm


def _decline_other_readers(gm: GraphModule, ctx: PassContext) -> None:
    """Say so where K and V of an update go to something that is no attention we match."""
    declined = {decline.node for decline in ctx.declines}
    for update in [node for node in gm.graph.nodes if _is_update(node)]:
        readers = _readers(update)
        if readers and declined.isdisjoint(reader.name for reader in readers):
            ctx.decline(
                readers[0],
                "it reads K or V of the cache and is no attention that this pass knows, such as "
                "scaled_dot_product_attention (attn_implementation='sdpa')",
            )


def _erase_dead_updates(gm: GraphModule) -> None:
    """Remove the updates whose attention now holds them, with the views between."""
    for update in [node for node in gm.graph.nodes if _is_update(node)]:
        between = _views_of(update)
        if all(set(node.users) <= set(between) for node in between) and not _readers(update):
            for node in reversed(between):
                gm.graph.erase_node(node)
            gm.graph.erase_node(update)


def _views_of(update: Node) -> list[Node]:
    """Everything downstream of an update that has lost its readers, in graph order."""
    seen: set[Node] = set()
    stack = list(update.users)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return [node for node in update.graph.nodes if node in seen]
