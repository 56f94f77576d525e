"""Prove a site schedule before it runs.

The streams compute, h2d and d2h each run their ops in order; between streams only tokens order
anything. Every op gets a vector clock (one count per stream) joined from its stream and from the
tokens it waits for, and an access is proved when the clock of the access it must follow is covered.

Rules:

1. Each prefetch has exactly one wait, each wait at least one reader and exactly one release.
2. A slot is read only through its wait, and not after its release.
3. A slot is refilled only after the release of the transfer it held, and h2d waits for it.
4. A transfer brings the head group and block that its reader attends.
5. Every head group and query chunk attends each of its spans exactly once and is stored once.
6. Each piece is packed once; each that belongs on the host is offloaded once, after its pack; the
   staging buffer is packed again only after an offload of what it held.
7. The tail is read, and resident pages too, after the pack that writes them.
8. Entry and exit: the ring comes in as ``key.entry`` transfers and releases, and leaves as
   ``key.next_transfers`` and releases, in slot order from the next base. Since the exit of each
   site is the entry of the next, one proof for a site covers all layers and steps.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes.chunk_sequence import spans
from headinfer_compile.passes.schedule import APPEND, NEW, NEW_PREFIX, TAIL, PlanKey, Transfer
from headinfer_compile.runtime.ops import STREAMS
from headinfer_compile.runtime.staging import STAGING_SLOTS

_ORDER = {"compute": 0, "h2d": 1, "d2h": 2}
Clock = tuple[int, int, int]


def _join(a: Clock, b: Clock) -> Clock:
    return (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))


def _covers(a: Clock, b: Clock) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] >= b[2]


@dataclass
class _Move:
    """One transfer: in flight from an earlier site, or started here."""

    content: Transfer
    next_site: bool
    slot: int
    clock: Clock
    started_by: str
    waited: Clock | None = None
    reads: int = 0
    released: bool = False


@dataclass
class _State:
    key: PlanKey
    streams: list[Clock] = field(default_factory=lambda: [(0, 0, 0)] * 3)
    clocks: dict[Node, Clock] = field(default_factory=dict)
    moves: dict[Node, _Move] = field(default_factory=dict)
    """Transfers by the node of their token."""
    slots: dict[int, Node] = field(default_factory=dict)
    """The token that each slot of the ring was last given: a transfer or a release."""
    views: dict[Node, tuple[str, Node | int]] = field(default_factory=dict)
    """Where a ``wait`` / ``tail`` / ``resident`` node's K and V come from."""
    packs: dict[int, Node] = field(default_factory=dict)
    offloads: Counter[int] = field(default_factory=Counter)
    staging: list[int] = field(default_factory=list)
    attended: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    chains: dict[Node, tuple[int, int]] = field(default_factory=dict)
    stored: Counter[tuple[int, int]] = field(default_factory=Counter)
    last_out: Node | None = None


def run(gm: GraphModule, key: PlanKey, *, prologue: bool = False) -> None:
    """Prove the schedule in ``gm``.

    Args:
        gm: A graph over ``torch.ops.headinfer``.
        key: What it was built for.
        prologue: Only the entry transfers of ``key`` are started, nothing is attended.

    Raises:
        ScheduleError: A rule is broken; the ops, the buffer and what is missing are named.
    """
    state = _State(key)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _enter(state, node, entry=0 if prologue else key.entry)
        elif node.op == "output":
            _leave(state, node, prologue)
        elif node.target is not operator.getitem:
            _step(state, node)
    _check_complete(state, prologue)


def _fail(node: Node | None, reason: str) -> ScheduleError:
    where = f"{node.name}: " if node is not None else ""
    return ScheduleError(f"the schedule is not proved and was not run: {where}{reason}")


