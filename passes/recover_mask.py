"""Prove the form of every attention mask from the index arithmetic that computes it.

Legend: B batch, Hq query heads, Hkv KV heads, n new tokens, P tokens already in the cache.

Given::

    i: "i64[n]" = torch.arange(n);  i_1: "i64[n]" = i + P
    j: "i64[P + n]" = torch.arange(P + n)
    le: "b8[1, 1, n, P + n]" = j[None, None, None, :] <= i_1[None, None, :, None]
    to: "b8[B, P + n]" = padding.to(torch.bool)
    mask: "b8[B, 1, n, P + n]" = le & to[rows, j]
    out = headinfer.attention(handle, q, k, v, mask, [], layer, P, scale, False)

Result::

    out = headinfer.attention(handle, q, k, v, None, [padding], layer, P, scale, False)
    # meta: MaskForm("kv <= q + past and m0[b, kv]")

Requires: site nodes from ``find_attention``; every node carries its fake value; in ``padding``
there is one row, or one per batch row.

Ensures: no site has a mask node, and its form says exactly what the mask said (of rows that see
some key): conjunctions of causal, sliding and padding terms by name, any other index arithmetic,
and masks that the caller passed, as an expression that is evaluated per block. Nodes that only
served a mask have no users left.

Declines when: a mask of the size new x all tokens is made by anything but index arithmetic, or is
written in place. The model then makes it in full, and its blocks are read from it.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.context import META, AttentionSite, PassContext
from headinfer_compile.passes.graph_utils import node_value, written
from headinfer_compile.passes.mask_algebra import (
    Domain,
    UnreadableError,
    prove,
    sees_itself,
    uncast,
)
from headinfer_compile.passes.mask_reader import MaskReader, symbolic
from headinfer_compile.runtime.masks import AXES, Expr, MaskForm, describe, load, make

log = logging.getLogger(__name__)

# Positions in the arguments of headinfer.attention.
_QUERY, _MASK, _INPUTS, _PAST = 1, 4, 5, 7


def run(gm: GraphModule, ctx: PassContext) -> GraphModule:
    """Give each attention site the form of its mask and drop the mask itself.

    Args:
        gm: A graph with site nodes; changed in place.
        ctx: Its sites are replaced by records with a form.

    Returns:
        ``gm``.

    Raises:
        DeclinedError: A mask cannot be read and ``config.strict`` is set.
    """
    read: dict[tuple[object, ...], _Recovered] = {}
    for node in gm.graph.nodes:
        site = node.meta.get(META)
        if not isinstance(site, AttentionSite):
            continue
        mask = node.args[_MASK]
        assert mask is None or isinstance(mask, Node)
        query = node.args[_QUERY]
        assert isinstance(query, Node)
        new = symbolic(node_value(query).shape[2])
        domain = Domain.of(_scalar(node.args[_PAST]), new)
        held = node.args[_INPUTS]
        assert isinstance(held, (list, tuple))
        key = (mask, site.is_causal, site.bottom_right, site.window, len(held), domain)
        try:
            if key not in read:
                read[key] = _recover(gm.graph, query, mask, site, domain, len(held))
        except UnreadableError as reason:
            assert mask is not None
            ctx.decline(node, f"{reason}: this mask is made in full and read block by block")
            read[key] = _whole(mask, domain, len(held))
        form, inputs = read[key]
        node.update_arg(_MASK, None)
        node.update_arg(_INPUTS, [*held, *inputs])
        node.meta[META] = dataclasses.replace(site, mask=form)
        ctx.sites = [node.meta[META] if s.index == site.index else s for s in ctx.sites]
        log.debug("site %d: %s", site.index, form.formula)
    return gm


_Recovered = tuple[MaskForm, tuple[Node, ...]]


def _scalar(arg: object) -> sympy.Expr:
    value = node_value(arg) if isinstance(arg, Node) else arg
    assert isinstance(value, (int, torch.SymInt)), arg
    return symbolic(value)


def _recover(
    graph: Graph, query: Node, mask: Node | None, site: AttentionSite, domain: Domain, held: int
) -> _Recovered:
    """The form of a site's mask and the tensors that it reads, ``held`` of the site's before."""
    if mask is None:
        if site.is_causal and domain.past != 0 and not site.bottom_right:
            # Torch aligns it to the first key.
            seen = make("le", Expr("kv"), Expr("q"))
            return MaskForm(expr=seen, formula=str(seen)), ()
        causal = site.is_causal or domain.new == 1
        window = site.window
        return MaskForm(causal, window, formula=describe(causal, window, None)), ()
    if site.is_causal or site.window is not None:
        raise UnreadableError("it has both a mask and is_causal or a window")
    reader = MaskReader(domain)
    expr = reader.element(mask, _index(reader, mask))
    if _is_mutated(graph, reader.visited):
        raise UnreadableError("a tensor of the mask is written in place")
    batch = symbolic(node_value(query).shape[0])
    single = [batch == 1 or reader.shape(node)[:1] == (1,) for node in reader.inputs]
    dtype = node_value(mask).dtype
    form = MaskForm(expr=expr, formula=str(expr))
    if dtype == torch.bool:
        form = prove(expr, domain, single)
    elif (choice := _additive_choice(expr)) is not None:
        visible, hidden = choice
        proved = prove(visible, domain, single)
        # A finite bias hides nothing from a row that is biased throughout. Where every query sees
        # itself, that is a padding token before the first valid one: it gets zeros, as from SDPA,
        # and no one sees it; the model's own softmax gives it the mean of all V.
        lowest = hidden <= torch.finfo(dtype).min
        if hidden == -math.inf or (lowest and sees_itself(visible, domain, single)):
            form = proved
    return _number_inputs(form, reader.inputs, held)


def _whole(mask: Node, domain: Domain, held: int) -> _Recovered:
    """The form of a mask that is read, block by block, from the tensor that holds it."""
    expr = load(held, _index(MaskReader(domain), mask))
    return MaskForm(expr=expr, formula=str(expr)), (mask,)


def _is_mutated(graph: Graph, nodes: set[Node]) -> bool:
    """Whether an in-place operation of the graph may write to one of ``nodes``, or to a view."""
    for node in graph.nodes:
        for base in written(node):
            while isinstance(base, Node):
                if base in nodes:
                    return True
                base = base.args[0] if base.args else None
    return False


def _index(reader: MaskReader, mask: Node) -> tuple[Expr, ...]:
    """The index of a mask's element (b, h, q, kv), with 0 in the dimensions that broadcast."""
    shape = reader.shape(mask)
    lengths = (reader.domain.new, reader.domain.total)
    for size, length in zip(reversed(shape), reversed(lengths), strict=False):
        # A size in other symbols is left to SDPA's own contract: it is 1 or the length.
        if size != 1 and (size - length).is_number and size != length:
            raise UnreadableError(f"a mask of shape {list(shape)} for [n, kv] = {list(lengths)}")
    if len(shape) > len(AXES):
        raise UnreadableError(f"a mask of {len(shape)} dimensions")
    axes = tuple(Expr(axis) for axis in AXES[len(AXES) - len(shape) :])
    return reader.broadcast(mask, axes)


