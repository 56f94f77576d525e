"""K and V of an attention, read back to the cache update that they come from.

Between the update and the attention may lie a repetition over the GQA group, copies and views, or
(``token_function.py``) anything that is computed token by token.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from headinfer_compile.passes.graph_utils import node_value, operation, same_shape
from headinfer_compile.runtime.expand import TokenFunction

_SAME_VALUES = ("contiguous", "clone")


class UnsupportedError(Exception):
    """Why an attention is left alone."""


@dataclass
class CachedKV:
    """The update behind K and V, and the nodes between."""

    update: Node
    nodes: set[Node] = field(default_factory=set)
    expand: TokenFunction | None = None
    """What makes K and V of the cached rows; None where these are K and V."""
    inputs: list[Node] = field(default_factory=list)
    """What ``expand`` reads besides."""


def is_update(node: object) -> bool:
    """Whether ``node`` is a cache update."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and node.target in (torch.ops.headinfer.update_kv, torch.ops.headinfer.update_kv.default)
    )


def static_int(value: Any, what: str) -> int:
    """``value``, which must not be symbolic.

    Raises:
        UnsupportedError: It is.
    """
    if not isinstance(value, int):
        raise UnsupportedError(f"{what} is symbolic")
    return value


def cached_kv(key: object, value: object) -> CachedKV:
    """Read K and V of an attention, ``[B, H, S, D]``, that are K and V of one cache update.

    Raises:
        UnsupportedError: They are not.
    """
    nodes: set[Node] = set()
    update = _source(key, 0, nodes)
    if _source(value, 1, nodes) is not update:
        raise UnsupportedError("K and V come from different cache updates")
    return CachedKV(update, nodes)


def reads_update(node: object) -> bool:
    """Whether a cache update is among the ancestors of ``node`` on this side of any attention."""
    seen: set[Node] = set()
    stack = [node] if isinstance(node, Node) else []
    while stack:
        at = stack.pop()
        if is_update(at):
            return True
        if at not in seen and at.target is not torch.ops.headinfer.attention.default:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return False


def updates_of(graph: torch.fx.Graph) -> Iterator[Node]:
    """The cache updates of a graph, in order."""
    return (node for node in list(graph.nodes) if is_update(node))


def _source(node: object, index: int, nodes: set[Node]) -> Node:
    """The update whose K (0) or V (1) ``node`` is, seen through ``repeat_kv`` and copies."""
    while isinstance(node, Node):
        nodes.add(node)
        if node.target is operator.getitem and is_update(node.args[0]):
            if node.args[1] != index:
                raise UnsupportedError("K and V of the cache are swapped")
            update = node.args[0]
            assert isinstance(update, Node)
            return update
        if operation(node) in _SAME_VALUES or _keeps_shape(node):
            node = node.args[0]
            continue
        source = _through_repeat(node, nodes)
        if source is None:
            break
        node = source
    raise UnsupportedError("its K or V is not the output of a HeadInferCache update")


def _keeps_shape(node: Node) -> bool:
    """Whether ``node`` is a view or conversion that changes neither shape nor dtype."""
    if operation(node) not in ("view", "reshape", "to", "type", "type_as", "float"):
        return False
    before, after = node_value(node.args[0]), node_value(node)  # type: ignore[arg-type]
    return bool(before.dtype == after.dtype) and same_shape(before, after)


def _through_repeat(node: Node, nodes: set[Node]) -> Node | None:
    """The ``[B, Hkv, S, D]`` input of a ``repeat_kv`` that ends in ``node``."""
    if operation(node) == "repeat_interleave":
        given: list[Any] = [*node.args[1:], *node.kwargs.values()]
        repeated = node.args[0]
        assert isinstance(repeated, Node)
        heads_only = len(given) == 2 and isinstance(given[0], int) and given[1] in (1, -3)
        return repeated if heads_only and node_value(repeated).dim() == 4 else None
    if operation(node) not in ("reshape", "view"):
        return None
    expand = node.args[0]
    if not isinstance(expand, Node) or operation(expand) != "expand":
        return None
    index = expand.args[0]
    if not isinstance(index, Node) or not _inserts_third_dim(index):
        return None
    source = index.args[0]
    assert isinstance(source, Node)
    before, middle, after = node_value(source), node_value(expand), node_value(node)
    heads = before.shape[1] * middle.shape[2]
    expected = (before.shape[0], heads, before.shape[2], before.shape[3])
    if tuple(after.shape) != expected:
        return None
    nodes.update((expand, index))
    return source


def _inserts_third_dim(node: Node) -> bool:
    """Whether ``node`` is ``x[:, :, None]`` or ``x.unsqueeze(2)``."""
    if operation(node) == "unsqueeze":
        return [*node.args[1:], *node.kwargs.values()] in ([2], [-3])
    full = slice(None, None, None)
    key = node.args[1] if operation(node) == "getitem" else None
    return (
        isinstance(key, tuple)
        and key[:3] == (full, full, None)
        and all(k is Ellipsis or k == full for k in key[3:])
    )


def through_transpose(node: object, nodes: set[Node]) -> object:
    """The ``[B, H, S, D]`` tensor behind ``x.transpose(1, 2)``; the way there goes to ``nodes``.

    Raises:
        UnsupportedError: ``node`` is no such view.
    """
    while isinstance(node, Node) and operation(node) in _SAME_VALUES:
        nodes.add(node)
        node = node.args[0]
    if isinstance(node, Node) and operation(node) == "transpose":
        if tuple(node.args[1:]) in ((1, 2), (2, 1)):
            nodes.add(node)
            return node.args[0]
    raise UnsupportedError("its K or V is not a transposed output of a HeadInferCache update")
