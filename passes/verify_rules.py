"""What each op of a schedule must fulfil, for ``verify``: its waits, its accesses, its arguments.

A rule is called with the op's arguments after ``verify`` has checked their types and that the
site's inputs are passed where they belong. It issues the op on its stream with the events it waits
for, declares its accesses, and raises when the op is not what the schedule may do there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from headinfer_compile.passes.chunk_sequence import spans
from headinfer_compile.passes.happens_before import (
    COMPUTE,
    D2H,
    H2D,
    Clock,
    Timeline,
    not_proved,
)
from headinfer_compile.passes.schedule import (
    APPEND,
    NEW,
    NEW_PREFIX,
    RESIDENT,
    TAIL,
    PlanKey,
    Transfer,
)
from headinfer_compile.runtime.ops import NAMESPACE
from headinfer_compile.runtime.sizes import STAGING_SLOTS

LAYERS = ("layer", "next_layer")

#: What earlier sites may be copying to the host, or to: each by an op of its own on d2h. The copies
#: from the tail and from staging are those to the pages of this layer, or older.
COPIED = ("the tail", *(f"staging buffer {index}" for index in range(STAGING_SLOTS)), *LAYERS)

#: The event of that copy.
COPIED_BEFORE: dict[str, Clock] = {name: (0, 0, at, 0) for at, name in enumerate(COPIED, start=1)}

_Args = tuple[Any, ...]


@dataclass
class Move:
    """One transfer: in flight from an earlier site, or started here."""

    content: Transfer
    next_site: bool
    slot: int
    wait: Node | None = None
    reader: Node | None = None


@dataclass
class State:
    """What the ops so far have done."""

    key: PlanKey
    inputs: dict[str, Node]
    time: Timeline = field(default_factory=Timeline)
    items: set[Node] = field(default_factory=set)
    """Results of ops with two of them."""
    moves: dict[Node, Move] = field(default_factory=dict)
    """Transfers that are not released, by their token."""
    slots: dict[int, Node] = field(default_factory=dict)
    """The token that each slot of the ring was last given: a transfer or a release."""
    views: dict[Node, tuple[str, Node | int, int]] = field(default_factory=dict)
    """Where K and V of a ``wait``, ``tail`` or ``resident`` are: kind, transfer or block, group."""
    unread: dict[Node, None] = field(default_factory=dict)
    packs: dict[Node, int] = field(default_factory=dict)
    staged: list[Node] = field(default_factory=list)
    """Packs in the order in which they took staging buffers."""
    copied: dict[str, Clock] = field(default_factory=COPIED_BEFORE.copy)
    """The last D2H from a buffer or of a layer."""
    offloaded: set[int] = field(default_factory=set)
    attended: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    chains: dict[Node, tuple[int, int]] = field(default_factory=dict)
    """Head group and query chunk of each attend."""
    open: dict[tuple[int, int], Node] = field(default_factory=dict)
    """The last attend of each accumulator that is not stored."""
    stored: set[tuple[int, int]] = field(default_factory=set)
    result: Node | None = None
    asked: Node | None = None
    """The ``attend_host`` of the site."""

    def move(self, node: Node, token: object) -> Move:
        """The transfer in flight that ``node`` names."""
        if not isinstance(token, Node) or token not in self.moves:
            raise not_proved(node, f"{token} is no transfer that is in flight here")
        return self.moves[token]

    def item(self, value: object, index: int | None) -> Node | None:
        """The op whose result number ``index`` (None: any) ``value`` is."""
        if not isinstance(value, Node) or value not in self.items:
            return None
        source, found = value.args
        return source if isinstance(source, Node) and index in (None, found) else None


def _prefetch(state: State, node: Node, args: _Args) -> None:
    _, layer, spec, group, block, _, slot, after = args
    index = slot % state.key.num_slots
    held, name = state.slots[index], f"slot {index}"
    if layer not in (state.inputs[which] for which in LAYERS):
        raise not_proved(node, f"is for {layer}, which is neither layer nor next_layer")
    if held in state.moves:
        raise not_proved(
            node,
            f"refills {name}, which holds transfer {held.name}: the edge from its release to "
            f"{node.name} is missing",
        )
    if after not in state.time.clocks:
        raise not_proved(node, f"comes after {after}, which is no token made before it")
    written = state.copied[layer.name]
    state.time.issue(node, H2D, state.time.clocks[after], written)
    state.time.read(node, H2D, f"the pages of {layer.name}")
    state.time.write(node, H2D, name)
    if held is not after:
        raise not_proved(
            node,
            f"comes after {after}, but {name} was last given up by {held.name}: the edge from "
            f"{held.name} to {node.name} is missing",
        )
    state.moves[node] = Move((spec, group, block), layer.name == "next_layer", index)
    state.slots[index] = node


def _wait(state: State, node: Node, args: _Args) -> None:
    token = args[1]
    move = state.move(node, token)
    if move.wait is not None:
        raise not_proved(node, f"waits for {token}, which {move.wait.name} has waited for")
    if move.next_site:
        raise not_proved(node, f"waits for {token}, which is for the next site")
    move.wait = node
    state.time.issue(node, COMPUTE, state.time.clocks[token])
    state.views[node] = ("slot", token, move.content[1])
    state.unread[node] = None


def _release(state: State, node: Node, args: _Args) -> None:
    _, token, last = args
    move = state.move(node, token)
    if move.wait is None or move.reader is None:
        missing = "waited for" if move.wait is None else "read"
        raise not_proved(node, f"releases slot {move.slot} before {token} was {missing}")
    source, chains, clocks = state.item(last, None), state.chains, state.time.clocks
    if (
        source is None
        or chains.get(source) != chains[move.reader]
        or clocks[source] < clocks[move.reader]
    ):
        raise not_proved(
            node,
            f"releases slot {move.slot} after {last}: the edge from its last reader "
            f"{move.reader.name} to {node.name} is missing",
        )
    state.time.issue(node, COMPUTE)
    state.slots[move.slot] = node
    del state.moves[token]


def _pack(state: State, node: Node, args: _Args) -> None:
    piece, pieces, time = args[4], state.key.pieces, state.time
    if piece in state.packs.values():
        raise not_proved(node, f"packs piece {piece} a second time")
    if piece == APPEND:
        # The runtime waits for the D2H of the tail when it is empty, and has waited when it is not.
        copied = state.copied["the tail"]
        time.issue(node, COMPUTE, *(() if state.key.has_tail else (copied,)))
        time.write(node, COMPUTE, "the tail")
    elif not 0 <= piece < len(pieces):
        raise not_proved(node, f"packs piece {piece} of {len(pieces)}")
    elif pieces[piece].source == "tail":
        if state.key.appends and APPEND not in state.packs.values():
            raise not_proved(
                node,
                f"writes the tail back before the new rows are in it: the edge from their pack to "
                f"{node.name} is missing",
            )
        time.issue(node, COMPUTE)
        time.read(node, COMPUTE, "the tail")
    elif pieces[piece].to_host:
        name = f"staging buffer {len(state.staged) % STAGING_SLOTS}"
        time.issue(node, COMPUTE, state.copied[name])
        time.write(node, COMPUTE, name)
        state.staged.append(node)
    else:
        time.issue(node, COMPUTE)
    state.packs[node] = piece


def _offload(state: State, node: Node, args: _Args) -> None:
    token = args[2]
    piece = state.packs.get(token, APPEND)
    if piece == APPEND or not state.key.pieces[piece].to_host:
        raise not_proved(node, f"{token} is no pack, made before it, of a piece for the host")
    if piece in state.offloaded:
        raise not_proved(node, f"offloads {token} a second time")
    state.time.issue(node, D2H, state.time.clocks[token])
    name = "the tail"
    if state.key.pieces[piece].source == "new":
        at = state.staged.index(token)
        name = f"staging buffer {at % STAGING_SLOTS}"
        if at + STAGING_SLOTS < len(state.staged):
            again = state.staged[at + STAGING_SLOTS].name
            raise not_proved(
                node,
                f"reads {name} after {again} has packed it again: the edge from {node.name} to "
                f"{again} is missing",
            )
    state.time.read(node, D2H, name)
    state.offloaded.add(piece)
    state.copied[name] = state.copied["layer"] = state.time.clocks[node]


def _resident(state: State, node: Node, args: _Args) -> None:
    _, _, _, group, block, packed = args
    _view(state, node, packed, ("resident", block, group))


def _tail(state: State, node: Node, args: _Args) -> None:
    _view(state, node, args[2], ("tail", TAIL, 0))
    state.time.read(node, COMPUTE, "the tail")


def _view(state: State, node: Node, packed: object, view: tuple[str, int, int]) -> None:
    _issue_after_append(state, node, packed)
    state.views[node] = view
    state.unread[node] = None


def _issue_after_append(state: State, node: Node, packed: object) -> None:
    if state.key.appends:
        appended = isinstance(packed, Node) and state.packs.get(packed) == APPEND
    else:
        appended = packed == APPEND
    if not appended:
        raise not_proved(
            node,
            f"follows {packed}: the edge from the pack that appends to the tail to {node.name} is "
            "missing",
        )
    state.time.issue(node, COMPUTE)


def _attend(state: State, node: Node, args: _Args) -> None:
    _, _, k, v, _, _, group, chunk, span, accumulate = args
    _check_first(state, node, group, chunk, accumulate)
    state.time.issue(node, COMPUTE)
    _attend_span(state, node, (k, v), group, chunk, span)


def _attend_resident(state: State, node: Node, args: _Args) -> None:
    _, _, _, _, packed, accumulate = args
    _check_first(state, node, 0, 0, accumulate)
    _issue_after_append(state, node, packed)
    state.time.read(node, COMPUTE, "the tail")
    extend(state, node, 0, 0, RESIDENT)


def _check_first(state: State, node: Node, group: int, chunk: int, accumulate: bool) -> None:
    if (group, chunk) in state.open or (group, chunk) in state.stored:
        raise not_proved(node, f"starts a second accumulator of head group {group}, chunk {chunk}")
    if accumulate is not (len(spans(state.key, chunk)) > 1):
        raise not_proved(node, f"accumulate={accumulate} does not fit the spans of chunk {chunk}")


def _attend_merge(state: State, node: Node, args: _Args) -> None:
    _, acc, lse, _, k, v, _, _, group, chunk, span = args
    check_accumulator(state, node, acc, lse, group, chunk)
    state.time.issue(node, COMPUTE)
    _attend_span(state, node, (k, v), group, chunk, span)


def check_accumulator(
    state: State, node: Node, acc: object, lse: object, group: int, chunk: int
) -> None:
    """Require the accumulator and LSE that the attends of this group and chunk have made so far."""
    last = state.open.get((group, chunk))
    if last is None or state.item(acc, 0) is not last or state.item(lse, 1) is not last:
        raise not_proved(
            node,
            f"merges into {acc} and {lse}, which are not the accumulator and LSE of head group "
            f"{group}, chunk {chunk}",
        )


def _attend_span(
    state: State, node: Node, pair: tuple[Any, Any], group: int, chunk: int, span: int
) -> None:
    if span in (NEW, NEW_PREFIX):
        if pair != (state.inputs["k"], state.inputs["v"]):
            raise not_proved(node, f"attends new tokens in {pair[0]} and {pair[1]}")
    else:
        _read_view(state, node, pair, group, span)
    extend(state, node, group, chunk, span)


def extend(state: State, node: Node, group: int, chunk: int, span: int) -> None:
    """Note that ``node`` adds a span to its accumulator."""
    state.chains[node] = (group, chunk)
    state.open[group, chunk] = node
    state.attended[group, chunk, span] += 1


def _read_view(state: State, node: Node, pair: tuple[Any, Any], group: int, span: int) -> None:
    source = state.item(pair[0], 0)
    if source not in state.views or state.item(pair[1], 1) is not source:
        raise not_proved(
            node, f"{pair[0]} and {pair[1]} are no K and V of a slot, the tail or a resident block"
        )
    kind, origin, held_group = state.views[source]
    state.unread.pop(source, None)
    if isinstance(origin, Node):
        move = state.moves.get(origin)
        if move is None:
            raise not_proved(
                node,
                f"reads the slot of {origin.name} after its release: the edge from {node.name} to "
                "the release is missing",
            )
        if move.content != (state.key.spec, group, span):
            raise not_proved(
                node, f"attends block {span} of group {group} in a slot that holds {move.content}"
            )
        state.time.read(node, COMPUTE, f"slot {move.slot}")
        move.reader = node
    elif (origin, held_group) != (span, group if kind == "resident" else 0):
        raise not_proved(
            node, f"attends block {span} of group {group} in {kind} {origin}, group {held_group}"
        )


def _store(state: State, node: Node, args: _Args) -> None:
    _, out, acc, _, group, chunk = args
    last = state.open.pop((group, chunk), None)
    if last is None or state.item(acc, 0) is not last:
        raise not_proved(
            node, f"stores {acc}, which is no accumulator of head group {group}, chunk {chunk}"
        )
    if out is not state.result or out is None:
        raise not_proved(node, f"stores into {out}, not into the result so far")
    state.time.issue(node, COMPUTE)
    state.stored.add((group, chunk))
    state.result = node


def _output(state: State, node: Node, args: _Args) -> None:
    if state.result is not None:
        raise not_proved(node, f"makes a second result beside {state.result.name}")
    state.time.issue(node, COMPUTE)
    state.result = node


Rule = Callable[[State, Node, _Args], None]

_FUNCTIONS: dict[str, Rule] = {
    "prefetch": _prefetch,
    "wait": _wait,
    "release": _release,
    "pack": _pack,
    "offload": _offload,
    "resident": _resident,
    "tail": _tail,
    "attend": _attend,
    "attend_resident": _attend_resident,
    "attend_merge": _attend_merge,
    "store": _store,
    "output": _output,
}

#: Arguments whose value is not the input of the site with that name.
_OWN = {"attend": ("k", "v"), "attend_merge": ("k", "v"), "prefetch": ("layer", "spec")}


def rules_of(functions: dict[str, Rule]) -> dict[object, tuple[Rule, tuple[str, ...]]]:
    """Rule and argument names by operator."""
    found: dict[object, tuple[Rule, tuple[str, ...]]] = {}
    for name, function in functions.items():
        target = getattr(getattr(torch.ops, NAMESPACE), name).default
        names = (argument.name for argument in target._schema.arguments)
        own = _OWN.get(name, ())
        found[target] = function, tuple(f"own {n}" if n in own else n for n in names)
    return found


#: Rule and argument names of each op that a schedule may contain.
RULES = rules_of(_FUNCTIONS)
