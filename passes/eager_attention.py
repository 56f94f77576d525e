"""Attention that a model writes out: matmul, scale, soft cap, mask, sinks, softmax, matmul.

Read backwards from the product with V. What is proved is that the weights are a softmax, over the
keys, of ``scale * q @ k^T`` with nothing between but a soft cap, additive masks that no other node
needs, and at most one more column of sinks.

Legend: B batch, Hq query heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from headinfer_compile.passes.attention_calls import Attention
from headinfer_compile.passes.cached_kv import UnsupportedError
from headinfer_compile.passes.graph_utils import node_value, operation, same_shape
from headinfer_compile.passes.token_function import read_kv

_PRODUCTS = ("matmul", "bmm", "__matmul__")
_CASTS = ("to", "float", "type", "type_as", "half", "bfloat16", "contiguous", "clone")
_TIMES = ("mul", "imul", "multiply", "mul_")
_OVER = ("truediv", "itruediv", "div", "true_divide", "div_")
_PLUS = ("add", "iadd", "add_")
_MINUS = ("sub", "isub", "subtract")
_FILLS = ("masked_fill", "masked_fill_")


def is_product(node: Node) -> bool:
    """Whether ``node`` may be the product of attention weights with V."""
    return operation(node) in _PRODUCTS and len(node.args) == 2 and not node.kwargs


def read_eager(node: Node) -> Attention | None:
    """Read the attention that ends in the product ``node``; None where its left is no softmax.

    Raises:
        UnsupportedError: It is a softmax, but not of an attention over one cache update.
    """
    weights, value = node.args
    walk = _Walk(weights)
    if not walk.to_softmax():
        return None
    walk.through_logits()
    query, key = walk.product()
    kv = read_kv(key, value)
    return Attention(
        node,
        query,
        kv,
        walk.whole_mask(node),
        scale=walk.scale,
        soft_cap=walk.soft_cap,
        sinks=walk.sinks,
        outputs=(node,),
        inner=walk.seen,
    )


class _Walk:
    """The way from the weights back to the product of queries and keys."""

    def __init__(self, start: Any) -> None:
        self.at = start
        self.seen: set[Node] = set()
        self.scale = 1.0
        self.soft_cap: float | None = None
        self.sinks: Node | None = None
        self.masks: list[tuple[Node, float]] = []
        """What is added to the scores, and by what the sum is multiplied then."""
        self.cut = False
        """The last column of the weights has been dropped."""

    @property
    def node(self) -> Node:
        if not isinstance(self.at, Node):
            raise UnsupportedError(f"{self.at!r} stands where scores were expected")
        return self.at

    def step(self, to: Any) -> None:
        self.seen.add(self.node)
        self.at = to

    def through_views(self) -> bool:
        """Step through casts and views that keep the shape."""
        node = self.at
        if not isinstance(node, Node):
            return False
        name = operation(node)
        source = node.args[0] if node.args else None
        is_view = name in ("view", "reshape") and isinstance(source, Node)
        keeps = is_view and same_shape(node_value(node), node_value(source))  # type: ignore[arg-type]
        dropout = name == "dropout" and _is_no_dropout(node)
        if name in _CASTS or keeps or dropout:
            self.step(source)
            return True
        return False

    def to_softmax(self) -> bool:
        """Step to the softmax's input; False where there is none."""
        while True:
            if self.through_views():
                continue
            node = self.at
            if not isinstance(node, Node):
                return False
            if operation(node) == "getitem" and _drops_last_column(node) and not self.cut:
                self.cut = True
                self.step(node.args[0])
                continue
            break
        if operation(node) != "softmax":
            return False
        dims = [*node.args[1:2], node.kwargs.get("dim")]
        if not {-1, node_value(node).dim() - 1} & {dim for dim in dims if isinstance(dim, int)}:
            return False
        self.step(node.args[0])
        return True

    def through_logits(self) -> None:
        """Step from the softmax's input to the product of queries and keys."""
        if self.cut:
            self._through_sinks()
        factor = 1.0
        while operation(self.node) not in _PRODUCTS:
            if self.through_views():
                continue
            node, name = self.node, operation(self.node)
            if name in _TIMES or name in _OVER:
                number, rest = _number_and_rest(node, name in _TIMES)
                factor *= number
                self.step(rest)
            elif name in _PLUS and self.soft_cap is None:
                mask, rest = _mask_and_scores(node)
                self.masks.append((mask, factor))
                self.step(rest)
            elif name in _FILLS and self.soft_cap is None:
                self.masks.append((_fill_mask(node), factor))
                self.step(node.args[0])
            elif name in _MINUS and _is_row_constant(node.args[1]):
                # A softmax does not see what is the same for all keys of a row.
                self._skip_row_maximum(node.args[1])
                self.step(node.args[0])
            elif name in ("tanh", "tanh_") and self.soft_cap is None:
                self.step(node.args[0])
                self.soft_cap, factor = factor, 1.0
            else:
                raise UnsupportedError(f"{node.name} ({name or node.target}) changes its scores")
        if self.soft_cap is None:
            self.scale = factor
        else:
            # Scores s come as tanh(factor * s): with scale = factor * cap, cap * tanh(. / cap).
            self.scale = factor * self.soft_cap
            if not self.soft_cap > 0:
                raise UnsupportedError(f"its soft cap is {self.soft_cap}")

    def _through_sinks(self) -> None:
        """Step through the concatenation with one more column, and the row maximum before it."""
        while not (isinstance(self.at, Node) and operation(self.at) in ("cat", "concat")):
            if self.through_views():
                continue
            node = self.node
            if operation(node) not in _MINUS or not _is_row_constant(node.args[1]):
                raise UnsupportedError(f"{node.name} stands between its sinks and the softmax")
            self._skip_row_maximum(node.args[1])
            self.step(node.args[0])
        node = self.node
        parts: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if len(parts) != 2 or dim not in (-1, node_value(node).dim() - 1):
            raise UnsupportedError(f"{node.name} does not append one column to the scores")
        self.step(parts[0])
        self.sinks = _sinks(parts[1])

    def _skip_row_maximum(self, node: Any) -> None:
        """Let the reads of the scores that make a row constant count as this attention's own."""
        while isinstance(node, Node) and operation(node) in ("getitem", "getattr", "detach"):
            self.seen.add(node)
            node = node.args[0]
        if isinstance(node, Node) and operation(node) in ("max", "amax"):
            self.seen.add(node)

    def product(self) -> tuple[Node, Any]:
        """The queries, and K before it was transposed."""
        node = self.node
        if not is_product(node):
            raise UnsupportedError(f"{node.name} is no product of queries and keys")
        self.seen.add(node)
        query, keys = node.args
        if not isinstance(query, Node) or not isinstance(keys, Node):
            raise UnsupportedError(f"{node.name} is no product of queries and keys")
        name, dims = operation(keys), keys.args[1:]
        swaps = name in ("transpose", "swapaxes") and tuple(sorted(_positive(dims, 4))) == (2, 3)
        permutes = name == "permute" and tuple(_positive(_flat(dims), 4)) == (0, 1, 3, 2)
        if not (swaps or permutes or _is_mt(keys)):
            raise UnsupportedError(f"{keys.name} is no transposed K")
        self.seen.add(keys)
        return query, keys.args[0]

    def whole_mask(self, before: Node) -> Node | None:
        """One additive mask, the sum of all, made before ``before``."""
        total: Node | None = None
        for mask, factor in self.masks:
            if factor != 1.0:
                mask = _call(before, operator.mul, mask, factor)
            total = mask if total is None else _call(before, operator.add, total, mask)
        return total


