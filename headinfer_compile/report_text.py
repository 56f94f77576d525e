"""An ``Explanation`` as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from headinfer_compile.config import format_bytes
from headinfer_compile.passes.context import AttentionSite
from headinfer_compile.passes.pipeline import PassReport
from headinfer_compile.prediction import OpTime, Prediction
from headinfer_compile.stats import CacheStats

if TYPE_CHECKING:
    from headinfer_compile.explanation import (
        Call,
        Explanation,
        GraphExplanation,
        SiteSchedule,
        StepPlan,
    )

_MAX_PERIOD = 32
"""Calls of the longest pattern of layers that is recognised as repeating."""
_MAX_CODE_LINES = 120
_MAX_OPS = 6
_LANE_COLUMNS = 72
_LIMITS = {
    "link": "the link",
    "attention": "attention",
    "weights": "the products with weights",
}


def render(explanation: Explanation) -> str:
    """The report: each graph with its sites, passes, model graph, plan and schedules; the bytes."""
    lines = [explanation.title]
    for graph in explanation.graphs:
        lines += ["", f"== {graph.name} =="]
        for title, body in (
            ("attention sites", site_lines(graph)),
            ("passes", _passes(graph.report.passes, graph.report.regions.num_regions)),
            ("model graph", _model_graph(graph)),
        ):
            lines += [title, *(f"  {line}" for line in body)]
        if graph.step is not None:
            lines += ["plan", *(f"  {line}" for line in _plan(graph.step))]
            lines += ["predicted", *(f"  {line}" for line in _predicted(graph.step))]
            for index, item in enumerate(graph.step.schedules):
                lines += _schedule(item, graph.step.schedules[:index])
    lines += ["", "== bytes ==", *(f"  {line}" for line in _storage(explanation))]
    if explanation.plan is not None:
        lines += ["", "== plan ==", *(f"  {line}" for line in str(explanation.plan).splitlines())]
    return "\n".join(lines) + "\n"


def ranges(numbers: Sequence[int]) -> str:
    """Text such as ``0-3, 7`` for 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def site_lines(graph: GraphExplanation) -> Iterator[str]:
    """The attentions of a graph, those alike told once, and what was left alone."""
    alike: dict[tuple[object, ...], list[AttentionSite]] = {}
    for site in graph.report.sites:
        shape = (site.num_heads, site.num_kv_heads, site.head_dim, site.v_head_dim, site.scale)
        alike.setdefault((*shape, site.mask, site.source), []).append(site)
    for sites in alike.values():
        site, form = sites[0], sites[0].mask
        assert form is not None
        dims = f"{site.head_dim}" if site.head_dim == site.v_head_dim else (
            f"{site.head_dim} (V: {site.v_head_dim})"
        )  # fmt: skip
        yield (
            f"{len(sites)} rewritten, layers {ranges([s.layer for s in sites])}: {site.num_heads} "
            f"query heads over {site.num_kv_heads} KV heads of {dims}, scale {site.scale:.6g}"
        )
        how = "proved" if form.expr is None else "not a known form: evaluated for each KV block"
        yield f"  mask: {form.formula} ({how})"
        yield f"  at {site.source}"
    for decline in graph.report.declines:
        yield f"declined by {decline.pass_name}: {decline.node}: {decline.reason}"
        yield f"  at {decline.source}"
    if not graph.report.sites:
        yield "none rewritten: every layer attends exact K and V copied to the device in full"


def _passes(reports: Sequence[PassReport], num_regions: int = 0) -> Iterator[str]:
    for entry in reports:
        changed = sorted(entry.ops_changed.items(), key=lambda item: -abs(item[1]))
        ops = ", ".join(f"{count:+d} {_short(op)}" for op, count in changed[:_MAX_OPS])
        if len(changed) > _MAX_OPS:
            ops += f", and {len(changed) - _MAX_OPS} more kinds"
        if entry.name == "partition":
            ops = f"ops moved into {num_regions} regions"
        nodes = f"{entry.nodes_before:,} -> {entry.nodes_after:,} nodes"
        time = f"{entry.seconds * 1e3:8.1f} ms"
        yield f"{entry.name:<17}{time}  {nodes:<24}  {ops or 'no op changed'}"


