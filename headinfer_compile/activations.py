"""Peak bytes of a forward's activations, read from its partitioned graph.

Every value's size is known in the graph's own symbols, so one analysis serves all lengths. Inductor
fuses elementwise work: such a value takes memory only where a matrix product, a site, or the end of
its region reads it. An operation that is not known to be elementwise or a view counts as one that
stores its result; the estimate then errs upwards.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch.fx import GraphModule, Node

from headinfer_compile.passes.context import META, AttentionSite
from headinfer_compile.passes.graph_utils import calls, node_value

_VIEW_NAMES = """
view reshape transpose permute unsqueeze squeeze expand expand_as t mT contiguous detach chunk split
unflatten flatten view_as narrow select getitem unbind movedim
"""
_FUSED_NAMES = """
add sub rsub mul div truediv neg pow rsqrt sqrt exp log sin cos tanh sigmoid silu gelu relu softplus
erf abs maximum minimum clamp where to float half bfloat16 type_as type cat stack repeat_interleave
mean sum var amax amin square reciprocal full ones zeros arange new_ones new_zeros full_like
ones_like zeros_like masked_fill and or invert eq ne lt le gt ge logical_and logical_or logical_not
cumsum repeat dropout rms_norm layer_norm iadd imul isub softmax log_softmax tril triu clone lerp
addcmul floordiv
"""
#: ``reshape`` and ``contiguous`` are views wherever models call them on a fresh result.
_VIEWS = frozenset(_VIEW_NAMES.split())
_FUSED = frozenset(_FUSED_NAMES.split())


@dataclass(frozen=True)
class ActivationModel:
    """What a forward holds on the device beside weights and cache, in symbols of its graph."""

    regions: tuple[sympy.Expr, ...]
    """Bytes at the moments inside regions where most is held."""
    sites: tuple[sympy.Expr, ...]
    """Bytes held while a site runs: its inputs, its output, and what later regions read."""
    site_inputs: sympy.Expr
    """Bytes held when the first site begins."""
    elementwise: sympy.Expr
    """Bytes that elementwise kernels of all regions read and write."""

    def evaluate(self, sizes: Mapping[sympy.Symbol, int]) -> Activations:
        """The bytes where the graph's symbols have ``sizes``."""
        return Activations(
            region_bytes=max((_value(e, sizes) for e in self.regions), default=0),
            site_bytes=max((_value(e, sizes) for e in self.sites), default=0),
            site_input_bytes=_value(self.site_inputs, sizes),
            elementwise_bytes=_value(self.elementwise, sizes),
        )


@dataclass(frozen=True)
class Activations:
    """An ``ActivationModel`` at one length, in bytes."""

    region_bytes: int
    site_bytes: int
    site_input_bytes: int
    elementwise_bytes: int

    def peak_bytes(self, workspace_bytes: int) -> int:
        """The most that is held where a site takes ``workspace_bytes`` besides."""
        return max(self.region_bytes, self.site_bytes + workspace_bytes)


def activation_model(
    split: GraphModule, lowering: Literal["inductor", "eager"] = "inductor"
) -> ActivationModel:
    """Analyse a graph that ``partition`` made, before ``lower`` replaces its regions.

    Args:
        split: Regions and sites; every node carries its fake value.
        lowering: ``"eager"`` stores every result; ``"inductor"`` those that no fusion absorbs.
    """
    nodes = list(split.graph.nodes)
    root = {node: _outer_root(node) for node in nodes}
    last = {source: i for i, node in enumerate(nodes) for source in _sources(node, root)}
    alive: dict[Node, sympy.Expr] = {}
    regions: dict[sympy.Expr, None] = {}
    sites: dict[sympy.Expr, None] = {}
    first_site: sympy.Expr | None = None
    traffic: list[sympy.Expr] = []
    for i, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        held = sympy.Add(*alive.values())
        if node.op == "call_module":
            module = split.get_submodule(str(node.target))
            assert isinstance(module, GraphModule)
            moments, moved = _region_moments(module, node, lowering == "eager")
            regions.update((held + moment, None) for moment in moments)
            traffic.append(moved)
        elif isinstance(node.meta.get(META), AttentionSite):
            first_site = held if first_site is None else first_site
            sites[held + _bytes(node_value(node))] = None
        elif calls(node, torch.ops.headinfer.update_kv.default):
            sites[held + _bytes(node_value(node))] = None
        if root[node] is node and not _has_items(node):
            alive[node] = _bytes(node_value(node))
        for source in [s for s in alive if last.get(s, -1) <= i]:
            del alive[source]
    return ActivationModel(
        tuple(regions), tuple(sites), first_site or sympy.Integer(0), sympy.Add(*traffic)
    )


