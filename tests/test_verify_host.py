"""The verifier on the CPU lane: each rule by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.fx import GraphModule, Node

from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes import verify
from headinfer_compile.passes.schedule import PieceKind
from mutator import copy_of, opname
from schedule_harness import build, decode_key, ops_of
from test_verify import arguments, remove

KEY = decode_key(host=1, cpu=2, pieces=(PieceKind("tail", True),))


def test_the_cpu_is_asked_first_and_waited_for_last() -> None:
    names = [name for name in map(opname, build(KEY).graph_module.graph.nodes) if name]
    assert names[0] == "attend_host"
    assert names[-3:] == ["wait_host", "merge_host", "store"]


def op(gm: GraphModule, name: str) -> Node:
    return ops_of(gm, name)[0]


def use_as_kv(gm: GraphModule) -> None:
    """Attend the CPU's result as if it were K and V."""
    wait = op(gm, "wait_host")
    merge, last = op(gm, "merge_host"), ops_of(gm, "attend_merge")[-1]
    for node in (wait, *wait.users):
        last.prepend(node)
    arguments(last, k=merge.args[3], v=merge.args[4])


def unmerge(gm: GraphModule) -> None:
    """Leave the CPU's result out of the accumulator."""
    merge = op(gm, "merge_host")
    for item in list(merge.users):
        index = item.args[1]
        assert isinstance(index, int)
        replacement = merge.args[1 + index]
        assert isinstance(replacement, Node)
        remove(item, replacement)


def ask_twice(gm: GraphModule) -> None:
    asked = op(gm, "attend_host")
    asked.append(gm.graph.node_copy(asked))


def ask_for_the_next_layer(gm: GraphModule) -> None:
    (layer,) = (node for node in gm.graph.nodes if node.name == "next_layer")
    arguments(op(gm, "attend_host"), layer=layer)


#: A change, and the error that it must give.
BREAKS: dict[str, tuple[Callable[[GraphModule], object], str]] = {
    "not merged": (unmerge, r"stores getitem\w*, which is no accumulator"),
    "no wait": (
        lambda gm: arguments(op(gm, "merge_host"), out=op(gm, "attend").args[2]),
        r"merge_host\w*: getitem\w* and getitem\w* are no result of the CPU",
    ),
    "waits for something else": (
        lambda gm: arguments(op(gm, "wait_host"), token=op(gm, "pack")),
        r"wait_host\w*: waits for pack\w*, which asks nothing of the CPU",
    ),
    "asked twice": (ask_twice, r"asks the CPU a second time"),
    "other blocks": (
        lambda gm: arguments(op(gm, "attend_host"), block=0),
        r"attend_host\w*: gives the CPU 2 blocks from 0 on, and its share is 2 from 1 on",
    ),
    "too few": (
        lambda gm: arguments(op(gm, "attend_host"), count=1),
        "gives the CPU 1 blocks from 1 on",
    ),
    "the next layer": (ask_for_the_next_layer, "takes next_layer as layer"),
    "read as K and V": (use_as_kv, r"attends block 0 of group 0 in cpu -1000"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_schedule_is_not_proved(name: str) -> None:
    change, error = BREAKS[name]
    gm = copy_of(build(KEY).graph_module)
    verify.run(gm, KEY)
    change(gm)
    with pytest.raises(ScheduleError, match=error):
        verify.run(gm, KEY)


def test_a_site_may_not_end_before_the_cpu_is_waited_for() -> None:
    gm = copy_of(build(KEY).graph_module)
    unmerge(gm)
    remove(op(gm, "merge_host"))
    wait = op(gm, "wait_host")
    for item in list(wait.users):
        remove(item)
    remove(wait)
    with pytest.raises(ScheduleError, match="compute does not wait for what the CPU attends"):
        verify.run(gm, KEY)
