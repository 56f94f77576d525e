"""The plan passes: the graph after each on a tiny key, and what holds for every geometry."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch.fx import Graph, GraphModule

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes import chunk_sequence, pipeline
from headinfer_compile.passes.chunk_sequence import is_direct, spans
from headinfer_compile.passes.pipeline import PIPELINE, PLAN_PASSES, build_schedule
from headinfer_compile.passes.schedule import PieceKind, PlanContext, PlanKey
from headinfer_compile.passes.schedule_text import parse_schedule, schedule_text
from schedule_harness import (
    CONFIG,
    Quiet,
    build,
    build_cold,
    decode_key,
    ops_of,
    plan_key,
    plan_keys,
)

INPUTS = "handle, q, k, v, masks, layer, next_layer, base"


def after(name: str, key: PlanKey) -> list[str]:
    """The statements of a schedule after a pass, without comments and ``_default``."""
    context, gm = PlanContext(key, CONFIG), GraphModule(torch.nn.Module(), Graph())
    for module, _ in PLAN_PASSES:
        gm = module.run(gm, context)
        if module.__name__.endswith(name):
            break
    lines = schedule_text(gm, key).splitlines()[1:]
    return [line.split("  # ")[0].replace("_default", "").strip() for line in lines]


def test_the_pipeline_has_its_passes_in_order_with_reasons() -> None:
    assert PIPELINE == (
        "find_attention",
        "recover_mask",
        "drop_vmap",
        "partition",
        "place",
        "split_heads",
        "chunk_sequence",
        "insert_transfers",
        "hoist_prefetch",
        "verify",
        "lower",
    )
    assert all(why for _, why in pipeline.reasons())


def test_place_makes_one_site_and_passes_the_ring_through() -> None:
    assert after("place", plan_key()) == [
        f"def site({INPUTS}, r0, r1):",
        "whole_site = whole_site(q, k, v)",
        "return whole_site, r0, r1",
    ]


def test_split_heads_makes_a_chain_of_head_groups() -> None:
    assert after("split_heads", plan_key(groups=2)) == [
        f"def site({INPUTS}, r0, r1):",
        "output = headinfer.output(handle, q, 0)",
        "group_site = group_site(output, q, k, v, 0)",
        "group_site_1 = group_site(group_site, q, k, v, 1)",
        "return group_site_1, r0, r1",
    ]


def test_chunk_sequence_attends_new_tokens_the_tail_and_each_block() -> None:
    pieces = (PieceKind("tail", True), PieceKind("new", True))
    assert after("chunk_sequence", plan_key(host=1, has_tail=True, pieces=pieces)) == [
        f"def site({INPUTS}, r0, r1):",
        "output = headinfer.output(handle, q, 0)",
        "span_kv = span_kv(k, v, 0, 0, -2)",
        "getitem = span_kv[0]",
        "getitem_1 = span_kv[1]",
        "attend = headinfer.attend(handle, q, getitem, getitem_1, masks, 0, 0, 0, -2, True)",
        "getitem_2 = attend[0]",
        "getitem_3 = attend[1]",
        "span_kv_1 = span_kv(k, v, 0, 0, -1)",
        "getitem_4 = span_kv_1[0]",
        "getitem_5 = span_kv_1[1]",
        "attend_merge = headinfer.attend_merge"
        "(handle, getitem_2, getitem_3, q, getitem_4, getitem_5, masks, 0, 0, 0, -1)",
        "getitem_6 = attend_merge[0]",
        "getitem_7 = attend_merge[1]",
        "span_kv_2 = span_kv(k, v, 0, 0, 0)",
        "getitem_8 = span_kv_2[0]",
        "getitem_9 = span_kv_2[1]",
        "attend_merge_1 = headinfer.attend_merge"
        "(handle, getitem_6, getitem_7, q, getitem_8, getitem_9, masks, 0, 0, 0, 0)",
        "getitem_10 = attend_merge_1[0]",
        "getitem_11 = attend_merge_1[1]",
        "store = headinfer.store(handle, output, getitem_10, 0, 0, 0)",
        "return store, r0, r1",
    ]


def test_what_one_op_attends_is_the_result() -> None:
    key = decode_key(fused=True, resident=2, host=0)
    assert after("insert_transfers", key) == [
        f"def site({INPUTS}, r0, r1):",
        "pack = headinfer.pack(handle, layer, k, v, -1)",
        "attend_resident = headinfer.attend_resident(handle, layer, q, 0, pack, False)",
        "getitem = attend_resident[0]",
        "getitem_1 = attend_resident[1]",
        "return getitem, r0, r1",
    ]


def test_insert_transfers_packs_first_and_gives_a_block_prefetch_wait_and_release() -> None:
    assert after("insert_transfers", plan_key(host=1)) == [
        f"def site({INPUTS}, r0, r1):",
        "pack = headinfer.pack(handle, layer, k, v, 0)",
        "offload = headinfer.offload(handle, layer, pack)",
        "output = headinfer.output(handle, q, 0)",
        "attend = headinfer.attend(handle, q, k, v, masks, 0, 0, 0, -2, True)",
        "getitem_2 = attend[0]",
        "getitem_3 = attend[1]",
        "prefetch = headinfer.prefetch(handle, layer, 0, 0, 0, base, 0, r0)",
        "wait = headinfer.wait(handle, prefetch)",
        "getitem_4 = wait[0]",
        "getitem_5 = wait[1]",
        "attend_merge = headinfer.attend_merge"
        "(handle, getitem_2, getitem_3, q, getitem_4, getitem_5, masks, 0, 0, 0, 0)",
        "getitem_6 = attend_merge[0]",
        "release = headinfer.release(handle, prefetch, getitem_6)",
        "getitem_7 = attend_merge[1]",
        "store = headinfer.store(handle, output, getitem_6, 0, 0, 0)",
        "return store, r1, release",
    ]


def test_hoist_prefetch_takes_transfers_from_the_ring_and_leaves_the_next_ones_there() -> None:
    assert after("hoist_prefetch", decode_key(host=2, following=True)) == [
        f"def site({INPUTS}, r0, r1):",
        "pack = headinfer.pack(handle, layer, k, v, -1)",
        "output = headinfer.output(handle, q, 0)",
        "tail = headinfer.tail(handle, layer, pack)",
        "getitem = tail[0]",
        "getitem_1 = tail[1]",
        "attend = headinfer.attend(handle, q, getitem, getitem_1, masks, 0, 0, 0, -1, True)",
        "getitem_2 = attend[0]",
        "getitem_3 = attend[1]",
        "prefetch_1 = headinfer.prefetch(handle, layer, 0, 0, 1, base, 1, r1)",
        "wait = headinfer.wait(handle, r0)",
        "getitem_4 = wait[0]",
        "getitem_5 = wait[1]",
        "attend_merge = headinfer.attend_merge"
        "(handle, getitem_2, getitem_3, q, getitem_4, getitem_5, masks, 0, 0, 0, 0)",
        "getitem_6 = attend_merge[0]",
        "release = headinfer.release(handle, r0, getitem_6)",
        "getitem_7 = attend_merge[1]",
        "prefetch_2 = headinfer.prefetch(handle, next_layer, 0, 0, 0, base, 2, release)",
        "wait_1 = headinfer.wait(handle, prefetch_1)",
        "getitem_8 = wait_1[0]",
        "getitem_9 = wait_1[1]",
        "attend_merge_1 = headinfer.attend_merge"
        "(handle, getitem_6, getitem_7, q, getitem_8, getitem_9, masks, 0, 0, 0, 1)",
        "getitem_10 = attend_merge_1[0]",
        "release_1 = headinfer.release(handle, prefetch_1, getitem_10)",
        "getitem_11 = attend_merge_1[1]",
        "store = headinfer.store(handle, output, getitem_10, 0, 0, 0)",
        "return store, prefetch_2, release_1",
    ]


def test_a_prologue_starts_the_entry_transfers_and_nothing_else() -> None:
    key = plan_key(host=3, num_slots=3, distance=2)
    text = schedule_text(build_cold(key).graph_module, key)
    assert [line.split("  # ")[0].strip() for line in text.splitlines()[1:]] == [
        f"def site({INPUTS}, r0, r1, r2):",
        "prefetch_default = headinfer.prefetch(handle, layer, 0, 0, 0, base, 0, r0)",
        "prefetch_default_1 = headinfer.prefetch(handle, layer, 0, 0, 1, base, 1, r1)",
        "return None, prefetch_default, prefetch_default_1, r2",
    ]


@given(plan_keys())
@settings(max_examples=150, deadline=None)
def test_any_geometry_gives_a_proved_schedule_that_attends_everything_once(key: PlanKey) -> None:
    gm = build(key).graph_module
    attended: Counter[object] = Counter()
    for node in ops_of(gm, "attend"):
        attended[node.args[6:9]] += 1
    for node in ops_of(gm, "attend_merge"):
        attended[node.args[8:11]] += 1
    attended[0, 0, -4] += len(ops_of(gm, "attend_resident"))
    for node in ops_of(gm, "merge_host"):
        attended[(*node.args[6:8], -5)] += 1
    asked = [node.args[4:] for node in ops_of(gm, "attend_host")]
    assert asked == [(key.resident + key.host, key.cpu)] * bool(key.cpu)
    chunks = [(group, chunk) for group in range(key.groups) for chunk in range(key.chunks)]
    wanted = {(*pair, span) for pair in chunks for span in spans(key, pair[1])}
    assert +attended == Counter(wanted)
    assert [node.args[4:6] for node in ops_of(gm, "store")] == ([] if is_direct(key) else chunks)


@given(plan_keys())
@settings(max_examples=150, deadline=None)
def test_any_geometry_pairs_its_transfers_and_leaves_the_ring_as_promised(key: PlanKey) -> None:
    gm = build(key).graph_module
    prefetches, waits = ops_of(gm, "prefetch"), ops_of(gm, "wait")
    total = len(key.transfers())
    own = [node for node in prefetches if str(node.args[1]) == "layer"]
    ahead = [node for node in prefetches if str(node.args[1]) == "next_layer"]
    assert [str(node.args[1]) for node in waits[: key.entry]] == [f"r{i}" for i in range(key.entry)]
    assert [node.args[1] for node in waits[key.entry :]] == own
    assert [node.args[1] for node in ops_of(gm, "release")] == [node.args[1] for node in waits]
    assert tuple(node.args[2:5] for node in own) == key.transfers()[key.entry :]
    assert tuple(node.args[2:5] for node in ahead) == key.next_transfers
    assert [node.args[6] for node in (*own, *ahead)] == list(
        range(key.entry, total + len(key.next_transfers))
    )
    (out, *ring) = list(gm.graph.nodes)[-1].args[0]
    if is_direct(key):
        assert out.args == (*ops_of(gm, "attend_resident"), 0)
        assert not ops_of(gm, "output")
    else:
        assert out is ops_of(gm, "store")[-1]
    assert ring[: len(ahead)] == ahead
    assert not set(ring[len(ahead) :]) & set(prefetches)


@given(plan_keys())
@settings(max_examples=100, deadline=None)
def test_at_most_distance_plus_one_slots_are_filled_or_read(key: PlanKey) -> None:
    used, most = key.entry, key.entry
    for node in build(key).graph_module.graph.nodes:
        name = getattr(node.target, "_opname", "")
        used += (name == "prefetch") - (name == "release")
        most = max(most, used)
    assert used == len(key.next_transfers)
    if key.host:
        assert most <= max(key.distance + 1, len(key.next_transfers))
    assert most <= key.num_slots


@given(plan_keys())
@settings(max_examples=50, deadline=None)
def test_the_printed_schedule_is_the_schedule(key: PlanKey) -> None:
    text = schedule_text(build(key).graph_module, key)
    parsed, parsed_key = parse_schedule(text, "schedule.py")
    assert parsed_key == key
    assert schedule_text(parsed, key) == text


def test_without_hoisting_each_transfer_starts_where_it_is_needed() -> None:
    config = HeadInferConfig(disable_passes=("hoist_prefetch",))
    gm = build(plan_key(host=3, distance=0), config).graph_module
    names = [getattr(node.target, "_opname", "") for node in gm.graph.nodes]
    starts = [index for index, name in enumerate(names) if name == "prefetch"]
    assert len(starts) == 3
    assert all(names[index + 1] == "wait" for index in starts)


def test_passes_report_ops_and_text_only_when_asked() -> None:
    context = PlanContext(plan_key(), CONFIG)
    _, silent = build_schedule(context, Quiet(), keep_text=False)
    _, told = build_schedule(context, Quiet(), keep_text=True)
    assert [report.name for report in silent] == [report.name for report in told]
    assert not any(report.text or report.ops_changed for report in silent)
    assert all(report.text.startswith(f"# after {report.name}") for report in told)
    (inserted,) = [report for report in told if report.name == "insert_transfers"]
    assert inserted.ops_changed["headinfer.prefetch.default"] == 2
    assert told[-1].nodes_after <= silent[-1].nodes_after


def test_a_schedule_runs_op_by_op_as_printed_and_lets_go_of_what_it_has_used() -> None:
    key = plan_key(host=1)
    code = build(key).function.__code__
    assert code.co_varnames[: code.co_argcount] == (*INPUTS.split(", "), "r0", "r1")
    assert [name for name in code.co_names if name != "headinfer"] == [
        "pack", "offload", "output", "attend", "wait", "attend_merge", "release", "store",
    ]  # fmt: skip


def seconds_of(function: Callable[[], object]) -> float:
    """CPU seconds of the fastest of 7 runs."""
    times = []
    for _ in range(7):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def test_a_thousand_nodes_are_built_and_proved_in_a_tenth_of_a_second() -> None:
    key = plan_key(groups=4, host=28, num_slots=3, distance=2, following=True)
    nodes = build(key).num_nodes
    assert nodes > 900
    seconds = seconds_of(lambda: build(key))
    assert seconds <= 100e-6 * nodes, f"{seconds * 1e3:.1f} ms for {nodes} nodes"


@pytest.mark.parametrize("chunk", [0, 1])
def test_spans_keep_past_and_new_tokens_apart(chunk: int) -> None:
    key = plan_key(chunks=2, resident=1, host=1, has_tail=True)
    expected = [-2, -3, -1, 0, 1] if chunk else [-2, -1, 0, 1]
    assert chunk_sequence.spans(key, chunk) == expected
    assert chunk_sequence.spans(decode_key(resident=1, host=1, has_tail=False), 0) == [-1, 0, 1]
