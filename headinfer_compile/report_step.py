"""One step of a watched graph as data: its schedules, bytes, prediction, and other head groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.explanation import HeadGroupChoice, SiteRun, SiteSchedule, StepPlan
from headinfer_compile.machine import Machine
from headinfer_compile.passes.pipeline import Dump, build_schedule
from headinfer_compile.passes.schedule import PlanContext, PlanKey, Schedule
from headinfer_compile.plan_key import chained_key
from headinfer_compile.prediction import Prediction, RegionWork, StepCall, predict
from headinfer_compile.report_graphs import RecordedGraph
from headinfer_compile.runtime.host_build import library_origin
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.step import Step
from headinfer_compile.site_ops import SiteOp, StepShape, site_ops


def explain_step(graph: RecordedGraph, machine: Machine) -> StepPlan | None:
    """The step that ``graph`` has run last; None where no attention was rewritten."""
    session, step = graph.session, graph.step
    if session is None or step is None:
        return None
    geometry = session.geometry
    assert geometry is not None
    layout = session.layout(step.phase)
    shape = StepShape(step, tuple(graph.specs), geometry, layout.head_group, session.config.slots)
    order = list(dict.fromkeys(graph.keys.values()))
    schedules = []
    for key in order:
        # What has run is built again for the text of its passes, and has been dumped already.
        dump = Dump(None) if key in graph.schedules else graph.dump
        built, passes = build_schedule(PlanContext(key, session.config), dump, keep_text=True)
        schedule = session.schedule_overrides.get(key) or graph.schedules.get(key, built)
        layers = tuple(graph.sites[i].layer for i, found in graph.keys.items() if found == key)
        ops = site_ops(schedule, shape)
        schedules.append(SiteSchedule(layers, schedule, tuple(passes), ops))
    d2h_rows = sum(
        segment.rows
        for piece in step.pieces
        for segment in piece.segments
        if segment.block.tier == "host"
    )
    regions = graph.regions(geometry.batch * step.new)
    built_ops = {key: (item.schedule, item.ops) for key, item in zip(order, schedules, strict=True)}
    return StepPlan(
        past=step.past,
        new=step.new,
        phase=step.phase,
        head_group=layout.head_group,
        slot_tokens=layout.slot_tokens,
        query_chunk=max(step.query_chunk.values()),
        h2d_bytes=_streamed_bytes(graph.keys.values(), shape),
        cpu_bytes=_cpu_bytes(graph.keys.values(), shape),
        cpu_kernel=library_origin() if any(key.cpu for key in graph.keys.values()) else None,
        d2h_bytes=d2h_rows * geometry.layer_token_bytes * len(graph.keys),
        schedules=tuple(schedules),
        sites=tuple(
            SiteRun(graph.sites[index].layer, order.index(key), graph.bases[index])
            for index, key in graph.keys.items()
        ),
        shape=shape,
        prediction=_predict(graph, graph.keys, built_ops, regions, machine),
        choices=tuple(_choices(graph, session, step, regions, machine)),
        reasons=dict(session.reasons),
    )


def _streamed_bytes(keys: Iterable[PlanKey], shape: StepShape) -> int:
    """Bytes to the device in a step like the ones before and after it."""
    rows = sum(
        key.chunks
        * sum(b.rows for b in shape.blocks(key.spec)[key.resident : key.resident + key.host])
        for key in keys
    )
    return rows * shape.geometry.layer_token_bytes


def _cpu_bytes(keys: Iterable[PlanKey], shape: StepShape) -> int:
    """Bytes that the CPU attends in the step."""
    rows = sum(
        sum(b.rows for b in shape.blocks(key.spec)[key.resident + key.host :])
        for key in keys
        if key.cpu
    )
    return rows * shape.geometry.layer_token_bytes


def _predict(
    graph: RecordedGraph,
    keys: Mapping[int, PlanKey],
    built: Mapping[PlanKey, tuple[Schedule, Sequence[SiteOp]]],
    regions: Mapping[str, RegionWork],
    machine: Machine,
) -> Prediction:
    calls: list[StepCall] = []
    for node in graph.graph_module.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target in regions:
            calls.append(regions[target])
        elif node.op == "call_module":
            index = int(target.removeprefix("site_"))
            calls.append((graph.sites[index].layer, *built[keys[index]]))
    return predict(calls, machine, chained=bool(list(keys.values())[-1].next_transfers))


@contextmanager
def _planning(session: Session, step: Step, config: HeadInferConfig) -> Iterator[Step]:
    """Let the session plan ``step`` anew under ``config``; afterwards it is as before."""
    before = session.step, session.config, session.counters.workspace_bytes
    session.step = replace(step, blocks={}, query_chunk={})
    session.config = config
    try:
        yield session.step
    finally:
        session.step, session.config, session.counters.workspace_bytes = before


def _choices(
    graph: RecordedGraph,
    session: Session,
    step: Step,
    regions: Mapping[str, RegionWork],
    machine: Machine,
) -> Iterator[HeadGroupChoice]:
    """The step under every head group that is a power of two, all heads, or the one chosen."""
    geometry = session.geometry
    assert geometry is not None
    heads, chosen = geometry.num_kv_heads, session.layout(step.phase).head_group
    sizes = {1 << power for power in range(heads.bit_length()) if 1 << power <= heads}
    for size in sorted(sizes | {heads, chosen}):
        config = replace(session.config, head_group=size)
        with _planning(session, step, config) as planned:
            specs = graph.site_specs
            keys = {
                index: chained_key(
                    session, specs[index], specs[index + 1] if index + 1 < len(specs) else None,
                    specs[0], config,
                )
                for index in graph.keys
            }  # fmt: skip
            layout = session.layout(step.phase)
        shape = StepShape(planned, tuple(graph.specs), geometry, layout.head_group, config.slots)
        built = {}
        for key in dict.fromkeys(keys.values()):
            schedule, _ = build_schedule(PlanContext(key, config), Dump(None), keep_text=False)
            built[key] = schedule, site_ops(schedule, shape)
        ops = [op for key in keys.values() for op in built[key][1] if op.op == "wait"]
        yield HeadGroupChoice(
            head_group=size,
            chosen=size == chosen,
            groups=-(-heads // size),
            slot_tokens=layout.slot_tokens,
            transfers=len(ops),
            transfer_bytes=max((op.slot_bytes for op in ops), default=0),
            slot_bytes=config.slots * size * layout.slot_tokens * geometry.head_token_bytes,
            h2d_bytes=_streamed_bytes(keys.values(), shape),
            prediction=_predict(graph, keys, built, regions, machine),
        )
