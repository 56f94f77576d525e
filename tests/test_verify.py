"""The verifier: each rule by name, and every small way to break the schedules of real models."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node

from harness import CompiledModel, clean_dynamo, random_ids, tiny_llama, tiny_mistral
from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes import verify
from headinfer_compile.passes.schedule import PieceKind, PlanKey, Schedule
from mutator import copy_of, meaning, mutants, opname
from schedule_harness import build, build_cold, decode_key, ops_of, plan_key, plan_keys

HOST, STAY = PieceKind("new", True), PieceKind("new", False)
FLUSH = (PieceKind("tail", True),)


def arguments(node: Node, **changes: object) -> Node:
    """Change arguments of an op by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in changes.items():
        node.update_arg(names.index(name), value)  # type: ignore[arg-type]
    return node


def arguments_of_item(node: Node, index: int) -> None:
    node.update_arg(1, index)


def swap_ring(gm: GraphModule) -> None:
    output = list(gm.graph.nodes)[-1]
    (out, first, second, *rest) = output.args[0]
    output.args = ((out, second, first, *rest),)


def remove(node: Node, instead: Node | None = None) -> None:
    if instead is not None:
        node.replace_all_uses_with(instead)
    node.graph.erase_node(node)


@dataclass(frozen=True)
class Break:
    """One rule, a change that breaks it, and what the error must say."""

    name: str
    key: PlanKey
    change: Callable[[GraphModule], object]
    error: str


def op(gm: GraphModule, name: str, index: int = 0) -> Node:
    return ops_of(gm, name)[index]


def given_as(gm: GraphModule, name: str) -> Node:
    (found,) = [node for node in list(gm.graph.nodes) if node.name == name]
    assert isinstance(found, Node)
    return found


def last_of(gm: GraphModule, name: str) -> Node:
    return ops_of(gm, name)[-1]


TWO = plan_key(host=2, distance=0)
AHEAD = plan_key(host=3, following=True)
PIECES = plan_key(host=0, pieces=(HOST, HOST, HOST))
FLUSHING = decode_key(host=1, pieces=FLUSH)
DIRECT = decode_key(fused=True, resident=1, host=0)

