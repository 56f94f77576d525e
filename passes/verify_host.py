"""What the ops of the CPU lane must fulfil, for ``verify``; as ``verify_rules``."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from headinfer_compile.passes.happens_before import COMPUTE, CPU, not_proved
from headinfer_compile.passes.schedule import HOST
from headinfer_compile.passes.verify_rules import State, check_accumulator, extend, rules_of

_Args = tuple[Any, ...]

QUERY, RESULT = "the query of the CPU", "the result of the CPU"
"""Buffers of the lane, one of each for all sites."""

_NO_SPAN = -1000
"""A result is no K and V: an attend of no span may read it."""


def _attend_host(state: State, node: Node, args: _Args) -> None:
    _, layer, _, _, block, count = args
    key = state.key
    if state.asked is not None:
        raise not_proved(node, f"asks the CPU a second time, after {state.asked.name}")
    if (block, count) != (key.resident + key.host, key.cpu) or not count:
        raise not_proved(
            node,
            f"gives the CPU {count} blocks from {block} on, and its share is {key.cpu} from "
            f"{key.resident + key.host} on",
        )
    time = state.time
    time.issue(node, COMPUTE)
    time.write(node, COMPUTE, QUERY)
    copied = time.clocks[node]
    time.issue(node, CPU, copied, state.copied[layer.name])
    time.read(node, CPU, QUERY)
    time.read(node, CPU, f"the pages of {layer.name}")
    time.write(node, CPU, RESULT)
    state.asked = node


def _wait_host(state: State, node: Node, args: _Args) -> None:
    if args[1] is not state.asked or state.asked is None:
        raise not_proved(node, f"waits for {args[1]}, which asks nothing of the CPU")
    state.time.issue(node, COMPUTE, state.time.clocks[state.asked])
    state.views[node] = ("cpu", _NO_SPAN, 0)
    state.unread[node] = None


def _merge_host(state: State, node: Node, args: _Args) -> None:
    _, acc, lse, out, other_lse, _, group, chunk = args
    check_accumulator(state, node, acc, lse, group, chunk)
    source = state.item(out, 0)
    held = state.views.get(source, ("", 0, 0))[0] if source is not None else ""
    if source is None or held != "cpu" or state.item(other_lse, 1) is not source:
        raise not_proved(node, f"{out} and {other_lse} are no result of the CPU")
    state.unread.pop(source, None)
    state.time.issue(node, COMPUTE)
    state.time.read(node, COMPUTE, RESULT)
    extend(state, node, group, chunk, HOST)


#: As ``verify_rules.RULES``.
HOST_RULES = rules_of(
    {"attend_host": _attend_host, "wait_host": _wait_host, "merge_host": _merge_host}
)
