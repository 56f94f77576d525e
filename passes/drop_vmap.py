"""Remove what only served masks under ``torch.vmap`` that no one reads any more.

Dead code elimination keeps a traced vmap: its nodes come and go in pairs that have no result, and
inside it tensors may be written in place. ``create_block_mask`` is such a trace, with a mask of the
size new x all tokens in it.

Given::

    i = torch.arange(n)
    torch._functorch.predispatch._vmap_increment_nesting(n, "error")
    i_1 = torch._functorch.predispatch._add_batch_dim(i, 0, 1)
    ...
    mask = torch._functorch.predispatch._remove_batch_dim(le, 1, n, 0)
    torch._functorch.predispatch._vmap_decrement_nesting()
    blocks = mask.new_zeros(n);  blocks[i] = 1

Result: nothing of it, if no output, site or other effect depends on ``blocks``.

Requires: ``recover_mask`` has run, so that sites have no masks.
Ensures: a vmap is entered and left around what is left of it. A write stays wherever anything that
stays may see it, and always if the tensor was not made in the graph.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import in_vmap_machinery, operation, written
from headinfer_compile.passes.mask_operations import FILLS

_VIEWS = (
    *("getitem", "view", "reshape", "unsqueeze", "squeeze", "expand", "transpose", "permute"),
    *("_add_batch_dim", "_remove_batch_dim", "detach"),
)


def run(gm: GraphModule, ctx: PassContext) -> GraphModule:
    """Remove dead vmaps from ``gm``; a graph without vmap is left as it is.

    Args:
        gm: A graph with sites; changed in place.
        ctx: Not read.

    Returns:
        ``gm``.
    """
    if not any(in_vmap_machinery(node) for node in gm.graph.nodes):
        return gm
    live = _live(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if node not in live:
            gm.graph.erase_node(node)
    return gm


def _live(graph: Graph) -> set[Node]:
    """The nodes that an output or an effect needs, with the vmaps that they are in."""
    writes: dict[Node, list[Node]] = {}
    roots: list[Node] = []
    for node in graph.nodes:
        targets = [_base(arg) for arg in written(node) if isinstance(arg, Node)]
        if targets and all(operation(base) in FILLS for base in targets):
            for base in targets:
                writes.setdefault(base, []).append(node)
        elif not in_vmap_machinery(node) and (node.is_impure() or targets):
            roots.append(node)
    enclosing = _enclosing(graph)
    live: set[Node] = set()
    while roots:
        node = roots.pop()
        if node not in live:
            live.add(node)
            roots += node.all_input_nodes
            roots += writes.get(node, ())
            roots += enclosing[node]
    return live


def _base(node: Node) -> Node:
    """What ``node`` is a view of."""
    while operation(node) in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _enclosing(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """The nodes that set up and end the vmaps around each node."""
    found: dict[Node, tuple[Node, ...]] = {}
    open_pairs: list[tuple[Node, list[Node]]] = []
    loads: list[Node] = []
    for node in graph.nodes:
        name = operation(node)
        if name == "lazy_load_decompositions":
            loads.append(node)
        elif name == "_vmap_increment_nesting":
            open_pairs.append((node, []))
        elif name == "_vmap_decrement_nesting":
            start, inside = open_pairs.pop()
            for held in inside:
                found[held] = (*found.get(held, ()), start, node, *loads)
            for pair in open_pairs[-1:]:
                pair[1].extend((*inside, start, node))
            continue
        if open_pairs and name not in ("_vmap_increment_nesting", "lazy_load_decompositions"):
            open_pairs[-1][1].append(node)
    return {node: found.get(node, ()) for node in graph.nodes}
