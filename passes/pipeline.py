"""The order of the passes, and the runner that cleans up, times, dumps and counts."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch._guards import CompileContext
from torch._logging._internal import trace_log, trace_structured
from torch.fx import Graph, GraphModule
from torch.fx.node import has_side_effect

from headinfer_compile.errors import OptionError
from headinfer_compile.passes import (
    chunk_sequence,
    drop_vmap,
    find_attention,
    hoist_prefetch,
    insert_transfers,
    partition,
    place,
    recover_mask,
    split_heads,
    verify,
)
from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import count_ops, has_effect, readable
from headinfer_compile.passes.schedule import PlanContext, PlanKey, Schedule
from headinfer_compile.passes.schedule_code import compile_schedule, remove_unused_items
from headinfer_compile.passes.schedule_text import schedule_text

log = logging.getLogger(__name__)

_C = TypeVar("_C", PassContext, PlanContext)

for _name in ("update_kv", "attention", "pack", "offload", "prefetch", "wait", "release"):
    has_side_effect(getattr(torch.ops.headinfer, _name).default)


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    ops_changed: dict[str, int]
    before: str
    """The graph before the pass; empty where ``text`` is, and before the first of a schedule."""
    text: str
    """The graph after the pass. Of a schedule, empty like ``ops_changed`` unless asked for."""


#: Once per Dynamo graph.
GRAPH_PASSES = (
    (find_attention, "first: everything else works on sites"),
    (recover_mask, "before partition, or the first region would still compute the masks"),
    (drop_vmap, "after recover_mask, which reads through a vmap"),
    (partition, "last on this level: regions are what is left between the sites"),
)

#: Once per plan key.
PLAN_PASSES = (
    (place, "the blocks to attend are the input of everything below"),
    (split_heads, "before chunk_sequence: a block is streamed per head group"),
    (chunk_sequence, "before insert_transfers: transfers are those of the spans it makes"),
    (insert_transfers, "makes the straight order that hoist_prefetch then moves"),
    (hoist_prefetch, "after every transfer has its slot and release"),
)

#: The names in the order they run; ``verify`` proves what the others made, ``lower`` compiles it.
PIPELINE = (
    *(p.__name__.rsplit(".", 1)[1] for p, _ in (*GRAPH_PASSES, *PLAN_PASSES)),
    "verify",
    "lower",
)


class Dump:
    """Writes each graph to ``debug_dir`` as ``NNN_<pass>.py`` and as a tlparse artifact.

    Numbers go on from the files that are there: the graphs of a model share the folder.
    """

    def __init__(self, debug_dir: str | None) -> None:
        self._folder = None if debug_dir is None else Path(debug_dir)
        self._count = 0
        # Schedules are built while the graph runs, outside the frame that they belong to.
        self._compile_id = CompileContext.current_compile_id()
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise OptionError(
                    f"debug_dir={debug_dir!r}: no folder can be made there: {error}"
                ) from error

    @property
    def wanted(self) -> bool:
        """Whether the text of graphs goes anywhere."""
        # Without TORCH_TRACE, torch removes the handler when the first frame is compiled.
        return self._folder is not None or bool(trace_log.handlers)

    def write(self, name: str, text: str) -> None:
        """Dump one graph after pass ``name``."""
        if self._folder is not None:
            found = [re.match(r"(\d+)_", path.name) for path in self._folder.iterdir()]
            self._count = max((int(match[1]) + 1 for match in found if match), default=0)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {
                "name": f"headinfer_{self._count:03d}_{name}",
                "encoding": "string",
            },
            payload_fn=lambda: text,
            compile_id=self._compile_id,
        )
        if self._folder is not None:
            path = self._folder / f"{self._count:03d}_{name}.py"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        self._count += 1


def _run(
    gm: GraphModule,
    ctx: _C,
    name: str,
    run: Callable[[GraphModule, _C], GraphModule],
    text_of: Callable[[GraphModule], str] | None,
    dump: Dump,
    ops_before: dict[str, int] | None,
    before: str,
) -> tuple[GraphModule, PassReport, dict[str, int] | None]:
    """Run one pass; clean up and count only with ``ops_before``, the ops of ``gm``."""
    ctx.pass_name = name
    nodes_before = len(gm.graph.nodes)
    start = time.perf_counter()
    gm = run(gm, ctx)
    changed: dict[str, int] = {}
    after: dict[str, int] | None = None
    if ops_before is not None:
        gm.graph.eliminate_dead_code(has_effect)
        after = count_ops(gm)
        differences = {
            op: after.get(op, 0) - ops_before.get(op, 0) for op in set(ops_before) | set(after)
        }
        changed = {op: differences[op] for op in sorted(differences) if differences[op]}
    seconds = time.perf_counter() - start
    text = ""
    if text_of is not None:
        header = f"# after {name}: {seconds * 1e3:.1f} ms, {len(gm.graph.nodes)} nodes\n"
        text = header + text_of(gm)
        dump.write(name, text)
    log.debug(
        "%s: %d -> %d nodes in %.1f ms", name, nodes_before, len(gm.graph.nodes), seconds * 1e3
    )
    report = PassReport(name, seconds, nodes_before, len(gm.graph.nodes), changed, before, text)
    return gm, report, after


def run_graph_passes(
    gm: GraphModule, ctx: PassContext, dump: Dump, keep_text: bool
) -> tuple[GraphModule, list[PassReport]]:
    """Run ``GRAPH_PASSES`` over a Dynamo graph."""
    text_of = readable if keep_text or dump.wanted else None
    text = ""
    if text_of is not None:
        text = readable(gm)
        dump.write("dynamo", text)
    reports = []
    ops: dict[str, int] | None = count_ops(gm)
    for module, _ in GRAPH_PASSES:
        name = module.__name__.rsplit(".", 1)[1]
        gm, report, ops = _run(gm, ctx, name, module.run, text_of, dump, ops, text)
        text = report.text
        reports.append(report)
    gm.graph.lint()
    gm.recompile()
    return gm, reports


def build_schedule(
    ctx: PlanContext, dump: Dump, keep_text: bool
) -> tuple[Schedule, list[PassReport]]:
    """Build, prove and compile the schedule of ``ctx.key``.

    Raises:
        ScheduleError: The schedule is not proved.
    """
    start = time.perf_counter()
    gm = GraphModule(torch.nn.Module(), Graph())
    text_of = (lambda graph: schedule_text(graph, ctx.key)) if keep_text or dump.wanted else None
    reports, text = [], ""
    # Counts and clean-up after each pass cost more than the passes; they are for who reads them.
    ops: dict[str, int] | None = {} if text_of is not None else None
    for module, _ in PLAN_PASSES:
        name = module.__name__.rsplit(".", 1)[1]
        if name in ctx.config.disable_passes:
            continue
        gm, report, ops = _run(gm, ctx, name, module.run, text_of, dump, ops, text)
        text = report.text
        reports.append(report)
    remove_unused_items(gm)
    if text_of is not None:
        dump.write("schedule", f"# ready for load_schedule\n{text_of(gm)}")
    return finish_schedule(gm, ctx, start), reports


def build_prologue(ctx: PlanContext) -> Schedule:
    """Build, prove and compile the entry transfers of ``ctx.key`` for a site that starts cold."""
    start = time.perf_counter()
    gm = hoist_prefetch.prologue(GraphModule(torch.nn.Module(), Graph()), ctx)
    return finish_schedule(gm, replace(ctx, pass_name="prologue"), start, prologue=True)


def finish_schedule(
    gm: GraphModule, ctx: PlanContext, start: float, prologue: bool = False
) -> Schedule:
    """Verify and compile a schedule graph, built or loaded.

    Raises:
        ScheduleError: The schedule is not proved.
    """
    verify_start = time.perf_counter()
    if ctx.config.verify:
        verify.run(gm, ctx.key, prologue=prologue)
    verify_seconds = time.perf_counter() - verify_start
    key: PlanKey = ctx.key
    return Schedule(
        key=key,
        graph_module=gm,
        function=compile_schedule(gm),
        num_transfers=0 if prologue else len(key.transfers()),
        entry=0 if prologue else key.entry,
        exit=key.entry if prologue else len(key.next_transfers),
        build_seconds=time.perf_counter() - start,
        verify_seconds=verify_seconds,
    )


def reasons() -> Sequence[tuple[str, str]]:
    """Pass names with the reason for their position."""
    return [(m.__name__.rsplit(".", 1)[1], why) for m, why in (*GRAPH_PASSES, *PLAN_PASSES)]