def _short(op: str) -> str:
    """An op's name without the module it lives in, and without the one overload it has."""
    op = op.removesuffix(".default")
    return op if op.startswith(("headinfer.", ".", "self.")) else op.rsplit(".", 1)[-1]


def _model_graph(graph: GraphExplanation) -> Iterator[str]:
    regions = graph.report.regions
    yield f"{regions.num_regions} regions, {regions.num_unique} of them unique"
    nodes = {region.name: region.num_nodes for region in regions.regions}

    def line(call: Call) -> str:
        if call.kind == "region":
            return f"{call.name:<12} {nodes[call.name]} nodes, structure {call.same_as}"
        return f"{call.name:<12} layer {call.layer}, {call.same_as}"

    calls = list(graph.calls)
    labels = [(call.kind, call.same_as) for call in calls]
    at = 0
    while at < len(calls):
        period, times = _repetition(labels, at)
        if times > 1:
            last = calls[at + period * times - 1].name
            yield f"{times} times, to {last}:"
        for call in calls[at : at + period]:
            yield f"  {line(call)}" if times > 1 else line(call)
        at += period * times


def _repetition(labels: Sequence[object], at: int) -> tuple[int, int]:
    """Length and count of the pattern at ``at`` that covers the most; (1, 1) if nothing repeats."""
    best = (1, 1)
    for period in range(1, min(_MAX_PERIOD, (len(labels) - at) // 2) + 1):
        pattern, times = labels[at : at + period], 1
        while labels[at + period * times : at + period * (times + 1)] == pattern:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _plan(step: StepPlan) -> Iterator[str]:
    key = step.schedules[0].schedule.key
    ahead = f"{key.distance} ahead" if key.distance else "none ahead"
    yield (
        f"{step.phase} layout: head group {step.head_group} ({key.groups} per site), "
        f"{key.num_slots} slots of {step.slot_tokens:,} tokens, transfers {ahead}"
    )
    for name in (f"head_group.{step.phase}", "num_slots"):
        yield f"{name}: {step.reasons[name]}"
    if key.chunks > 1:
        yield f"queries in {key.chunks} chunks of up to {step.query_chunk:,}, each streams the KV"
    for item in step.schedules:
        key = item.schedule.key
        parts = [] if key.one_query else ["the new tokens"]
        parts += ["the tail"] if key.has_tail or key.one_query else []
        parts.append(f"{key.resident} resident and {key.host} host KV blocks")
        parts += [f"{key.cpu} on the CPU"] if key.cpu else []
        yield f"layers {ranges(item.layers)} attend {', '.join(parts)}"
    for where, count in (("device", step.h2d_bytes), ("host", step.d2h_bytes)):
        yield f"moves to the {where:<6} {format_bytes(count):>10} a step ({count:,} bytes)"
    if step.cpu_bytes:
        count = step.cpu_bytes
        yield f"attends on the CPU  {format_bytes(count):>10} a step ({count:,} bytes)"
        yield f"kernel on the CPU: {step.cpu_kernel}"


def _predicted(step: StepPlan) -> Iterator[str]:
    """The time of the step, what limits it, a site in the middle, and other head groups."""
    found = step.prediction
    yield (
        f"{format_seconds(found.seconds)} a step, limited by {_LIMITS[found.limit]}; the link is "
        f"busy {found.link_utilisation:.0%} of it, compute waits for it "
        f"{format_seconds(found.exposed_wait_seconds)}"
    )
    yield f"for {found.machine.name}, rates {found.machine.source}"
    yield from lanes(found)
    chosen = next(choice for choice in step.choices if choice.chosen)
    for choice in step.choices:
        note = "this plan" if choice.chosen else (
            f"{choice.prediction.seconds / chosen.prediction.seconds:.2f} x the time"
        )  # fmt: skip
        yield (
            f"head_group={choice.head_group:<3} {choice.transfers:>6,} transfers of up to "
            f"{format_bytes(choice.transfer_bytes):>9}, slots {format_bytes(choice.slot_bytes):>9},"
            f" {format_seconds(choice.prediction.seconds):>9}: {note}"
        )


def format_seconds(seconds: float) -> str:
    """A time as text, such as ``3.1 ms``."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.2f} s"


def lanes(prediction: Prediction) -> Iterator[str]:
    """A site in the middle of the step, one line a stream: ``#`` is busy, ``.`` is idle."""
    site = prediction.sites[len(prediction.sites) // 2]
    width = (site.end - site.start) / _LANE_COLUMNS
    if width <= 0:
        return
    streams: dict[str, list[OpTime]] = {}
    for time in (time for found in prediction.sites for time in found.ops):
        streams.setdefault(time.op.stream, []).append(time)
    yield f"layer {site.layer}, {format_seconds(site.end - site.start)} from left to right:"
    for stream, times in streams.items():
        cells = ""
        for column in range(_LANE_COLUMNS):
            low, high = site.start + column * width, site.start + (column + 1) * width
            busy = sum(max(0.0, min(t.end, high) - max(t.start, low)) for t in times)
            cells += "#" if busy >= 0.5 * width else ":" if busy else "."
        yield f"  {stream:<8}{cells}"


def _schedule(item: SiteSchedule, before: Sequence[SiteSchedule]) -> Iterator[str]:
    schedule = item.schedule
    yield (
        f"schedule of layers {ranges(item.layers)}: {schedule.num_nodes} nodes, "
        f"{schedule.num_transfers} transfers, built in {schedule.build_seconds * 1e3:.1f} ms, "
        f"of it {schedule.verify_seconds * 1e3:.1f} ms of proof"
    )
    for line in _passes(item.passes):
        yield f"  {line}"
    for other in before:
        changes = _changes(other, item)
        if changes and set(changes) <= {"next_transfers"}:
            yield (
                f"  as that of layers {ranges(other.layers)}, but with "
                f"{len(schedule.key.next_transfers)} transfers started for the next site"
            )
            return
    code = item.text.splitlines()
    left_out = len(code) - _MAX_CODE_LINES
    if left_out > 1:
        half = _MAX_CODE_LINES // 2
        code[half:-half] = [f"    ... {left_out} more lines, all of them in Explanation.schedules"]
    yield from (f"  {line}" for line in code)


def _changes(a: SiteSchedule, b: SiteSchedule) -> list[str]:
    first, second = vars(a.schedule.key), vars(b.schedule.key)
    return [name for name in first if first[name] != second[name]]


def _storage(explanation: Explanation) -> Iterator[str]:
    stats = explanation.storage
    tiers = ", ".join(f"{count} on the {tier}" for tier, count in stats.blocks_by_tier.items())
    yield f"tokens           {stats.tokens:,}, in {tiers or 'no'} token blocks"
    for name, count, note in storage_rows(stats):
        yield f"{name:<16} {format_bytes(count):>10}  {note}".rstrip()


def storage_rows(stats: CacheStats) -> tuple[tuple[str, int, str], ...]:
    """Where the bytes are: name, bytes and a note."""
    return (
        ("KV", stats.kv_bytes, "of these tokens"),
        ("host pages", stats.host_bytes, f"in slabs of up to {format_bytes(stats.slab_bytes)}"),
        ("resident blocks", stats.resident_bytes, "what gpu_budget bounds"),
        ("fixed", stats.fixed_bytes, "the same at any context:"),
        ("  slots", stats.slot_bytes, ""),
        ("  staging", stats.staging_bytes, ""),
        ("  tail", stats.tail_bytes, ""),
        ("workspace", stats.workspace_bytes, "of attention, at most"),
    )