BREAKS = [
    Break("the LSE as result", DIRECT,
          lambda gm: arguments_of_item(given_as(gm, "getitem"), 1), r"which is not the finished"),
    Break("the query as result", DIRECT,
          lambda gm: given_as(gm, "getitem").replace_all_uses_with(given_as(gm, "q")),
          r"returns q, which is not the finished result"),
    Break("dropped wait", TWO, lambda gm: remove(op(gm, "wait"), op(gm, "prefetch")),
          r"attend_merge\w*: .* are no K and V of a slot"),
    Break("second wait", TWO, lambda gm: arguments(op(gm, "wait", 1), transfer=op(gm, "prefetch")),
          r"prefetch\w* is no transfer that is in flight|which wait\w* has waited for"),
    Break("wait for the next site's transfer", plan_key(host=1, distance=1, following=True),
          lambda gm: (op(gm, "wait").prepend(op(gm, "prefetch")),
                      arguments(op(gm, "wait"), transfer=op(gm, "prefetch"))),
          "which is for the next site"),
    Break("early release", TWO, lambda gm: op(gm, "wait").append(op(gm, "release")),
          r"release\w*: releases slot 0 before prefetch\w* was read"),
    Break("release without its last reader", plan_key(host=2, chunks=2, distance=0, num_slots=4),
          lambda gm: arguments(op(gm, "release", 2), last=op(gm, "release").args[2]),
          r"releases slot 2 after getitem\w*: the edge from its last reader attend_merge\w* to "
          r"release\w* is missing"),
    Break("read after release", TWO,
          lambda gm: arguments(op(gm, "attend_merge", 1), k=op(gm, "attend_merge").args[4],
                               v=op(gm, "attend_merge").args[5]),
          r"reads the slot of prefetch\w* after its release: the edge from attend_merge\w* to "),
    Break("another slot", TWO, lambda gm: arguments(op(gm, "prefetch", 1), slot=2),
          r"prefetch\w*: on h2d it writes slot 0 while attend_merge\w* on compute reads it: the "
          r"edge from attend_merge\w* to prefetch\w* is missing"),
    Break("release of another slot", plan_key(host=3, num_slots=4, distance=0),
          lambda gm: arguments(op(gm, "prefetch", 2), after=op(gm, "release", 1)),
          r"prefetch\w*: comes after release\w*, but slot 2 was last given up by r2: the edge from "
          r"r2 to prefetch\w* is missing"),
    Break("token that is no token", TWO, lambda gm: arguments(op(gm, "wait"), transfer=2),
          "2 is no transfer that is in flight"),
    Break("hoisted too far", AHEAD, lambda gm: op(gm, "wait").prepend(last_of(gm, "prefetch")),
          r"prefetch\w*: refills slot \d, which holds transfer \w+: the edge from its release"),
    Break("old release", plan_key(host=3, distance=0),
          lambda gm: arguments(op(gm, "prefetch", 2), after=op(gm, "prefetch").args[7]),
          r"prefetch\w*: on h2d it writes slot 0 while attend_merge\w* on compute reads it: the "
          r"edge from attend_merge\w* to prefetch\w* is missing"),
    Break("another block", TWO, lambda gm: arguments(op(gm, "prefetch"), block=1),
          r"attends block 0 of group 0 in a slot that holds \(0, 0, 1\)"),
    Break("another layer", TWO,
          lambda gm: arguments(op(gm, "prefetch"), layer=given_as(gm, "next_layer")),
          "which is for the next site"),
    Break("span twice", plan_key(resident=2, host=0, pieces=(STAY,)),
          lambda gm: (arguments(op(gm, "resident", 1), block=0),
                      arguments(op(gm, "attend_merge", 1), span=0)),
          "attends span 0 2 times instead of 1"),
    Break("no store", plan_key(host=0),
          lambda gm: remove(op(gm, "store"), op(gm, "output")), "stores"),
    Break("dropped offload", PIECES, lambda gm: remove(op(gm, "offload", 1)),
          r"offloads \[0, 2\] instead of \[0, 1, 2\]"),
    Break("early staging reuse", PIECES, lambda gm: op(gm, "output").append(op(gm, "offload")),
          r"offload\w*: reads staging buffer 0 after pack\w* has packed it again: the edge from "
          r"offload\w* to pack\w* is missing"),
    Break("offload before its pack", PIECES, lambda gm: op(gm, "pack").prepend(op(gm, "offload")),
          r"offload\w*: pack\w* is no pack, made before it"),
    Break("write-back before the append", FLUSHING,
          lambda gm: op(gm, "pack").prepend(op(gm, "pack", 1)),
          r"the edge from their pack to pack\w* is missing"),
    Break("append during the write-back", FLUSHING,
          lambda gm: op(gm, "offload").append(op(gm, "pack")),
          r"pack\w*: writes the tail back before"),
    Break("tail without its new row", FLUSHING, lambda gm: arguments(op(gm, "tail"), packed=-1),
          r"tail\w*: follows -1: the edge from the pack that appends to the tail to tail\w* is "),
    Break("swapped ring", AHEAD, swap_ring, r"output: returns \w+ for slot 1, which"),
    Break("promise not kept", replace(AHEAD, next_transfers=()),
          lambda gm: arguments(op(gm, "prefetch"), base=0), "takes 0 as base"),
    Break("stray op", TWO,
          lambda gm: op(gm, "store").append(gm.graph.call_function(
              torch.ops.aten.alias.default, (op(gm, "store"),))),
          "is no operator of a schedule"),
]  # fmt: skip


@pytest.mark.parametrize("case", BREAKS, ids=lambda case: case.name)
def test_a_broken_rule_is_named_with_its_ops_and_the_missing_edge(case: Break) -> None:
    gm = copy_of(build(case.key).graph_module)
    verify.run(gm, case.key)
    case.change(gm)
    with pytest.raises(ScheduleError, match=case.error) as found:
        verify.run(gm, case.key)
    assert str(found.value).startswith("the schedule is not proved and was not run: ")


