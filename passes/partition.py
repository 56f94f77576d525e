"""Split a model graph into regions for the compiler and the calls that must stay between them.

Given::

    def forward(self, s0, x, w, handle, past_len, ...):
        q = torch._C._nn.linear(x, w, None)
        ...
        a = torch.ops.headinfer.attention.default(handle, q, k, v, None, [], 0, past_len, ...)
        y = torch._C._nn.linear(a, w_o, None)
        ...

Result, in the order of the given graph::

    def forward(self, s0, x, w, handle, past_len, ...):
        region_0 = self.region_0(x, w, ..., s0)
        q = region_0[0];  k = region_0[1];  v = region_0[2]
        a = torch.ops.headinfer.attention.default(handle, q, k, v, None, [], 0, past_len, ...)
        region_1 = self.region_1(a, w_o, ..., s0)
        ...

``headinfer.attention`` and ``headinfer.update_kv`` stay plain calls of the outer graph, with their
meta, and with the ``getitem`` nodes that unpack them. So does arithmetic on lengths, which costs
nothing there and would otherwise tie the shape of a region to the region that happened to hold it.

Requires: every node that crosses a cut has ``meta["val"]`` or ``meta["example_value"]``.

Ensures: each region takes its live-ins in order of first use, then every size symbol they carry;
returns a tuple of its live-outs; holds no parameter or buffer; and reads and leaves autocast as
the given graph would at that point. Equal layers therefore give equal regions.

Declines when: never.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import calls, node_value

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_STATE = (_enter_autocast, _exit_autocast, torch._C._set_grad_enabled)
_VALUE_META = ("val", "example_value", "stack_trace")


@dataclass(frozen=True)
class _Region:
    """Consecutive nodes, and the nodes before them whose global state is still in force."""

    nodes: list[Node]
    state: list[Node]


def run(gm: GraphModule, ctx: PassContext) -> GraphModule:
    """Return ``gm`` split into ``region_i`` submodules and the calls between them."""
    graph = Graph()
    outer: dict[Node, Node] = {}
    symbols: dict[sympy.Symbol, Node] = {}
    attributes: dict[str, Any] = {}
    count = 0
    for piece in _pieces(gm):
        if isinstance(piece, _Region):
            name = f"region_{count}"
            count += 1
            attributes[name] = _emit_region(gm, piece, name, graph, outer, symbols)
            continue
        if piece.op == "placeholder":
            # Dynamo's target differs from the name, which prints as one assignment per parameter.
            outer[piece] = graph.placeholder(piece.name)
            outer[piece].meta = dict(piece.meta)
        else:
            outer[piece] = graph.node_copy(piece, outer.__getitem__)
        if piece.op == "get_attr":
            attributes[str(piece.target)] = _attribute(gm, piece)
        value = node_value(piece)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            symbols.setdefault(value.node.expr, piece)
    split = GraphModule(attributes, graph)
    split.meta = dict(gm.meta)
    return split


def _pieces(gm: GraphModule) -> list[Node | _Region]:
    attention = torch.ops.headinfer.attention.default
    update_kv = torch.ops.headinfer.update_kv.default
    pieces: list[Node | _Region] = []
    region: list[Node] = []
    state: list[Node] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(_attribute(gm, node), torch.nn.Module):
            continue  # the body of a higher-order operator: copied by the region that uses it
        is_cut = calls(node, attention) or calls(node, update_kv)
        if is_cut or node.op == "output":
            if region:
                pieces.append(_Region(region, state))
                state = _state_after(state, region)
                region = []
            pieces.append(node)
        elif node.op in ("placeholder", "get_attr") or _unpacks(node, update_kv):
            pieces.append(node)
        elif _is_scalar(node) and all(_is_scalar(arg) for arg in node.all_input_nodes):
            pieces.append(node)
        else:
            region.append(node)
    return pieces


def _attribute(gm: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(gm)


def _unpacks(node: Node, op: torch._ops.OpOverload) -> bool:
    return node.target is operator.getitem and calls(node.all_input_nodes[0], op)


def _is_scalar(node: Node) -> bool:
    """Whether ``node`` is a size, or arithmetic on sizes (``.item()`` of a tensor is neither)."""
    return node.op in ("placeholder", "call_function") and isinstance(node_value(node), _SYMBOLIC)


def _state_after(state: Sequence[Node], nodes: Sequence[Node]) -> list[Node]:
    """The nodes whose effect on autocast and grad mode still holds after ``nodes``."""
    after = list(state)
    for node in nodes:
        if node.target is _enter_autocast:
            after.append(node)
        elif node.target is _exit_autocast:
            after.remove(node.all_input_nodes[0])
        elif node.target is torch._C._set_grad_enabled:
            after = [n for n in after if n.target is not torch._C._set_grad_enabled] + [node]
    return after


def _emit_region(
    gm: GraphModule,
    region: _Region,
    name: str,
    graph: Graph,
    outer: dict[Node, Node],
    symbols: dict[sympy.Symbol, Node],
) -> GraphModule:
    """Build the submodule of ``region`` and append its call to ``graph``."""
    inputs = _live_ins(region, outer, symbols)
    members = set(region.nodes)
    outputs = [
        node
        for node in region.nodes
        if node.target not in _STATE and any(user not in members for user in node.users)
    ]
    module = GraphModule(gm, _region_graph(region, inputs, outputs), class_name=name)
    # Without live-outs only an effect on a live-in can be the point: dead-code elimination must
    # not take the call for useless.
    module._is_impure = not outputs  # type: ignore[assignment]

    call = graph.call_module(name, tuple(outer[node] for node in inputs))
    call.meta["val"] = tuple(node_value(node) for node in outputs)
    for i, node in enumerate(outputs):
        item = graph.create_node("call_function", operator.getitem, (call, i), name=node.name)
        item.meta = _value_meta(node)
        outer[node] = item
    return module


def _live_ins(
    region: _Region, outer: dict[Node, Node], symbols: dict[sympy.Symbol, Node]
) -> list[Node]:
    live = dict.fromkeys(
        arg for node in region.nodes for arg in node.all_input_nodes if arg in outer
    )
    used: set[sympy.Symbol] = set()
    for node in live:
        used |= free_symbols(node_value(node))
    # The compiler can bind a size only from an input that is exactly that symbol: a tensor of
    # size s0 + s1 alone would leave it with one equation for two unknowns.
    live.update(dict.fromkeys(symbols[s] for s in sorted(used, key=str) if s in symbols))
    return list(live)


def _region_graph(region: _Region, inputs: Sequence[Node], outputs: Sequence[Node]) -> Graph:
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = _value_meta(node)
    bodies = {
        arg: None
        for node in region.nodes
        for arg in node.all_input_nodes
        if arg.op == "get_attr" and arg not in env
    }
    for node in (*bodies, *region.state, *region.nodes):
        env[node] = graph.node_copy(node, env.__getitem__)
    for node in reversed(_state_after(region.state, region.nodes)):
        if node.target is _enter_autocast:
            graph.call_function(_exit_autocast, (env[node],))
    graph.output(tuple(env[node] for node in outputs))
    return graph


def _value_meta(node: Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _VALUE_META if key in node.meta}