def sizes_of(split: GraphModule, args: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """The sizes that the symbols of ``split`` have in a call with ``args``, its flat inputs."""
    sizes: dict[sympy.Symbol, int] = {}
    placeholders = (node for node in split.graph.nodes if node.op == "placeholder")
    for node, arg in zip(placeholders, args, strict=True):
        value = node_value(node)
        if isinstance(value, torch.SymInt):
            _note(value, arg, sizes)
        elif isinstance(value, torch.Tensor):
            for symbolic, size in zip(value.shape, arg.shape, strict=True):
                _note(symbolic, size, sizes)
    return sizes


def _note(symbolic: Any, size: Any, sizes: dict[sympy.Symbol, int]) -> None:
    if isinstance(symbolic, torch.SymInt) and isinstance(symbolic.node.expr, sympy.Symbol):
        # While it is compiled, a size may be a symbol: its hint is what it is in the call.
        sizes[symbolic.node.expr] = int(size.node.hint if isinstance(size, torch.SymInt) else size)


def _value(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> int:
    found = expression.xreplace({s: sympy.Integer(n) for s, n in sizes.items()})
    return int(found) if found.is_number else 0


def _outer_root(node: Node) -> Node:
    """The node whose storage ``node`` is: results of a region are values of their own."""
    while op_name(node) in _VIEWS and node.op != "placeholder" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if _has_items(source):
            break
        node = source
    return node


def _has_items(node: Node) -> bool:
    return node.op == "call_module" or calls(node, torch.ops.headinfer.update_kv.default)


def _sources(node: Node, root: Mapping[Node, Node]) -> list[Node]:
    if node.target is operator.getitem and _has_items(node.all_input_nodes[0]):
        return []
    return [root[source] for source in node.all_input_nodes]


def _region_moments(
    region: GraphModule, call: Node, eager: bool
) -> tuple[list[sympy.Expr], sympy.Expr]:
    """Bytes made inside a region at each kernel, and bytes that its elementwise kernels move.

    Inputs are not among them: the caller holds them until the region returns.
    """
    graph = region.graph
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    (end,) = [n for n in graph.nodes if n.op == "output"]
    kind = {node: _kind(node) for node in graph.nodes}
    stored = _stored_nodes(graph.nodes, kind, end, eager)
    reads = {node: _reads(node, kind, stored) for node in graph.nodes}
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        if node in stored:
            last.update((source, i) for source in reads[node])
    last.update((source, len(nodes)) for source in reads[end])
    # Parameters are read by many products, and what they hold is counted as weights.
    weights = {
        inner
        for inner, outer in zip(
            (n for n in graph.nodes if n.op == "placeholder"), call.all_input_nodes, strict=True
        )
        if outer.op in ("placeholder", "get_attr")
    }
    alive: dict[Node, sympy.Expr] = {}
    moments, moved = [], []
    for i, node in enumerate(nodes):
        if node not in stored:
            continue
        size = _bytes(node_value(node))
        dying = [s for s in alive if last.get(s, -1) <= i]
        elementwise = kind[node] == "fused"
        if elementwise:
            sources = [s for s in reads[node] if s not in weights]
            moved += [size, *(_bytes(node_value(s)) for s in sources)]
        reuses = elementwise and not eager and any(alive[s] == size for s in dying)
        moments.append(sympy.Add(*alive.values(), *(() if reuses else (size,))))
        for source in dying:
            del alive[source]
        if last.get(node, -1) > i:
            alive[node] = size
    return moments, sympy.Add(*moved)


def _kind(node: Node) -> Literal["view", "fused", "kernel"]:
    name = op_name(node)
    if node.op in ("call_function", "call_method"):
        if name in _VIEWS:
            return "view"
        if name in _FUSED:
            return "fused"
    return "kernel"


def op_name(node: Node) -> str:
    """What an operation is called, whether it stands as a function, a builtin or a method."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target)).strip("_")


def _stored_nodes(nodes: Any, kind: Mapping[Node, str], end: Node, eager: bool) -> set[Node]:
    """Nodes whose result is written to memory of its own."""
    stored = {
        node for node in nodes if kind[node] == "kernel" and isinstance(_tensor(node), torch.Tensor)
    }
    stored |= {node for node in nodes if node.op == "placeholder"}
    if eager:
        return stored | {node for node in nodes if kind[node] == "fused" and _is_tensor(node)}
    for node in nodes:
        if kind[node] == "kernel" or node is end:
            for source in node.all_input_nodes:
                while kind[source] == "view":
                    source = source.all_input_nodes[0]
                if _is_tensor(source):
                    stored.add(source)
    return stored


def _is_tensor(node: Node) -> bool:
    return isinstance(_tensor(node), torch.Tensor)


def _tensor(node: Node) -> Any:
    value = node_value(node)
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _reads(node: Node, kind: Mapping[Node, str], stored: set[Node]) -> set[Node]:
    """The stored values that making ``node`` reads, through what is fused into it."""
    found: set[Node] = set()
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in stored:
            if source.op != "placeholder" or _is_tensor(source):
                found.add(source)
        else:
            waiting += source.all_input_nodes
    return found


def _bytes(value: Any) -> sympy.Expr:
    if isinstance(value, (tuple, list)):
        return sympy.Add(*(_bytes(item) for item in value))
    if not isinstance(value, torch.Tensor):
        return sympy.Integer(0)
    sizes = (size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape)
    return sympy.Mul(*sizes, value.dtype.itemsize)