def _enter(state: _State, node: Node, entry: int) -> None:
    if not node.name.startswith("r") or not node.name[1:].isdigit():
        return
    index = int(node.name[1:])
    state.clocks[node] = (0, 0, 0)
    state.slots[index] = node
    if index < entry:
        content = state.key.transfers()[index]
        state.moves[node] = _Move(content, False, index, (0, 0, 0), node.name)


def _step(state: _State, node: Node) -> None:
    name = getattr(node.target, "_opname", None)
    if name not in STREAMS:
        raise _fail(node, f"{node.target} is no operator of a schedule")
    stream = _ORDER[STREAMS[name]]
    clock = state.streams[stream]
    if name == "prefetch":
        clock = _join(clock, _token_clock(state, node, node.args[7]))
    elif name == "wait":
        clock = _join(clock, _move(state, node, node.args[1]).clock)
    elif name == "offload":
        clock = _join(clock, _token_clock(state, node, node.args[2]))
    ticked = list(clock)
    ticked[stream] += 1
    clock = (ticked[0], ticked[1], ticked[2])
    state.streams[stream] = state.clocks[node] = clock
    _RULES[name](state, node, clock)


def _token_clock(state: _State, node: Node, token: object) -> Clock:
    if not isinstance(token, Node) or token not in state.clocks:
        raise _fail(node, f"waits for {token}, which is no token made before it")
    return state.clocks[token]


def _move(state: _State, node: Node, token: object) -> _Move:
    if not isinstance(token, Node) or token not in state.moves:
        raise _fail(node, f"{token} is no transfer in flight")
    return state.moves[token]


def _prefetch(state: _State, node: Node, clock: Clock) -> None:
    _, layer, spec, group, block, base, slot, after = node.args
    assert isinstance(slot, int) and isinstance(layer, Node) and isinstance(base, Node)
    if base.name != "base" or layer.name not in ("layer", "next_layer"):
        raise _fail(node, f"is for layer {layer} and base {base}, which are no inputs of the site")
    index = slot % state.key.num_slots
    held = state.slots[index]
    move = state.moves.get(held)
    if move is not None:
        raise _fail(
            node, f"refills slot {index} which holds {held.name}; the edge from its release is missing"
        )
    if held is not after:
        raise _fail(node, f"waits for {after}, but slot {index} was last released by {held.name}")
    if not _covers(clock, state.clocks[held]):
        raise _fail(node, f"is not ordered after {held.name}, the last use of slot {index}")
    content = (int(spec), int(group), int(block))  # type: ignore[arg-type]
    state.moves[node] = _Move(content, layer.name == "next_layer", index, clock, node.name)
    state.slots[index] = node


def _wait(state: _State, node: Node, clock: Clock) -> None:
    token = node.args[1]
    move = _move(state, node, token)
    if move.waited is not None:
        raise _fail(node, f"waits for {token} a second time")
    if move.next_site:
        raise _fail(node, f"waits for {token}, which is for the next site")
    move.waited = clock
    assert isinstance(token, Node)
    state.views[node] = ("slot", token)


def _release(state: _State, node: Node, clock: Clock) -> None:
    token, last = node.args[1], node.args[2]
    move = _move(state, node, token)
    assert isinstance(token, Node)
    if move.waited is None:
        raise _fail(node, f"releases slot {move.slot} before {token} was waited for")
    if not move.reads:
        raise _fail(node, f"releases slot {move.slot} before anything has read {token}")
    if not isinstance(last, Node) or last.args[0] not in state.chains:
        raise _fail(node, f"does not name the last reader of {token}")
    move.released = True
    state.slots[move.slot] = node
    del state.moves[token]


def _drop(state: _State, node: Node, clock: Clock) -> None:
    raise _fail(node, "a schedule reads what it starts; only the executor drops transfers")


