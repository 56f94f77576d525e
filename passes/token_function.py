"""Prove that K and V of an attention are computed from the cached rows token by token.

Read are the operations between a cache update and the attention. Each must keep the tokens apart:
where the token dimension lies is followed from the update on, and an operation that could mix
tokens, or that this file does not know, is refused. The result is the same operations over any
number of rows, so that a KV block can be expanded when it is attended.

Legend: S all tokens, t the token dimension of a tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from headinfer_compile.passes.cached_kv import (
    CachedKV,
    UnsupportedError,
    cached_kv,
    is_update,
    through_transpose,
)
from headinfer_compile.passes.graph_utils import node_value, operation, written
from headinfer_compile.runtime.expand import TokenFunction

_POINTWISE = (
    *("add", "sub", "mul", "truediv", "div", "neg", "pow", "sqrt", "rsqrt", "abs", "exp", "tanh"),
    *("sigmoid", "silu", "gelu", "relu", "to", "float", "half", "bfloat16", "type", "type_as"),
    *("contiguous", "clone", "copy_"),
)
_VIEWS = ("view", "reshape")
_NEW = ("new_empty", "new_zeros", "new_ones")


def read_kv(key: object, value: object, *, heads_dim: int = 1) -> CachedKV:
    """Read K and V of an attention, ``[B, H, S, D]`` or, with ``heads_dim=2``, ``[B, S, H, D]``.

    Raises:
        UnsupportedError: They are neither K and V of one cache update nor computed of one cached
            head token by token.
    """
    nodes: set[Node] = set()
    if heads_dim == 2:
        key, value = through_transpose(key, nodes), through_transpose(value, nodes)
    try:
        found = cached_kv(key, value)
    except UnsupportedError:
        if not (isinstance(key, Node) and isinstance(value, Node) and _is_one_head(key)):
            raise
        found = token_function(key, value)
    found.nodes |= nodes
    return found


def _is_one_head(key: Node) -> bool:
    updates = {node for node in _ancestors(key) if is_update(node)}
    return any(node_value(update.args[1]).shape[1] == 1 for update in updates)  # type: ignore[arg-type]


def token_function(key: Node, value: Node) -> CachedKV:
    """Read K and V, ``[B, H, S, D]``, as a function of one cached head.

    Raises:
        UnsupportedError: They are not computed token by token from one update.
    """
    reading = _Reading(key, value)
    return CachedKV(reading.update, reading.nodes, reading.function(key, value), reading.inputs)


class _Reading:
    """The operations between one update and K and V, with the token dimension of each."""

    def __init__(self, key: Node, value: Node) -> None:
        self.inputs: list[Node] = []
        updates = {node for node in _ancestors(key, value) if is_update(node)}
        if len(updates) != 1:
            raise UnsupportedError("its K or V is not the output of a HeadInferCache update")
        (self.update,) = updates
        if node_value(self.update.args[1]).shape[1] != 1:  # type: ignore[arg-type]
            raise UnsupportedError("its K or V is computed from more than one cached head")
        depends = _descendants(self.update)
        self.nodes = _between(key, value, depends)
        if not {key, value} <= self.nodes:
            raise UnsupportedError("its K or V is made elsewhere and only filled with cached rows")
        self.total = node_value(self._kv_nodes()[0]).shape[2]
        self.dims: dict[Node, int] = {}
        self.order = [node for node in self.update.graph.nodes if node in self.nodes]
        for node in self.order:
            self.dims[node] = self._token_dim(node)
        for node, what in ((key, "K"), (value, "V")):
            if self.dims[node] != 2:
                raise UnsupportedError(f"{what} has its tokens in dimension {self.dims[node]}")

    def _kv_nodes(self) -> list[Node]:
        return [n for n in self.nodes if n.target is operator.getitem and n.args[0] is self.update]

    # -- where the tokens are ---------------------------------------------------------------

    def _token_dim(self, node: Node) -> int:
        """The token dimension of ``node``; of each of its parts, if it is a tuple."""
        if node.target is operator.getitem and node.args[0] is self.update:
            return 2
        name = operation(node)
        rule = _RULES.get(name) or (_pointwise if name in _POINTWISE else None)
        if rule is None:
            raise UnsupportedError(f"{node.name} ({name or node.target}) may mix cached tokens")
        dim = rule(self, node)
        value = node_value(node)
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if not statically_known_true(part.shape[dim] == self.total):
                raise UnsupportedError(f"{node.name} does not keep the tokens in one dimension")
        return dim

    def source(self, node: Node) -> tuple[Node, int]:
        """The first operand, which must hold tokens, and their dimension."""
        first = node.args[0]
        if not isinstance(first, Node) or first not in self.dims:
            raise UnsupportedError(f"{node.name} takes cached rows as no first argument")
        return first, self.dims[first]

    def only_source(self, node: Node) -> tuple[Node, int]:
        """As ``source``, where no other operand may hold tokens."""
        first, dim = self.source(node)
        if any(arg in self.dims for arg in node.all_input_nodes if arg is not first):
            raise UnsupportedError(f"{node.name} reads cached rows more than once")
        return first, dim

    # -- the same operations over any number of rows ----------------------------------------

    def function(self, key: Node, value: Node) -> TokenFunction:
        """The operations as a function of cached K, cached V, the number of rows, and inputs."""
        graph = Graph()
        k, v, rows = (graph.placeholder(name) for name in ("k", "v", "rows"))
        # Not the model's: batch rows may share what is cached.
        batch = graph.call_method("size", (k, 0))
        outer: dict[Node, Node] = {}
        copies: dict[Node, Node] = {}

        def copied(arg: Node) -> Any:
            if arg in copies or arg is rows:
                return copies.get(arg, rows)
            held = node_value(arg)
            if not isinstance(held, torch.Tensor):
                return self._size(held, rows, batch)
            if arg not in outer:
                self.inputs.append(arg)
                with graph.inserting_after(list(outer.values())[-1] if outer else rows):
                    outer[arg] = graph.placeholder(f"input_{len(outer)}")
            return outer[arg]

        for number, node in enumerate(self.order):
            if node.target is operator.getitem and node.args[0] is self.update:
                copies[node] = (k, v)[node.args[1]]
                continue
            args = self._with_rows(node, rows)
            args = torch.fx.map_arg(args, copied)
            kwargs = torch.fx.map_arg(node.kwargs, copied)
            name = f"step_{number}"
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=name)
        graph.output((copies[key], copies[value]))
        if not batch.users:
            graph.erase_node(batch)
        graph.lint()
        module = GraphModule(torch.nn.Module(), graph)
        places = tuple(range(len(self.inputs)))
        heads = node_value(key).shape[1]
        if not isinstance(heads, int) or node_value(value).shape[1] != heads:
            raise UnsupportedError("K and V are expanded to different or symbolic heads")
        return TokenFunction(module.code, places, heads, module.forward)

    def _size(self, value: Any, rows: Node, batch: Node) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        if statically_known_true(value == self.total):
            return rows
        if not statically_known_true(value == node_value(self._kv_nodes()[0]).shape[0]):
            raise UnsupportedError(f"its K or V depends on the size {value}")
        return batch

    def _with_rows(self, node: Node, rows: Node) -> tuple[Any, ...]:
        """The arguments of ``node``, with the size of the token dimension a variable."""
        name = operation(node)
        if name not in (*_VIEWS, *_NEW, "expand"):
            return node.args
        nested = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
        sizes: list[Any] = list(node.args[1] if nested else node.args[1:])  # type: ignore[arg-type]
        if sizes[self.dims[node]] != -1:
            sizes[self.dims[node]] = rows
        return (node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)


def _ancestors(*nodes: Node) -> set[Node]:
    """Everything that ``nodes`` are computed from, up to cache updates and attentions."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not is_update(node) and node.target is not torch.ops.headinfer.attention.default:
            stack.extend(_operands(node))
    return seen


