"""Symbolic reading of the nodes that compute a mask: one element, as a function of its index.

Reading goes backwards from the mask. Every operation says which elements of its operands one
element of its result is made of, so that views, broadcasts and indexing cost nothing, and what is
no index arithmetic becomes a load from a tensor, unless that has the size of the mask itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Node

from headinfer_compile.passes.graph_utils import node_value, operation
from headinfer_compile.passes.mask_algebra import (
    Domain,
    UnreadableError,
    to_expr,
    to_linear,
    uncast,
)
from headinfer_compile.passes.mask_operations import (
    BINARY,
    CONSTANTS,
    EXPANDS,
    FULLS,
    INVERT,
    LOGICAL,
    RESHAPES,
    SAME,
    UNARY,
)
from headinfer_compile.runtime.masks import Expr, const, load, make

Index = tuple[Expr, ...]

ZERO = const(0)

_EXACT_INTEGERS = (torch.int64, torch.int32)


def symbolic(size: int | torch.SymInt) -> sympy.Expr:
    """A size or scalar as sympy sees it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class MaskReader:
    """Reads the elements of tensors of one graph; ``inputs`` are the tensors that it loads from."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.inputs: list[Node] = []
        self.visited: set[Node] = set()
        self.batched_at: dict[int, Expr] = {}
        """By level, the index in the dimension that a ``torch.vmap`` around the node hides."""

    def shape(self, node: Node) -> tuple[sympy.Expr, ...]:
        """The sizes of a tensor, in past and new lengths where they depend on these."""
        return tuple(self.domain.scalar(symbolic(size)) for size in node_value(node).shape)

    def element(self, node: Node, index: Index) -> Expr:
        """The element of ``node`` at ``index``, one expression per dimension.

        Raises:
            UnreadableError: It is no index arithmetic, nor a load from a small tensor.
        """
        self.visited.add(node)
        is_index = node.target in (torch.ops.aten.index, torch.ops.aten.index.Tensor)
        reader = _index if is_index else _READERS.get(operation(node))
        if reader is None:
            return self.load(node, index)
        try:
            expr = reader(self, node, index)
        except UnreadableError:
            if self.is_large(node):
                raise
            return self.load(node, index)
        dtype = node_value(node).dtype
        return expr if dtype in (torch.bool, *_EXACT_INTEGERS) else _cast(expr, None, dtype)

    def load(self, node: Node, index: Index) -> Expr:
        """A load from a tensor, which must not be as large as the mask unless it is an input."""
        if self.is_large(node):
            raise UnreadableError(f"{node.name} ({node.target}) is not index arithmetic")
        if torch._C._functorch.is_batchedtensor(node_value(node)):
            raise UnreadableError(f"{node.name} ({node.target}) under vmap is not index arithmetic")
        if node not in self.inputs:
            self.inputs.append(node)
        return load(self.inputs.index(node), self.broadcast(node, index))

    def is_large(self, node: Node) -> bool:
        """Whether it is made in the graph with two dimensions as long as queries or keys."""
        ours = self.domain.total.free_symbols
        lengths = {self.domain.total, self.domain.new} - {sympy.Integer(1)}
        shape = self.shape(node)
        long = [size in lengths or not ours.isdisjoint(size.free_symbols) for size in shape]
        unknown = [not size.free_symbols <= ours for size in shape]
        made_here = node.op not in ("placeholder", "get_attr")
        return made_here and any(long) and sum(long) + sum(unknown) > 1

    def broadcast(self, node: Node, index: Index) -> Index:
        """The index into an operand that broadcasts to the tensor that ``index`` indexes."""
        shape = self.shape(node)
        last = index[len(index) - len(shape) :]
        return tuple(ZERO if size == 1 else at for size, at in zip(shape, last, strict=True))

    def operand(self, arg: Any, index: Index, boolean: bool = False) -> Expr:
        """The element of an operand, tensor or number, of an elementwise operation."""
        if isinstance(arg, (bool, int, float)):
            return const(bool(arg) if boolean else arg)
        if not isinstance(arg, Node):
            raise UnreadableError(f"operand {arg!r} is neither a tensor nor a number")
        value = node_value(arg)
        if not isinstance(value, torch.Tensor):
            return self.scalar(arg)
        expr = self.element(arg, self.broadcast(arg, index))
        return _cast(expr, value.dtype, torch.bool) if boolean else expr

    def scalar(self, arg: Any) -> Expr:
        """A Python number or SymInt of the graph."""
        value = node_value(arg) if isinstance(arg, Node) else arg
        if isinstance(value, (bool, float)):
            return const(value)
        if not isinstance(value, (int, torch.SymInt)):
            raise UnreadableError(f"{arg} is no number")
        return to_expr(self.domain.scalar(symbolic(value)))

    def nonnegative(self, expr: Expr) -> bool:
        """Whether an index is proved never to wrap around from the end."""
        linear = to_linear(expr)
        return linear is not None and self.domain.nonnegative(linear)


def _cast(expr: Expr, source: torch.dtype | None, target: torch.dtype) -> Expr:
    """``expr`` converted, unless both types hold its values alike."""
    if source == target or (source in _EXACT_INTEGERS and target in _EXACT_INTEGERS):
        return expr
    inner = uncast(expr)
    if target == torch.bool and inner.op == "where":
        test, *choices = inner.args
        numbers = [uncast(choice) for choice in choices]
        if all(number.op == "const" for number in numbers):
            left, right = (const(bool(number.args[0])) for number in numbers)
            return _select(test, left, right, boolean=True)
    name = str(target).removeprefix("torch.")
    return expr if expr.op == "cast" and expr.args[1] == name else Expr("cast", (expr, name))


def _plain(node: Node, *allowed: str) -> None:
    """Refuse keyword arguments that change what an operation computes."""
    extra = set(node.kwargs) - {"device", "dtype", "requires_grad", *allowed}
    if extra:
        raise UnreadableError(f"{node.name} has the arguments {sorted(extra)}")


def _is_bool(node: Node) -> bool:
    return bool(node_value(node).dtype == torch.bool)


def _binary(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node, "other")
    operands = [*node.args, *node.kwargs.values()]
    op = BINARY[operation(node)]
    if _is_bool(node) and op in ("add", "mul"):
        return make({"add": "or", "mul": "and"}[op], *(reader.operand(a, index) for a in operands))
    return make(op, *(reader.operand(arg, index) for arg in operands))


def _logical(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node, "other")
    if not _is_bool(node):
        raise UnreadableError(f"{node.name} works on the bits of integers")
    operands = [*node.args, *node.kwargs.values()]
    op = LOGICAL.get(operation(node), "not")
    return make(op, *(reader.operand(arg, index, boolean=True) for arg in operands))


def _unary(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node)
    return make(UNARY[operation(node)], reader.operand(node.args[0], index))


def _same(reader: MaskReader, node: Node, index: Index) -> Expr:
    source = _source(node)
    expr = reader.element(source, index)
    return _cast(expr, node_value(source).dtype, node_value(node).dtype)


def _arange(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node, "layout", "pin_memory")
    if len(node.args) < 2:
        # The end may be a size that the reader does not know, such as the batch.
        return index[0]
    start, _, step = (*node.args, 1)[:3]
    steps = index[0] if step == 1 else make("mul", index[0], reader.scalar(step))
    return make("add", steps, reader.scalar(start))


def _fill(reader: MaskReader, node: Node, index: Index) -> Expr:
    name = operation(node)
    if name in CONSTANTS:
        value: Any = CONSTANTS[name]
    else:
        position = FULLS[name]
        value = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value")
    return reader.operand(value, (), boolean=_is_bool(node))


def _where(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node)
    if len(node.args) != 3:
        raise UnreadableError(f"{node.name} has {len(node.args)} arguments")
    if operation(node) == "where":
        condition, chosen, other = node.args
    else:
        other, condition, chosen = node.args
    boolean = _is_bool(node)
    test = reader.operand(condition, index, boolean=True)
    left, right = (reader.operand(arg, index, boolean=boolean) for arg in (chosen, other))
    return _select(test, left, right, boolean)


def _select(test: Expr, left: Expr, right: Expr, boolean: bool) -> Expr:
    if not boolean:
        return make("where", test, left, right)
    return make("or", make("and", test, left), make("and", make("not", test), right))


def _triangle(reader: MaskReader, node: Node, index: Index) -> Expr:
    _plain(node, "diagonal")
    diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    ahead = make("sub", index[-1], index[-2])
    kept = make("ge" if operation(node) == "triu" else "le", ahead, reader.scalar(diagonal))
    boolean = _is_bool(node)
    value = reader.operand(node.args[0], index)
    return _select(kept, value, const(False) if boolean else ZERO, boolean)


def _source(node: Node) -> Node:
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(node_value(source), torch.Tensor):
        raise UnreadableError(f"{node.name} does not read a tensor")
    return source


def _reshape(reader: MaskReader, node: Node, index: Index) -> Expr:
    source = _source(node)
    shape = reader.shape(node)
    kept = [(size, at) for size, at in zip(shape, index, strict=True) if size != 1]
    given = [size for size in reader.shape(source) if size != 1]
    if [size for size, _ in kept] != given or node_value(source).dtype != node_value(node).dtype:
        raise UnreadableError(f"{node.name} regroups elements")
    order = iter(at for _, at in kept)
    at = tuple(ZERO if size == 1 else next(order) for size in reader.shape(source))
    return reader.element(source, at)


def _expand(reader: MaskReader, node: Node, index: Index) -> Expr:
    source = _source(node)
    return reader.element(source, reader.broadcast(source, index))


def _permute(reader: MaskReader, node: Node, index: Index) -> Expr:
    source = _source(node)
    args: tuple[Any, ...] = node.args[1:]
    _plain(node)
    dims = list(range(len(index)))
    given = list(args[0]) if args and isinstance(args[0], (tuple, list)) else list(args)
    if operation(node) == "permute":
        dims = [dims[dim] for dim in given]
    else:
        first, second = given
        dims[first], dims[second] = dims[second], dims[first]
    return reader.element(source, tuple(index[dims.index(dim)] for dim in range(len(dims))))


def _slice_index(reader: MaskReader, key: slice, at: Expr, sizes: tuple[Any, Any]) -> Expr:
    """The index before slicing; ``sizes`` are those of the dimension before and after."""
    step = 1 if key.step is None else key.step
    start = ZERO if key.start is None else reader.scalar(key.start)
    if not reader.nonnegative(start):
        if key.stop is not None or step != 1:
            raise UnreadableError(f"slice {key} counts from the end")
        start = to_expr(sympy.expand(sizes[0] - sizes[1]))
    steps = at if step == 1 else make("mul", at, reader.scalar(step))
    return make("add", steps, start)


def _getitem(reader: MaskReader, node: Node, index: Index) -> Expr:
    key: Any = node.args[1]
    return _indexed(reader, node, index, list(key) if isinstance(key, tuple) else [key])


def _index(reader: MaskReader, node: Node, index: Index) -> Expr:
    """``aten.index``, which indexing becomes under vmap; there None is a whole dimension."""
    keys: Any = node.args[1]
    return _indexed(reader, node, index, [slice(None) if k is None else k for k in keys])


def _indexed(reader: MaskReader, node: Node, index: Index, keys: list[Any]) -> Expr:
    source = _source(node)
    shape, shape_after = reader.shape(source), reader.shape(node)
    missing = len(shape) - sum(k is not None and k is not Ellipsis for k in keys)
    gap = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    keys[gap : gap + 1] = [slice(None)] * missing
    tensors = [k for k in keys if _is_tensor(k)]
    kept = [k for k in keys if k is None or isinstance(k, slice) or _is_tensor(k)]
    spots = [i for i, k in enumerate(kept) if _is_tensor(k)]
    rank = max((node_value(k).dim() for k in tensors), default=0)
    # Torch puts the dimensions of index tensors first where something else stands between them.
    in_front = bool(spots) and spots[-1] - spots[0] >= len(spots)
    joint = slice(0, rank) if in_front else None
    cursor = rank if in_front else 0
    before: list[Expr] = []
    wraps = False
    for k in keys:
        if k is None:
            cursor += 1
        elif isinstance(k, slice):
            sizes = (shape[len(before)], shape_after[cursor])
            before.append(_slice_index(reader, k, index[cursor], sizes))
            cursor += 1
        elif _is_tensor(k):
            if node_value(k).dtype not in _EXACT_INTEGERS:
                raise UnreadableError(f"{node.name} is indexed by {node_value(k).dtype}")
            if joint is None:
                joint = slice(cursor, cursor + rank)
                cursor += rank
            before.append(reader.operand(k, index[joint]))
            wraps = wraps or not reader.nonnegative(before[-1])
        else:
            at = reader.scalar(k)
            if not reader.nonnegative(at):
                at = to_expr(shape[len(before)] + symbolic(k))
            before.append(at)
    return (reader.load if wraps else reader.element)(source, tuple(before))


def _enter_vmap(reader: MaskReader, node: Node, index: Index) -> Expr:
    """``_add_batch_dim(source, dim, level)`` hides a dimension of the source."""
    _, dim, level = node.args
    assert isinstance(dim, int) and isinstance(level, int)
    if level not in reader.batched_at:
        raise UnreadableError(f"{node.name} is read outside its vmap")
    at = dim % (len(index) + 1)
    return reader.element(_source(node), (*index[:at], reader.batched_at[level], *index[at:]))


def _leave_vmap(reader: MaskReader, node: Node, index: Index) -> Expr:
    """``_remove_batch_dim(source, level, size, dim)`` shows it again."""
    _, level, _, dim = node.args
    assert isinstance(dim, int) and isinstance(level, int)
    at = dim % len(index)
    around = dict(reader.batched_at)
    reader.batched_at[level] = index[at]
    try:
        return reader.element(_source(node), (*index[:at], *index[at + 1 :]))
    finally:
        reader.batched_at = around


def _is_tensor(key: Any) -> TypeGuard[Node]:
    return isinstance(key, Node) and isinstance(node_value(key), torch.Tensor)


_READERS: dict[str, Callable[[MaskReader, Node, Index], Expr]] = {
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys((*LOGICAL, *INVERT), _logical),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys((*CONSTANTS, *FULLS), _fill),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(EXPANDS, _expand),
    **dict.fromkeys(("transpose", "swapaxes", "permute"), _permute),
    **dict.fromkeys(("where", "masked_fill"), _where),
    **dict.fromkeys(("triu", "tril"), _triangle),
    "arange": _arange,
    "getitem": _getitem,
    "_add_batch_dim": _enter_vmap,
    "_remove_batch_dim": _leave_vmap,
}