def _additive_choice(expr: Expr) -> tuple[Expr, float] | None:
    """Split an additive mask that is 0 or one negative number: where it is 0, and the number."""
    expr = uncast(expr)
    if expr.op != "where":
        return None
    test, *choices = expr.args
    numbers = [uncast(choice) for choice in choices]
    if any(number.op != "const" for number in numbers):
        return None
    values = [float(number.args[0]) for number in numbers]
    if values[0] == 0 > values[1]:
        return test, values[1]
    return (make("not", test), values[0]) if values[1] == 0 > values[0] else None


def _number_inputs(form: MaskForm, nodes: list[Node], held: int) -> _Recovered:
    """Keep the mask inputs that the form reads, and number them in order from ``held``."""
    if form.expr is None:
        if form.padding is None:
            return form, ()
        formula = describe(form.causal, form.window, held)
        return dataclasses.replace(form, padding=held, formula=formula), (nodes[form.padding],)
    parts = list(form.expr.walk())
    used = sorted({part.args[0] for part in parts if part.op == "load"})
    indexed = {index for part in parts if part.op == "load" for index in part.args[1:]}
    for axis in (Expr("b"), Expr("h")):
        if axis in parts and axis not in indexed:
            raise UnreadableError(f"it depends on {axis} other than through a tensor")
    expr = _renumber(form.expr, {number: place for place, number in enumerate(used, held)})
    inputs = tuple(nodes[number] for number in used)
    return dataclasses.replace(form, expr=expr, formula=str(expr)), inputs


def _renumber(expr: Expr, places: dict[int, int]) -> Expr:
    args = tuple(_renumber(arg, places) if isinstance(arg, Expr) else arg for arg in expr.args)
    return Expr(expr.op, (places[expr.args[0]], *args[1:]) if expr.op == "load" else args)
