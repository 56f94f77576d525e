"""Breaks schedules in every small way there is, and tells which of the results mean the same.

``mutants`` changes a graph in place, yields, and changes it back. ``meaning`` is what two schedules
must have in common to be equivalent; it is computed from sets of predecessors and shares no code
with the verifier.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.schedule import PlanKey
from headinfer_compile.runtime.ops import STREAMS
from headinfer_compile.runtime.sizes import STAGING_SLOTS

#: Arguments that are tokens, by op.
_TOKENS = {"prefetch": 7, "wait": 1, "release": 1, "offload": 2, "tail": 2, "resident": 5,
           "wait_host": 1}  # fmt: skip
_MAKES_TOKENS = ("prefetch", "release", "pack", "offload", "attend_host")
_APPEND = -1


@dataclass(frozen=True)
class Mutant:
    """One change; the graph it was made in holds it only until the next one is asked for."""

    kind: str
    what: str
    graph_module: GraphModule


def opname(node: Node) -> str:
    """Name of a ``headinfer`` op, or ``""``."""
    return getattr(node.target, "_opname", "") if node.op == "call_function" else ""


def copy_of(gm: GraphModule) -> GraphModule:
    """A schedule with nodes of its own."""
    graph = Graph()
    known: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
    return GraphModule(torch.nn.Module(), graph)


def mutants(source: GraphModule, key: PlanKey) -> Iterator[Mutant]:
    """Every mutant of a schedule, one at a time, in a copy of it."""
    gm = copy_of(source)
    nodes = list(gm.graph.nodes)
    ops = [node for node in nodes if opname(node)]
    yield from _moved(gm, nodes)
    yield from _changed(gm, nodes, ops, key)
    yield from _duplicated(gm, ops)
    yield from _early(gm, ops)
    yield from _shrunk(gm, ops, key)
    for index in range(len(ops)):
        yield from _dropped(source, index)


def _moved(gm: GraphModule, nodes: list[Node]) -> Iterator[Mutant]:
    inner = [node for node in nodes if node.op == "call_function"]
    for first, second in pairwise(inner):
        second.append(first)
        yield Mutant("swap", f"{first} and {second}", gm)
        second.prepend(first)
    for at, node in enumerate(inner):
        if opname(node) not in ("prefetch", "release", "offload", "pack", "wait"):
            continue
        for distance in (2, 4, 8, 16, len(inner)):
            for target in (at - distance, at + distance):
                place = inner[max(0, min(target, len(inner) - 1))]
                if place is node:
                    continue
                (place.prepend if target < at else place.append)(node)
                yield Mutant("hoist" if target < at else "delay", f"{node} to {place}", gm)
                if at == 0:
                    inner[1].prepend(node)
                else:
                    inner[at - 1].append(node)


def _changed(gm: GraphModule, nodes: list[Node], ops: list[Node], key: PlanKey) -> Iterator[Mutant]:
    for node in [n for n in nodes if n.op in ("call_function", "output")]:
        before = node.args
        returned = before[0] if node.op == "output" else before
        assert isinstance(returned, tuple)
        for index, value in enumerate(returned):
            for kind, other in _alternatives(nodes, node, index, value, key):
                changed = (*returned[:index], other, *returned[index + 1 :])
                node.args = (changed,) if node.op == "output" else changed
                yield Mutant(kind, f"{node}, argument {index}: {value} -> {other}", gm)
        if node.op == "output":
            for index in range(1, len(returned) - 1):
                swapped = list(returned)
                swapped[index], swapped[index + 1] = swapped[index + 1], swapped[index]
                node.args = (tuple(swapped),)
                yield Mutant("swap ring outputs", f"{index} and {index + 1}", gm)
        node.args = before


def _alternatives(
    nodes: list[Node], node: Node, index: int, value: Any, key: PlanKey
) -> Iterator[tuple[str, Any]]:
    """Other values of one argument."""
    name = opname(node)
    if isinstance(value, bool):
        yield "flip", not value
    elif isinstance(value, int):
        kind = "item" if node.target is operator.getitem else "number"
        for other in {value - 1, value + 1, -value - 1, 0, value + key.num_slots} - {value}:
            yield kind, other
        if index == _TOKENS.get(name):
            yield from (("token", other) for other in nodes if opname(other) == "pack")
    elif value is None:
        yield from (("return", other) for other in nodes if other is not node)
    elif value.op == "placeholder" and not value.name.startswith("r"):
        inputs = [other for other in nodes if other.op == "placeholder"]
        yield from (("input", other) for other in inputs if other is not value)
    elif value.target is operator.getitem:
        items = [other for other in nodes if other.target is operator.getitem]
        yield from (("view", other) for other in items if other is not value)
    else:
        ring = [other for other in nodes if other.op == "placeholder" and other.name[1:].isdigit()]
        made = [other for other in nodes if opname(other) in (*_MAKES_TOKENS, "store", "output")]
        wanted = "return" if node.op == "output" else "token"
        yield from ((wanted, other) for other in [*ring, *made] if other is not value)


def _duplicated(gm: GraphModule, ops: list[Node]) -> Iterator[Mutant]:
    for node in ops:
        for where in ("before", "after"):
            inserting = gm.graph.inserting_before if where == "before" else gm.graph.inserting_after
            with inserting(node):
                twin = gm.graph.node_copy(node)
            yield Mutant("duplicate", f"{node}, {where} it", gm)
            gm.graph.erase_node(twin)


def _early(gm: GraphModule, ops: list[Node]) -> Iterator[Mutant]:
    """Give a slot up before its last reader; refill it before it is given up."""
    waits = {node.args[1]: node for node in ops if opname(node) == "wait"}
    for node in ops:
        before, following = node.args, node.next
        if opname(node) == "release" and before[1] in waits:
            items = waits[before[1]].users
            readers = [n for n in ops if opname(n) == "attend_merge" and n.args[4] in items]
            for reader in readers:
                reader.prepend(node)
                node.args = (*before[:2], reader.args[1])
                yield Mutant("release early", f"{node} before {reader}", gm)
        elif opname(node) == "prefetch" and isinstance(released := before[7], Node):
            held = released.args[1] if opname(released) == "release" else None
            if held in waits:
                waits[held].append(node)
                node.args = (*before[:7], held)
                yield Mutant("hoist too far", f"{node} before {released}", gm)
        node.args = before
        following.prepend(node)


def _shrunk(gm: GraphModule, ops: list[Node], key: PlanKey) -> Iterator[Mutant]:
    """Use one slot less than there are."""
    before = {node: node.args for node in ops if opname(node) == "prefetch"}
    if key.num_slots == 2:
        return
    for node, args in before.items():
        assert isinstance(args[6], int)
        node.args = (*args[:6], args[6] % key.num_slots % (key.num_slots - 1), *args[7:])
    if any(node.args[6] != args[6] % key.num_slots for node, args in before.items()):  # type: ignore[operator]
        yield Mutant("shrink the ring", f"to {key.num_slots - 1} slots", gm)
    for node, args in before.items():
        node.args = args


def _dropped(source: GraphModule, index: int) -> Iterator[Mutant]:
    """Drop an op; who used it gets each operand that could stand in its place."""
    count = len([n for n in source.graph.nodes if opname(n)][index].all_input_nodes)
    for operand in range(max(1, count)):
        gm = copy_of(source)
        node = [n for n in gm.graph.nodes if opname(n)][index]
        instead = node.all_input_nodes[operand] if count else None
        for user in list(node.users):
            if user.target is operator.getitem and instead is not None:
                # A result of the op gives way to an operand of it.
                user.replace_all_uses_with(instead)
                gm.graph.erase_node(user)
        if instead is not None:
            node.replace_all_uses_with(instead)
        if not node.users:
            gm.graph.erase_node(node)
            yield Mutant("drop", f"{node}, its users get {instead}", gm)


def meaning(gm: GraphModule, key: PlanKey) -> object:
    """What a schedule computes: two with equal meaning give bitwise equal results.

    It is the operations with their operands, expanded down to the inputs (the slot as a place in
    the ring; ``last`` of a release is left out, since nothing reads it), the returned values, for
    each two operations that access a slot or the tail, one of them writing, which comes first (by
    the order of a stream, by a chain of events, or neither), and the staged pieces that are
    overwritten before they are copied.
    """
    values: dict[Node, object] = {}
    seen: Counter[object] = Counter()
    order: list[Node] = []
    before: dict[Node, int] = {}
    last: dict[str, Node] = {}
    copied: dict[object, Node] = {}
    accesses: list[tuple[object, Node, bool]] = []
    staged: dict[Node, object] = {}
    output: object = None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = node.name
        elif node.op == "output":
            output = tuple(_value(values, item) for item in node.args[0])
        elif node.target is operator.getitem:
            values[node] = (_value(values, node.args[0]), node.args[1])
        else:
            name = opname(node)
            value = _op_value(values, node, name, key)
            seen[value] += 1
            values[node] = (value, seen[value])
            predecessors = [last[STREAMS[name]]] if STREAMS[name] in last else []
            predecessors += [other for other in node.all_input_nodes if other in before]
            used, waits = _accesses(node, name, key, staged, copied)
            accesses += used
            bits = 0
            for other in (*predecessors, *waits):
                bits |= before[other] | 1 << order.index(other)
            before[node] = bits
            order.append(node)
            last[STREAMS[name]] = node

    def ordered(first: Node, second: Node) -> bool:
        return bool(before[second] >> order.index(first) & 1)

    conflicts: set[object] = set()
    for at, (buffer, first, writes) in enumerate(accesses):
        for other_buffer, second, also in accesses[at + 1 :]:
            if buffer != other_buffer or first is second or not (writes or also):
                continue
            pair = values[first], values[second]
            if buffer in staged.values():
                # Staging buffers are alike: what counts is that a piece is copied before the next.
                if writes and also and not any(ordered(copy, second) for copy in _copies(first)):
                    conflicts.add(("overwritten", frozenset(pair)))
            else:
                conflicts.add((buffer, pair if ordered(first, second) else frozenset(pair)))
    used_values = {values[node] for node in order}
    return frozenset(used_values), output, frozenset(conflicts)


def _copies(pack: Node) -> list[Node]:
    return [user for user in pack.users if opname(user) == "offload"]


def _value(values: dict[Node, object], item: object) -> object:
    return values.get(item, f"not made yet: {item}") if isinstance(item, Node) else item


def _op_value(values: dict[Node, object], node: Node, name: str, key: PlanKey) -> object:
    arguments = [_value(values, item) for item in node.args]
    if name == "prefetch":
        assert isinstance(node.args[6], int)
        arguments[6] = node.args[6] % key.num_slots
    if name == "release":
        arguments.pop()
    return (name, *arguments)


def _accesses(
    node: Node, name: str, key: PlanKey, staged: dict[Node, object], copied: dict[object, Node]
) -> tuple[list[tuple[object, Node, bool]], list[Node]]:
    """``(buffer, op, writes)`` of an op, and ops whose events it waits for beside its tokens."""
    args = node.args
    if name == "prefetch":
        assert isinstance(args[6], int)
        return [(("slot", args[6] % key.num_slots), node, True)], []
    if name in ("attend", "attend_merge"):
        view = args[2 if name == "attend" else 4]
        source = view.args[0] if isinstance(view, Node) and view.args else None
        if isinstance(source, Node) and opname(source) == "tail":
            return [("tail", node, False)], []
        if isinstance(source, Node) and opname(source) == "wait":
            return [(("slot", _slot(source.args[1], key)), node, False)], []
        return [], []
    if name == "attend_resident":
        return [("tail", node, False)], []
    if name == "pack":
        piece = args[4]
        assert isinstance(piece, int)
        if piece == _APPEND:
            waits = [copied["tail"]] if "tail" in copied and not key.has_tail else []
            return [("tail", node, True)], waits
        if key.pieces[piece].source == "tail":
            return [("tail", node, False)], []
        if not key.pieces[piece].to_host:
            return [], []
        staged[node] = buffer = ("staging", len(staged) % STAGING_SLOTS)
        return [(buffer, node, True)], [copied[buffer]] if buffer in copied else []
    if name == "offload":
        source = args[2]
        assert isinstance(source, Node)
        buffer = staged.get(source, "tail")  # type: ignore[assignment]
        copied[buffer] = node
        return [(buffer, node, False)], []
    return [], []


def _slot(token: object, key: PlanKey) -> int:
    assert isinstance(token, Node)
    if token.op == "placeholder":
        return int(token.name[1:])
    assert isinstance(token.args[6], int)
    return token.args[6] % key.num_slots