def models() -> Iterator[tuple[str, CompiledModel, dict[str, object], dict[str, object], int, int]]:
    """Name, model, options, cache options, prompt and chunk tokens."""
    llama = CompiledModel(tiny_llama(0))
    cases: list[tuple[dict[str, object], dict[str, object]]] = [
        ({}, {}),
        ({"num_slots": 3, "prefetch_distance": 2, "head_group": 2}, {"gpu_budget": 20_000}),
        ({"num_slots": 4, "prefetch_distance": 1, "workspace_bytes": 1}, {"tail_tokens": 3}),
        ({"num_slots": 2, "disable_passes": ["hoist_prefetch"]}, {"gpu_budget": 40_000}),
    ]
    for options, cache in cases:
        yield "llama", llama, options, {"page_tokens": 64, **cache}, 200, 90
    yield "llama", llama, {}, {"page_tokens": 256}, 2130, 2066
    mistral = CompiledModel(tiny_mistral(0, window=40))
    yield "mistral", mistral, {"num_slots": 3}, {"page_tokens": 32}, 130, 70


@pytest.fixture(scope="module")
def schedules() -> list[tuple[str, Schedule, bool]]:
    """Every schedule and prologue of the test models, each structure once."""
    found: dict[tuple[PlanKey, bool], tuple[str, Schedule, bool]] = {}
    threads = torch.get_num_threads()
    # Threads only wait for each other on tensors this small.
    torch.set_num_threads(1)
    with clean_dynamo():
        for name, model, options, cache_options, tokens, chunk in models():
            model.use(**options)
            with model.cache(**cache_options) as cache:
                ids = random_ids(1, tokens)
                model.forward(ids[:, :64], cache, 64)
                model.forward(ids[:, 64:], cache, chunk)
                model.forward(random_ids(2, 12), cache, 1)
                model.forward(random_ids(3, 70), cache, 70)
                model.forward(random_ids(4, 3), cache, 3)
            for graph in model.graphs:
                for key, schedule in graph.schedules.items():
                    found[key, False] = name, schedule, False
                for key, schedule in graph.prologues.items():
                    found[key, True] = name, schedule, True
    torch.set_num_threads(threads)
    return list(found.values())


def check_mutants(schedule: Schedule, prologue: bool, counts: Counter[str]) -> list[str]:
    """Kill what can be killed; returns survivors."""
    gm, key = schedule.graph_module, schedule.key
    wanted, survivors = meaning(gm, key), []
    for mutant in mutants(gm, key):
        try:
            verify.run(mutant.graph_module, key, prologue=prologue)
        except ScheduleError:
            counts["killed"] += 1
            continue
        if meaning(mutant.graph_module, key) == wanted:
            counts["equivalent"] += 1
        else:
            survivors.append(f"{mutant.kind}: {mutant.what} in the schedule of {key}")
    return survivors


def check_all(schedules: list[tuple[str, Schedule, bool]], most: int) -> None:
    counts: Counter[str] = Counter()
    survivors = []
    for _, schedule, prologue in schedules:
        if schedule.num_nodes <= most:
            counts["schedules"] += 1
            survivors += check_mutants(schedule, prologue, counts)
    print(f"\n{dict(counts)}, {len(survivors)} survivors of {len(schedules)} schedules")
    assert not survivors, "\n".join(survivors[:10])
    assert counts["schedules"] >= 8 and counts["killed"] > 10 * counts["equivalent"] > 0


def test_no_mutant_of_a_small_schedule_survives(
    schedules: list[tuple[str, Schedule, bool]],
) -> None:
    check_all(schedules, most=45)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_mutant_of_any_schedule_survives(schedules: list[tuple[str, Schedule, bool]]) -> None:
    check_all(schedules, most=10**6)