def _pack(state: _State, node: Node, clock: Clock) -> None:
    piece = node.args[4]
    assert isinstance(piece, int)
    if piece in state.packs:
        raise _fail(node, f"packs piece {piece} a second time")
    if piece != APPEND:
        if not 0 <= piece < len(state.key.pieces):
            raise _fail(node, f"piece {piece} does not exist")
        kind = state.key.pieces[piece]
        if kind.source == "tail" and state.key.appends and APPEND not in state.packs:
            raise _fail(node, "writes the tail back before the new rows were appended to it")
        if kind.to_host and kind.source == "new":
            state.staging.append(piece)
            if len(state.staging) > STAGING_SLOTS:
                earlier = state.staging[-1 - STAGING_SLOTS]
                if not state.offloads[earlier]:
                    raise _fail(node, f"reuses the staging buffer of piece {earlier} before its offload")
    state.packs[piece] = node


def _offload(state: _State, node: Node, clock: Clock) -> None:
    token = node.args[2]
    pieces = [piece for piece, pack in state.packs.items() if pack is token]
    if not pieces or pieces[0] == APPEND or not state.key.pieces[pieces[0]].to_host:
        raise _fail(node, f"{token} is no pack of a piece that goes to the host")
    state.offloads[pieces[0]] += 1
    if state.offloads[pieces[0]] > 1:
        raise _fail(node, f"offloads piece {pieces[0]} a second time")


def _resident_or_tail(state: _State, node: Node, clock: Clock) -> None:
    packed = node.args[-1]
    if isinstance(packed, Node) and packed not in state.packs.values():
        raise _fail(node, f"{packed.name} is no pack")
    is_tail = node.target is torch.ops.headinfer.tail.default
    if state.key.appends and packed is not state.packs.get(APPEND) and is_tail:
        raise _fail(node, "reads the tail without the edge from the pack that appends to it")
    if is_tail:
        state.views[node] = ("tail", TAIL)
    else:
        block = node.args[4]
        assert isinstance(block, int)
        state.views[node] = (f"resident {node.args[2]} {node.args[3]}", block)


def _attend(state: _State, node: Node, clock: Clock) -> None:
    merging = node.target is torch.ops.headinfer.attend_merge.default
    at = 4 if merging else 2
    k, v = node.args[at], node.args[at + 1]
    spec, group, chunk, span = node.args[at + 3 : at + 7]
    assert isinstance(group, int) and isinstance(chunk, int) and isinstance(span, int)
    if spec != state.key.spec:
        raise _fail(node, f"attends spec {spec} in a schedule of spec {state.key.spec}")
    for index, value in enumerate((k, v)):
        _check_source(state, node, value, index, group, span, clock)
    if merging:
        previous = node.args[1]
        source = previous.args[0] if isinstance(previous, Node) and previous.args else None
        if not isinstance(source, Node) or state.chains.pop(source, None) != (group, chunk):
            raise _fail(node, f"merges into {previous}, which is no open accumulator of its chunk")
        lse = node.args[2]
        if not isinstance(lse, Node) or lse.args[0] is not source:
            raise _fail(node, "merges out and lse of different attends")
    elif (group, chunk) in state.chains.values():
        raise _fail(node, f"starts a second accumulator of head group {group}, chunk {chunk}")
    state.chains[node] = (group, chunk)
    state.attended[group, chunk, span] += 1


def _check_source(
    state: _State, node: Node, value: object, index: int, group: int, span: int, clock: Clock
) -> None:
    if not isinstance(value, Node):
        raise _fail(node, f"its K or V is {value}")
    if span in (NEW, NEW_PREFIX):
        if value.op != "placeholder" or value.name != ("k", "v")[index]:
            raise _fail(node, f"attends new tokens through {value.name}")
        return
    source = value.args[0] if value.target is operator.getitem else None
    if not isinstance(source, Node) or source not in state.views or value.args[1] != index:
        raise _fail(node, f"{value.name} is no view of a slot, the tail or a resident block")
    kind, origin = state.views[source]
    if kind == "slot":
        assert isinstance(origin, Node)
        move = state.moves.get(origin)
        if move is None:
            raise _fail(node, f"reads the slot of {origin.name} after its release")
        if move.waited is None or not _covers(clock, move.waited):
            raise _fail(node, f"reads slot {move.slot} without the edge from the wait of {origin.name}")
        if move.content != (state.key.spec, group, span):
            raise _fail(node, f"attends block {span} of group {group} in a slot of {move.content}")
        move.reads += 1
    elif kind == "tail":
        if span != TAIL:
            raise _fail(node, f"attends block {span} in the tail")
    elif (kind, origin) != (f"resident {state.key.spec} {group}", span):
        raise _fail(node, f"attends block {span} of group {group} in {kind}, block {origin}")


