"""Prove a site schedule before it runs.

The streams compute, h2d, d2h and cpu each run their ops in list order; between streams only events
order anything, and an event is a token that one op returns and another takes. Every op gets a
vector clock, one count per stream, joined from its stream and from the tokens it waits for. A
buffer remembers its last write and its last read on each stream; an access is proved when the
clock of the op covers those it conflicts with.

Rules:

1. Each transfer is waited for once, read after its wait, released once after its last reader, by
   data dependence; nothing reads it after its release.
2. A slot is refilled only after its release, which the prefetch names, and h2d waits for it.
3. A transfer brings the head group and block that its reader attends.
4. Every head group and query chunk attends each of its spans once, with the inputs of the site,
   and is stored once into the result; where one op attends all of them, it makes the result.
5. Each piece is packed once; each that belongs on the host is offloaded once, after its pack and
   from the staging buffer that still holds it; a staging buffer is packed again only after its
   D2H, the tail is appended to only after the D2H of what it held.
6. A page is read after its offload. The tail is read after the pack that appends to it, and
   written back after it too.
7. What the CPU is to attend is asked for once, with the blocks of the key, after the offload of
   those pages; compute waits for the result before it is read, and before the site ends.
8. Entry and exit: the ring comes in as ``key.entry`` transfers and releases and leaves as
   ``key.next_transfers`` and releases, in slot order from the next base and in the order in which
   they were made.

Induction: every access that the sites before may have left unfinished is assumed unfinished at
entry (ops that nothing has waited for; on compute and h2d one for each slot, in the order of the
ring), and rules 5, 7 and 8 give the next site what this one assumed. So one proof covers all layers
and steps. What is not in a schedule is the runtime's: a step writes page and tail rows past those
that it reads, rows given up by a crop are written again only after a drain, and h2d fills a new
ring only after what compute was given before (the memory may be in use by it). Which rows of a page
a batch row reads changes only between steps: a transfer in flight is used on only if its tag, which
names the rows it brings, is what the next step expects.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch.fx import GraphModule, Node

from headinfer_compile.passes.chunk_sequence import is_direct, spans
from headinfer_compile.passes.happens_before import (
    COMPUTE,
    CPU,
    D2H,
    H2D,
    Timeline,
    not_proved,
)
from headinfer_compile.passes.place import FIXED_INPUTS
from headinfer_compile.passes.schedule import APPEND, PlanKey
from headinfer_compile.passes.verify_host import HOST_RULES, QUERY, RESULT
from headinfer_compile.passes.verify_rules import COPIED, LAYERS, RULES, Move, State
from headinfer_compile.runtime.sizes import STAGING_SLOTS

_NUMBERS = {
    **dict.fromkeys(("spec", "group", "chunk", "span", "block", "slot", "piece", "count"), int),
    "accumulate": bool,
}


def run(gm: GraphModule, key: PlanKey, *, prologue: bool = False) -> None:
    """Prove the schedule in ``gm``.

    Args:
        gm: A graph over ``torch.ops.headinfer``.
        key: What it was built for.
        prologue: Only the entry transfers of ``key`` are started, nothing is attended.

    Raises:
        ScheduleError: A rule is broken; the ops, the buffer and the missing edge are named.
    """
    nodes = list(gm.graph.nodes)
    inputs = {node.name: node for node in nodes if node.op == "placeholder"}
    state = State(key, inputs, Timeline())
    _enter(state, entry=0 if prologue else key.entry)
    for node in nodes:
        if node.target is operator.getitem:
            if node.args[0] not in state.time.clocks:
                raise not_proved(node, f"uses {node.args[0]} before it is made")
            state.items.add(node)
        elif node.op == "call_function":
            _step(state, node, prologue)
        elif node.op not in ("placeholder", "output"):
            raise not_proved(node, f"a schedule has no {node.op}")
    if nodes[-1].op != "output":
        raise not_proved(None, "it does not end in a return")
    _leave(state, nodes[-1], prologue)
    if not prologue:
        _check_complete(state)


def _enter(state: State, entry: int) -> None:
    key, inputs, time, count = state.key, state.inputs, state.time, state.key.num_slots
    copied = state.copied
    ring = [f"r{index}" for index in range(key.num_slots)]
    if list(inputs) != [*FIXED_INPUTS, *ring]:
        raise not_proved(None, f"its inputs are {', '.join(inputs)}")
    transfers, released = key.transfers(), key.num_slots - entry
    # One op before on compute and on h2d for each slot, in the order of the ring: what was released
    # longest ago comes first, and what is in flight was started last.
    # Compute has waited for all that was asked of the CPU, so there is no op on cpu.
    time.streams = [(count, 0, 0, 0), (0, count, 0, 0), (0, 0, len(COPIED), 0), (0, 0, 0, 0)]
    for index, name in enumerate(ring):
        token, in_flight = inputs[name], index < entry
        state.slots[index] = token
        read = index - entry + 1
        filled = released + index + 1 if in_flight else read
        # A release comes after the wait for what filled the slot, so it stands for both streams.
        time.clocks[token] = (0, filled, 0, 0) if in_flight else (read, filled, 0, 0)
        time.enter(f"slot {index}", H2D, filled, {} if in_flight else {COMPUTE: read})
        if in_flight:
            state.moves[token] = Move(transfers[index], False, index)
    for index in range(STAGING_SLOTS):
        time.enter(
            f"staging buffer {index}", COMPUTE, count, {D2H: copied[f"staging buffer {index}"][D2H]}
        )
    # What is in the tail was appended after the D2H of what the tail held before.
    time.enter("the tail", COMPUTE, count, {} if key.has_tail else {D2H: copied["the tail"][D2H]})
    time.enter(QUERY, COMPUTE, count, {})
    time.enter(RESULT, CPU, 0, {COMPUTE: count})
    for layer in LAYERS:
        time.enter(f"the pages of {layer}", D2H, copied[layer][D2H], {H2D: count})


def _step(state: State, node: Node, prologue: bool) -> None:
    found = RULES.get(node.target) or HOST_RULES.get(node.target)
    if found is None or (prologue and node.target is not torch.ops.headinfer.prefetch.default):
        kind = "prologue" if prologue else "schedule"
        raise not_proved(node, f"{node.target} is no operator of a {kind}")
    rule, names = found
    args = node.args
    if node.kwargs or len(args) != len(names):
        raise not_proved(node, f"takes {len(names)} arguments by position, {len(args)} given")
    for name, value in zip(names, args, strict=True):
        if name in FIXED_INPUTS:
            if value is not state.inputs[name]:
                raise not_proved(node, f"takes {value} as {name}, not the input of the site")
        elif name in _NUMBERS:
            if type(value) is not _NUMBERS[name]:
                raise not_proved(node, f"takes {value!r} as {name}, which must be a number")
            if name == "spec" and value != state.key.spec:
                raise not_proved(node, f"is for spec {value}, the schedule for {state.key.spec}")
        elif not isinstance(value, (Node, int)):
            raise not_proved(node, f"takes {value!r} as {name}")
    rule(state, node, args)


def _leave(state: State, node: Node, prologue: bool) -> None:
    key, (returned,) = state.key, node.args
    if not isinstance(returned, tuple) or len(returned) != key.num_slots + 1:
        raise not_proved(node, f"returns {returned}, not the result and {key.num_slots} tokens")
    out, *ring = returned
    if not prologue and is_direct(key) and state.result is None:
        attend = state.open.pop((0, 0), None)
        if isinstance(out, Node) and attend is not None and state.item(out, 0) is attend:
            state.stored.add((0, 0))
            state.result = out
    if out is not state.result:
        raise not_proved(node, f"returns {out}, which is not the finished result")
    base = 0 if prologue else len(key.transfers())
    expected = key.transfers()[: key.entry] if prologue else key.next_transfers
    last: dict[int, int] = {}
    for index, token in enumerate(ring):
        slot = (base + index) % key.num_slots
        if token is not state.slots[slot]:
            held = state.slots[slot].name
            raise not_proved(node, f"returns {token} for slot {slot}, which {held} holds")
        stream = H2D if token in state.moves else COMPUTE
        tick = state.time.clocks[token][stream]
        if tick <= last.get(stream, 0):
            raise not_proved(node, f"returns {token} after a token that was made later")
        last[stream] = tick
        move = state.moves.pop(token, None)
        content = expected[index] if index < len(expected) else None
        if (move.content if move else None) != content:
            left = move.content if move else "nothing in flight"
            raise not_proved(node, f"leaves {left} in slot {slot}; the next site expects {content}")
        if move is not None and move.next_site is prologue:
            raise not_proved(node, f"leaves {token.name} in slot {slot}: it is for the wrong layer")
    if state.time.streams[COMPUTE][CPU] < state.time.streams[CPU][CPU]:
        raise not_proved(node, "compute does not wait for what the CPU attends")
    if state.unread:
        raise not_proved(next(iter(state.unread)), "its K and V are never attended")


def _check_complete(state: State) -> None:
    key = state.key
    chunks = [(group, chunk) for group in range(key.groups) for chunk in range(key.chunks)]
    needed = Counter((*chain, span) for chain in chunks for span in spans(key, chain[1]))
    if state.attended != needed:
        odd = next(x for x in (*needed, *state.attended) if state.attended[x] != needed[x])
        raise not_proved(
            None,
            f"group {odd[0]}, chunk {odd[1]} attends span {odd[2]} {state.attended[odd]} times "
            f"instead of {needed[odd]}",
        )
    if state.stored != set(chunks):
        raise not_proved(None, f"stores {sorted(state.stored)} of the (group, chunk) {chunks}")
    packs = set(range(len(key.pieces))) | ({APPEND} if key.appends else set())
    if set(state.packs.values()) != packs:
        raise not_proved(None, f"packs {sorted(state.packs.values())} instead of {sorted(packs)}")
    to_host = {index for index, piece in enumerate(key.pieces) if piece.to_host}
    if state.offloaded != to_host:
        raise not_proved(None, f"offloads {sorted(state.offloaded)} instead of {sorted(to_host)}")