def _operands(node: Node) -> list[Node]:
    """The inputs of ``node``, and what writes to it or to a view of it in place."""
    found = list(node.all_input_nodes)
    views = [node]
    for view in views:
        for user in view.users:
            if view in written(user):
                found.append(user)
            elif operation(user) in ("getitem", *_VIEWS, "transpose") and user.args[0] is view:
                views.append(user)
    return found


def _descendants(update: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = list(update.users)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def _between(key: Node, value: Node, depends: set[Node]) -> set[Node]:
    """The nodes that K and V are made of and that hold, or are made for, cached rows."""
    seen: set[Node] = set()
    stack = [key, value]
    while stack:
        node = stack.pop()
        if node in seen or node not in depends:
            continue
        seen.add(node)
        stack.extend(_operands(node))
    return seen


# -- rules: the token dimension of a result -------------------------------------------------


def _pointwise(reading: _Reading, node: Node) -> int:
    """All operands that hold tokens hold them in one dimension, counted from the last."""
    value = node_value(node)
    found: set[int] = set()
    for arg in node.all_input_nodes:
        held = node_value(arg)
        if not isinstance(held, torch.Tensor):
            continue
        if arg in reading.dims:
            found.add(reading.dims[arg] - held.dim())
    if len(found) != 1:
        raise UnsupportedError(f"{node.name} combines cached tokens of different dimensions")
    (dim,) = found
    for arg in node.all_input_nodes:
        held = node_value(arg)
        if isinstance(held, torch.Tensor) and arg not in reading.dims and held.dim() >= -dim:
            if not statically_known_true(held.shape[dim] == 1):
                raise UnsupportedError(f"{node.name} depends on the positions of cached tokens")
    return int(dim + value.dim())


def _linear(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    if dim == node_value(source).dim() - 1:
        raise UnsupportedError(f"{node.name} mixes cached tokens")
    return dim


def _view(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    before = math.prod(node_value(source).shape[:dim])
    for place, size in enumerate(node_value(node).shape):
        ahead = math.prod(node_value(node).shape[:place])
        if statically_known_true(size == reading.total) and statically_known_true(ahead == before):
            return place
    raise UnsupportedError(f"{node.name} regroups cached tokens")


def _transpose(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    rank: int = node_value(source).dim()
    first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    return {first: second, second: first}.get(dim, dim)


def _permute(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    rank: int = node_value(source).dim()
    given: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return [int(d) % rank for d in given].index(dim)


def _split(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    along: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if int(along) % node_value(source).dim() == dim:
        raise UnsupportedError(f"{node.name} cuts between cached tokens")
    return dim


def _getitem(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    value = node_value(source)
    key = node.args[1]
    if not isinstance(value, torch.Tensor):
        return dim
    keys: list[Any] = list(key) if isinstance(key, (tuple, list)) else [key]
    if any(not (k is None or k is Ellipsis or isinstance(k, (int, slice))) for k in keys):
        raise UnsupportedError(f"{node.name} gathers cached tokens")
    missing = value.dim() - sum(k is not None and k is not Ellipsis for k in keys)
    gap = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[gap : gap + 1] = [slice(None)] * missing
    before = after = 0
    for k in keys:
        if k is None:
            after += 1
            continue
        if before == dim:
            if k != slice(None, None, None):
                raise UnsupportedError(f"{node.name} takes some of the cached tokens")
            return after
        before += 1
        after += isinstance(k, slice)
    raise UnsupportedError(f"{node.name} takes some of the cached tokens")


def _expand(reading: _Reading, node: Node) -> int:
    source, dim = reading.only_source(node)
    return int(dim - node_value(source).dim() + node_value(node).dim())


def _cat(reading: _Reading, node: Node) -> int:
    parts: Any = node.args[0]
    along: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    dims = {reading.dims.get(part) for part in parts}
    if len(dims) != 1 or None in dims:
        raise UnsupportedError(f"{node.name} joins cached rows with something else")
    (dim,) = dims
    assert dim is not None
    if int(along) % node_value(node).dim() == dim:
        raise UnsupportedError(f"{node.name} joins cached tokens")
    return dim


def _new(reading: _Reading, node: Node) -> int:
    sizes: Sequence[Any] = node_value(node).shape
    found = [i for i, size in enumerate(sizes) if statically_known_true(size == reading.total)]
    if len(found) != 1:
        raise UnsupportedError(f"the token dimension of {node.name} is not known")
    return found[0]


_RULES: dict[str, Callable[[_Reading, Node], int]] = {
    "linear": _linear,
    **dict.fromkeys((*_VIEWS, "squeeze", "unsqueeze", "flatten"), _view),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("split", "chunk", "unsafe_split"), _split),
    "getitem": _getitem,
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(_NEW, _new),
}
