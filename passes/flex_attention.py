"""The higher-order operator ``flex_attention``: attention with functions of the score and the mask.

Its mask is a subgraph, a function of one (b, h, q_idx, kv_idx). It is copied into the graph over
index tensors of shapes ``[B, 1, 1, 1]``, ``[1, Hq, 1, 1]``, ``[1, 1, n, 1]`` and ``[1, 1, 1, kv]``,
and so becomes an ordinary mask, which ``recover_mask`` reads. The lists of blocks that the operator
is given as well only say where that function is true; torch's own reference does not read them.

Legend: B batch, Hq query heads, n new tokens, D head dim.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from headinfer_compile.passes.attention_calls import Attention
from headinfer_compile.passes.cached_kv import UnsupportedError
from headinfer_compile.passes.context import source_line
from headinfer_compile.passes.graph_utils import node_value, operation
from headinfer_compile.passes.mask_operations import ELEMENTWISE, FILLS
from headinfer_compile.passes.token_function import read_kv

# Positions in the operator's arguments, and in its tuple of a block mask, counted from the end.
_SCORE_MOD, _BLOCK_MASK, _SCALE, _MASK_BUFFERS = 3, 4, 5, 8
_BLOCK_SIZES, _MASK_MOD = slice(-3, -1), -1

_TIMES, _OVER = ("mul", "multiply"), ("truediv", "div", "divide")
_ONES = ("new_ones", "ones", "ones_like")
#: The block size of torch's mask for "no mask": one block, whatever the lengths.
_WHOLE = 1 << 30


def is_flex(node: Node) -> bool:
    """Whether ``node`` is a call of the operator."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def read_flex(node: Node) -> Attention:
    """Read ``flex_attention``; its mask is added to the graph before it.

    Raises:
        UnsupportedError: It is no attention over one cache update, its scores are changed by more
            than a factor and a soft cap, its mask is no elementwise function of the indices and of
            elements of tensors, or its LSE is used.
    """
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise UnsupportedError("its LSE is used, as attention sinks do")
    args: Any = node.args
    kv = read_kv(args[1], args[2])
    factor, soft_cap = _read_score(_module(node, args[_SCORE_MOD]))
    scale = args[_SCALE]
    if factor != 1:
        if not isinstance(scale, (int, float)):
            raise UnsupportedError("its scale is not a constant")
        scale = scale * factor
    return Attention(
        node,
        args[0],
        kv,
        _inline_mask(node, args[0], kv.update),
        scale=scale,
        soft_cap=soft_cap,
        outputs=tuple(node.users),
    )


def _module(node: Node, attribute: Node) -> Graph:
    owner = node.graph.owning_module
    assert owner is not None and attribute.op == "get_attr" and isinstance(attribute.target, str)
    module = owner.get_submodule(attribute.target)
    assert isinstance(module, GraphModule)
    return module.graph


def _result(graph: Graph) -> Any:
    return graph.output_node().args[0]


def _read_score(graph: Graph) -> tuple[float, float | None]:
    """The factor of the score and the soft cap: ``cap * tanh(factor * score / cap)``."""
    at = _result(graph)
    factor, soft_cap = 1.0, None
    score = next(iter(graph.nodes))
    while at is not score:
        name = operation(at)
        args: Any = at.args
        if name in _TIMES and isinstance(args[0], (int, float)):
            factor, at = factor * args[0], args[1]
        elif name in _TIMES and isinstance(args[1], (int, float)):
            at, factor = args[0], factor * args[1]
        elif name in _OVER and isinstance(args[1], (int, float)):
            at, factor = args[0], factor / args[1]
        elif name == "tanh" and soft_cap is None:
            if not factor > 0:
                raise UnsupportedError(f"its soft cap is {factor}")
            at, soft_cap, factor = args[0], factor, 1.0
        else:
            raise UnsupportedError(
                f"its score_mod changes the scores by {name or at.target} (at {source_line(at)})"
            )
    return (factor if soft_cap is None else factor * soft_cap), soft_cap


def _inline_mask(node: Node, query: Node, update: Node) -> Node | None:
    """The mask, ``[B or 1, Hq or 1, n, kv]``; None if the operator was given none."""
    args: Any = node.args
    block_mask = args[_BLOCK_MASK]
    inner = _module(node, block_mask[_MASK_MOD])
    indices, buffers = _placeholders(inner)
    result = _result(inner)
    if operation(result) in _ONES:
        if not all(isinstance(s, int) and s >= _WHOLE for s in block_mask[_BLOCK_SIZES]):
            raise UnsupportedError("its block mask comes without a function of the indices")
        return None
    for step in inner.nodes:
        _check(step)
    graph = node.graph
    with graph.inserting_before(node), node_value(query).fake_mode:
        sizes = [_call(graph, "size", query, dim) for dim in range(3)]
        sizes.append(_call(graph, operator.add, update.args[4], sizes[2]))
        copies: dict[Node, Any] = dict(zip(buffers, args[_MASK_BUFFERS], strict=True))
        for axis, (index, size) in enumerate(zip(indices, sizes, strict=True)):
            if index.users:
                copies[index] = _positions(graph, size, axis, node_value(query).device)
        for step in inner.nodes:
            if step.op not in ("placeholder", "output"):
                copies[step] = graph.node_copy(step, copies.__getitem__)
                copies[step].meta = {"example_value": _evaluate(copies[step])}
                copies[step].stack_trace = step.stack_trace
    return copies[result]  # type: ignore[no-any-return]


def _placeholders(graph: Graph) -> tuple[list[Node], list[Node]]:
    """Those of (b, h, q_idx, kv_idx), and those of what the function captures."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    return nodes[:4], nodes[4:]


def _check(step: Node) -> None:
    """Refuse what does not work on tensors of indices as it does on one index."""
    if step.op in ("placeholder", "output"):
        return
    name, value = operation(step), node_value(step)
    scalar = not isinstance(value, torch.Tensor) or value.dim() == 0
    known = name in ELEMENTWISE or name in FILLS or name == "getitem"
    if not (scalar and known):
        raise UnsupportedError(
            f"its mask_mod calls {name or step.target} (at {source_line(step)}), which is not "
            "elementwise"
        )


def _positions(graph: Graph, size: Argument, axis: int, device: torch.device) -> Node:
    """0 to ``size``, along ``axis`` of four."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    count = _call(graph, torch.arange, size, device=device)
    return _call(graph, "view", count, *shape)


def _call(graph: Graph, target: Any, *args: Argument, **kwargs: Argument) -> Node:
    """A call of a function, or of a method by its name, with its fake value."""
    op = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, args, kwargs)
    node.meta["example_value"] = _evaluate(node)
    return node


def _evaluate(node: Node) -> Any:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), node_value)
    if node.op == "call_method":
        first, *rest = args
        return getattr(first, str(node.target))(*rest, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
