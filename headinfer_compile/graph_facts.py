"""What the planner knows of a model, read from one Dynamo graph of it, as the backend has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from headinfer_compile.activations import activation_model, op_name, sizes_of
from headinfer_compile.model_facts import Footprint, ModelFacts
from headinfer_compile.passes.context import META
from headinfer_compile.passes.graph_utils import node_value

_LEFT_OPERAND = {
    "linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "grouped_mm": 0,
    "grouped_mm_fallback": 0,
}  # fmt: skip
"""Matrix products, and which of their inputs has the rows."""


def graph_facts(
    split: GraphModule,
    example_inputs: Sequence[Any],
    attentions: Sequence[Node],
) -> ModelFacts:
    """The facts of a model at the sizes that a graph of it is compiled with.

    A product of fewer rows than there are new tokens counts as one of the output head. Of experts
    all weights are taken to be read. Activations are those of regions that Inductor compiles, as in
    a plan: other lowerings are for debugging.

    Args:
        split: The graph that ``partition`` made, before its regions are lowered.
        example_inputs: Its inputs.
        attentions: Its sites, in order; at least one.
    """
    sizes = sizes_of(split, example_inputs)
    sites = [node.meta[META] for node in attentions]
    k = node_value(attentions[0].args[2])  # type: ignore[arg-type]
    batch, heads, new = (_value(_expr(size), sizes) for size in k.shape[:3])
    tokens = batch * new
    products, by_rows = _products(split)
    matrices = head = 0.0
    for (rows, elements), count in products.items():
        times = _value(rows, sizes)
        work = count * times * _value(elements, sizes)
        if times >= tokens:
            matrices += work / tokens
        else:
            head += work / batch
    weights = {
        id(value): (index, value.nbytes)
        for index, value in enumerate(example_inputs)
        if isinstance(value, torch.nn.Parameter)
    }
    total = sum(nbytes for _, nbytes in weights.values())
    found, site = activation_model(split).evaluate(sizes), sites[0]
    return ModelFacts(
        name="compiled graph",
        windows=tuple(item.mask.window for item in sites),
        num_heads=site.num_heads,
        num_kv_heads=heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        row_elements=site.head_dim + site.v_head_dim,
        hidden=0,
        vocab=0,
        itemsize=k.dtype.itemsize,
        weight_bytes=total,
        layer_weight_bytes=total,
        end_weight_bytes=0,
        read_bytes=total - sum(size for i, size in weights.values() if i in by_rows),
        matrix_elements=round(matrices),
        head_elements=round(head),
        footprint=Footprint(
            region=found.region_bytes / tokens,
            site=found.site_bytes / tokens,
            elementwise=found.elementwise_bytes / tokens,
            traced=True,
        ),
        max_positions=None,
    )


def _products(
    split: GraphModule,
) -> tuple[Counter[tuple[sympy.Expr, sympy.Expr]], frozenset[int]]:
    """The matrix products of all regions, and the inputs that are read by rows only.

    Of the products: how many there are of each number of rows, and of elements that a row is
    multiplied with.
    """
    products: Counter[tuple[sympy.Expr, sympy.Expr]] = Counter()
    by_rows: set[Node] = set()
    multiplied: set[Node] = set()
    for call in split.graph.nodes:
        module = split.get_submodule(str(call.target)) if call.op == "call_module" else None
        if not isinstance(module, GraphModule):
            continue
        inner = [node for node in module.graph.nodes if node.op == "placeholder"]
        outer = dict(zip(inner, call.all_input_nodes, strict=True))
        for node in module.graph.nodes:
            name = op_name(node)
            if node.op not in ("call_function", "call_method"):
                continue
            read = [outer[source] for source in node.all_input_nodes if source in outer]
            if name == "embedding":
                by_rows.update(read)
            elif name in _LEFT_OPERAND:
                multiplied.update(read)
                left = node_value(node.all_input_nodes[_LEFT_OPERAND[name]])
                *rows, width = map(_expr, node_value(node).shape)
                products[sympy.Mul(*rows), width * _expr(left.shape[-1])] += 1
    inputs = [node for node in split.graph.nodes if node.op == "placeholder"]
    only = by_rows - multiplied
    return products, frozenset(i for i, node in enumerate(inputs) if node in only)


def _expr(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _value(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(expression.xreplace({s: sympy.Integer(n) for s, n in sizes.items()}))