def _call(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    """A new node before ``before``, with its fake value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(function, args)
    values = [node_value(arg) if isinstance(arg, Node) else arg for arg in args]
    (mode,) = {value.fake_mode for value in values if isinstance(value, FakeTensor)}
    with mode:
        node.meta["example_value"] = function(*values)
    return node


def _fill_mask(node: Node) -> Node:
    """The additive mask that does what ``masked_fill`` with a negative number does."""
    hidden, value = node.args[1:3]
    if not isinstance(value, (int, float)) or value > -1e4:
        raise UnsupportedError(f"{node.name} fills scores with {value}")
    assert isinstance(hidden, Node)
    return _call(node, torch.where, hidden, float(value), 0.0)


def _flat(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims


def _positive(dims: tuple[Any, ...], rank: int) -> list[int]:
    return [dim % rank for dim in dims if isinstance(dim, int)]


def _is_mt(node: Node) -> bool:
    return operation(node) == "getattr" and node.args[1] == "mT"


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node_value(node).shape)


def _is_no_dropout(node: Node) -> bool:
    named: dict[str, Any] = dict(zip(("input", "p", "training"), node.args, strict=False))
    named.update(node.kwargs)
    return bool(named.get("p", 0.5) == 0.0 or named.get("training", True) is False)


def _drops_last_column(node: Node) -> bool:
    key = node.args[1]
    last = slice(None, -1, None)
    return isinstance(key, tuple) and key[-1] == last and all(
        k is Ellipsis or k == slice(None, None, None) for k in key[:-1]
    )  # fmt: skip


def _number_and_rest(node: Node, commutes: bool) -> tuple[float, Any]:
    left, right = node.args[:2]
    if isinstance(right, (int, float)) and not isinstance(right, bool):
        return (float(right) if commutes else 1.0 / right), left
    if commutes and isinstance(left, (int, float)):
        return float(left), right
    raise UnsupportedError(f"{node.name} scales its scores by no constant")


def _mask_and_scores(node: Node) -> tuple[Node, Any]:
    """The addend that no product of queries and keys leads to, and the other."""
    if set(node.kwargs) - {"other"}:
        raise UnsupportedError(f"{node.name} has the arguments {sorted(node.kwargs)}")
    left, right = [*node.args, *node.kwargs.values()][:2]
    if _leads_to_product(right) and not _leads_to_product(left):
        left, right = right, left
    if not isinstance(right, Node) or not isinstance(node_value(right), torch.Tensor):
        raise UnsupportedError(f"{node.name} adds {right} to its scores")
    return right, left


def _leads_to_product(node: Any) -> bool:
    """Whether the elementwise operations behind ``node`` start at a product of two 4-D tensors."""
    while isinstance(node, Node):
        name = operation(node)
        if name in _PRODUCTS:
            return True
        if name not in (*_TIMES, *_OVER, *_PLUS, *_MINUS, *_CASTS, *_FILLS, "tanh", "view"):
            return False
        following = node.args[0]
        if name in _TIMES and not isinstance(following, Node):
            following = node.args[1]
        node = following
    return False


def _is_row_constant(node: Any) -> bool:
    if isinstance(node, Node):
        value = node_value(node)
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == 1
    return isinstance(node, (int, float))


def _sinks(column: Node) -> Node:
    """The ``[1, Hq, 1, 1]`` tensor behind a column ``[B, Hq, n, 1]``."""
    while operation(column) in ("expand", *_CASTS):
        source = column.args[0]
        assert isinstance(source, Node)
        column = source
    shape = _shape(column)
    single = [isinstance(size, int) and size == 1 for size in shape]
    if single != [True, False, True, True]:
        raise UnsupportedError(f"its sinks have the shape {list(shape)}: expected [1, Hq, 1, 1]")
    return column
