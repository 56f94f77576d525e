"""An ``Explanation`` as the data that its page draws: facts once, times per layer, texts short."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from headinfer_compile.config import format_bytes
from headinfer_compile.html_diff import pass_diff, region_code
from headinfer_compile.prediction import OpTime, Prediction
from headinfer_compile.report_text import ranges, site_lines, storage_rows
from headinfer_compile.site_ops import ring_tokens

if TYPE_CHECKING:
    from headinfer_compile.explanation import Explanation, GraphExplanation, SiteSchedule, StepPlan
    from headinfer_compile.passes.pipeline import PassReport
    from headinfer_compile.planner import Plan


def page_data(explanation: Explanation) -> dict[str, Any]:
    """Nested dicts, lists, strings and numbers; times in microseconds from the step's start."""
    return {
        "title": explanation.title,
        "graphs": [_graph(graph) for graph in explanation.graphs],
        "storage": [
            {"name": name.strip(), "bytes": count, "text": format_bytes(count), "note": note}
            for name, count, note in storage_rows(explanation.storage)
        ],
        "tokens": explanation.storage.tokens,
        "plan": None if explanation.plan is None else _plan(explanation.plan),
        "tiers": explanation.storage.blocks_by_tier,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "machine": f"{plan.machine.name}, rates {plan.machine.source}",
        "prefill_us": plan.prefill_seconds * 1e6,
        "token_us": plan.seconds_per_token * 1e6,
        "context": plan.context,
        "limits": dict(plan.limits),
        "roofline": [dataclasses.asdict(row) for row in plan.roofline],
    }


def _graph(graph: GraphExplanation) -> dict[str, Any]:
    report = graph.report
    code = region_code(report.passes[-1]) if report.passes else {}
    nodes = {region.name: region.num_nodes for region in report.regions.regions}
    return {
        "name": graph.name,
        "sites": list(site_lines(graph)),
        "declined": len(report.declines),
        "regions": report.regions.num_regions,
        "unique": report.regions.num_unique,
        "passes": [_pass(entry) for entry in report.passes],
        "calls": [
            {
                "kind": call.kind,
                "name": call.name,
                "same": call.same_as,
                "layer": call.layer,
                "nodes": nodes.get(call.name),
            }
            for call in graph.calls
        ],
        "code": {
            region.key: code.get(region.name, "")
            for region in report.regions.regions
            if region.shared_with == region.name
        },
        "step": None if graph.step is None else _step(graph.step),
    }


def _pass(entry: PassReport) -> dict[str, Any]:
    diff = pass_diff(entry)
    return {
        "name": entry.name,
        "ms": round(entry.seconds * 1e3, 2),
        "nodes": [entry.nodes_before, entry.nodes_after],
        "ops": entry.ops_changed,
        "hunks": [{"lines": hunk.lines, "times": hunk.times} for hunk in diff.hunks],
        "left_out": diff.left_out,
    }


def _step(step: StepPlan) -> dict[str, Any]:
    prediction = step.prediction
    began = prediction.began
    site_times = {site.layer: site for site in prediction.sites}

    def pair(start: float, end: float) -> list[float]:
        return [round((start - began) * 1e6, 2), round((end - began) * 1e6, 2)]

    def copies(times: tuple[OpTime, ...]) -> list[dict[str, Any]]:
        return [{**_op(t.op), "time": pair(t.start, t.end)} for t in times]

    sites = []
    for site in step.sites:
        time = site_times[site.layer]
        count = len(time.ops) - len(step.schedules[site.schedule].ops)
        sites.append(
            {
                **dataclasses.asdict(site),
                "time": pair(time.start, time.end),
                "cold": copies(time.ops[:count]),
                "times": [pair(t.start, t.end) for t in time.ops[count:]],
            }
        )
    key = step.schedules[0].schedule.key
    return {
        "past": step.past,
        "new": step.new,
        "phase": step.phase,
        "head_group": step.head_group,
        "why_head_group": step.reasons[f"head_group.{step.phase}"],
        "slot_tokens": step.slot_tokens,
        "query_chunk": step.query_chunk,
        "num_slots": key.num_slots,
        "distance": key.distance,
        "h2d_bytes": step.h2d_bytes,
        "d2h_bytes": step.d2h_bytes,
        "chained": bool(step.schedules[-1].schedule.key.next_transfers),
        "schedules": [_schedule(item) for item in step.schedules],
        "sites": sites,
        "regions": [[r.name, *pair(r.start, r.end)] for r in prediction.regions],
        "prediction": _prediction(prediction),
        "machine": f"{prediction.machine.name}, rates {prediction.machine.source}",
        "choices": [
            {
                **{
                    field.name: getattr(choice, field.name)
                    for field in dataclasses.fields(choice)
                    if field.name != "prediction"
                },
                **_prediction(choice.prediction),
            }
            for choice in step.choices
        ],
    }


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "us": prediction.seconds * 1e6,
        "limit": prediction.limit,
        "link": prediction.link_utilisation,
        "exposed_us": prediction.exposed_wait_seconds * 1e6,
        "attention_us": prediction.attention_seconds * 1e6,
        "region_us": prediction.region_seconds * 1e6,
        "h2d_us": prediction.h2d_seconds * 1e6,
        "d2h_us": prediction.d2h_seconds * 1e6,
    }


def _schedule(item: SiteSchedule) -> dict[str, Any]:
    schedule = item.schedule
    return {
        "layers": ranges(item.layers),
        "first": item.layers[0],
        "nodes": schedule.num_nodes,
        "transfers": schedule.num_transfers,
        "entry": schedule.entry,
        "exit": schedule.exit,
        "build_ms": round(schedule.build_seconds * 1e3, 2),
        "verify_ms": round(schedule.verify_seconds * 1e3, 2),
        "text": item.text,
        "returns": ring_tokens(schedule),
        "passes": [_pass(entry) for entry in item.passes],
        "ops": [_op(op) for op in item.ops],
    }


def _op(op: Any) -> dict[str, Any]:
    """The facts of an op, without those that are empty."""
    facts = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
    facts["after"] = [[edge.op, edge.stream, edge.event] for edge in op.after]
    return {name: value for name, value in facts.items() if value not in (None, 0, "", (), [])} | {
        name: facts[name] for name in ("group", "chunk", "block", "slot") if facts[name] == 0
    }