def test_the_test_models_cover_every_op_and_kind_of_step(
    schedules: list[tuple[str, Schedule, bool]],
) -> None:
    seen = {opname(node) for _, s, _ in schedules for node in s.graph_module.graph.nodes}
    on_cpu = {"attend", "attend_merge", "offload", "output", "pack", "prefetch", "release"}
    assert seen - {""} == on_cpu | {"resident", "store", "tail", "wait"}
    keys = [schedule.key for _, schedule, _ in schedules]
    assert {key.num_slots for key in keys} == {2, 3, 4}
    assert {key.distance for key in keys} >= {0, 1, 2}
    assert {key.chunks > 1 for key in keys} == {key.resident > 0 for key in keys} == {True, False}
    assert any(len([p for p in key.pieces if p.source == "new"]) > 2 for key in keys)
    assert any(p.source == "tail" and not key.appends for key in keys for p in key.pieces)
    assert any(prologue for _, _, prologue in schedules)


@given(plan_keys(largest=2), st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_no_mutant_of_any_geometry_survives(key: PlanKey, seed: int) -> None:
    schedule = build(key)
    if schedule.num_nodes <= 60:
        assert not check_mutants(schedule, False, Counter())


def test_no_mutant_of_what_one_op_attends_survives() -> None:
    for key in (DIRECT, replace(DIRECT, pieces=FLUSH, has_tail=True)):
        counts: Counter[str] = Counter()
        assert not check_mutants(build(key), False, counts)
        assert counts["killed"] > 20


@given(plan_keys(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_schedule_is_refused_for_another_key_unless_it_is_that_keys_too(
    key: PlanKey, data: st.DataObject
) -> None:
    other = data.draw(plan_keys())
    field = data.draw(
        st.sampled_from(
            ["groups", "chunks", "resident", "host", "distance", "has_tail", "appends", "pieces",
             "one_query", "causal", "spec", "next_transfers"]
        )
    )  # fmt: skip
    value = getattr(other, field)
    changed = replace(key, **{field: value})
    if changed.distance >= changed.num_slots or len(changed.next_transfers) > changed.distance:
        return
    gm = build(key).graph_module
    try:
        verify.run(gm, changed)
    except ScheduleError:
        assert changed != key
    else:
        assert meaning(build(changed).graph_module, changed) == meaning(gm, changed)


def test_a_prologue_may_only_start_the_entry_transfers() -> None:
    key = replace(plan_key(host=3, num_slots=3, distance=2), next_transfers=())
    verify.run(build_cold(key).graph_module, key, prologue=True)
    with pytest.raises(ScheduleError, match="is no operator of a prologue"):
        verify.run(build(key).graph_module, key, prologue=True)
    with pytest.raises(ScheduleError, match="refills slot 0, which holds transfer r0"):
        verify.run(build_cold(key).graph_module, key)


def test_errors_of_a_graph_that_is_no_schedule() -> None:
    key = plan_key()
    gm = copy_of(build(key).graph_module)
    op(gm, "store").kwargs = {"chunk": 0}
    with pytest.raises(ScheduleError, match="takes 6 arguments by position"):
        verify.run(gm, key)
    gm = copy_of(build(key).graph_module)
    with gm.graph.inserting_before(op(gm, "store")):
        gm.graph.get_attr("weight")
    with pytest.raises(ScheduleError, match="a schedule has no get_attr"):
        verify.run(gm, key)
    with pytest.raises(ScheduleError, match=re.escape("its inputs are handle, q, k, v")):
        verify.run(build(replace(key, num_slots=3)).graph_module, key)


def test_a_proof_takes_at_most_twenty_microseconds_per_node() -> None:
    key = plan_key(groups=4, host=28, num_slots=3, distance=2, following=True)
    gm = build(key).graph_module
    times = []
    for _ in range(9):
        start = time.process_time()
        verify.run(gm, key)
        times.append(time.process_time() - start)
    per_node = min(times) / len(gm.graph.nodes)
    assert per_node <= 20e-6, f"{per_node * 1e6:.1f} us"