def _store(state: _State, node: Node, clock: Clock) -> None:
    _, out, acc, _, group, chunk = node.args
    source = acc.args[0] if isinstance(acc, Node) and acc.args else None
    if not isinstance(source, Node) or state.chains.pop(source, None) != (group, chunk):
        raise _fail(node, f"stores {acc}, which is no accumulator of head group {group}, chunk {chunk}")
    if out is not state.last_out:
        raise _fail(node, f"stores into {out}, not into the result so far")
    assert isinstance(group, int) and isinstance(chunk, int)
    state.stored[group, chunk] += 1
    state.last_out = node


def _output(state: _State, node: Node, clock: Clock) -> None:
    state.last_out = node


_RULES = {
    "prefetch": _prefetch,
    "wait": _wait,
    "release": _release,
    "drop": _drop,
    "pack": _pack,
    "offload": _offload,
    "resident": _resident_or_tail,
    "tail": _resident_or_tail,
    "attend": _attend,
    "attend_merge": _attend,
    "store": _store,
    "output": _output,
}


def _leave(state: _State, node: Node, prologue: bool) -> None:
    (returned,) = node.args
    assert isinstance(returned, tuple)
    out, *ring = returned
    key = state.key
    if out is not state.last_out:
        raise _fail(node, f"returns {out}, which is not the finished result")
    base = 0 if prologue else len(key.transfers())
    expected = key.transfers()[: key.entry] if prologue else key.next_transfers
    if len(ring) != key.num_slots:
        raise _fail(node, f"returns {len(ring)} tokens for {key.num_slots} slots")
    for index, token in enumerate(ring):
        slot = (base + index) % key.num_slots
        if token is not state.slots[slot]:
            raise _fail(node, f"returns {token} for slot {slot}, which holds {state.slots[slot].name}")
        move = state.moves.pop(token, None)
        content = expected[index] if index < len(expected) else None
        if (move.content if move else None) != content:
            raise _fail(node, f"leaves {move} in slot {slot}; the next site expects {content}")
        if move is not None and move.next_site is prologue:
            raise _fail(node, f"slot {slot} leaves for the wrong layer")
    for token, move in state.moves.items():
        raise _fail(node, f"transfer {token.name} into slot {move.slot} is never released")


def _check_complete(state: _State, prologue: bool) -> None:
    if prologue:
        return
    key = state.key
    for group in range(key.groups):
        for chunk in range(key.chunks):
            for span in spans(key, chunk):
                if state.attended.pop((group, chunk, span), 0) != 1:
                    raise _fail(None, f"group {group}, chunk {chunk} does not attend span {span} once")
            if state.stored.pop((group, chunk), 0) != 1:
                raise _fail(None, f"group {group}, chunk {chunk} is not stored once")
    if state.attended or state.stored or state.chains:
        raise _fail(None, f"attends or stores what is not there: {state.attended}, {state.stored}")
    packs = set(range(len(key.pieces))) | ({APPEND} if key.appends else set())
    if set(state.packs) != packs:
        raise _fail(None, f"packs {sorted(state.packs)} instead of {sorted(packs)}")
    for index, piece in enumerate(key.pieces):
        if state.offloads[index] != int(piece.to_host):
            raise _fail(None, f"piece {index} is offloaded {state.offloads[index]} times")
