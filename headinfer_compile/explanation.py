"""What ``explain`` returns: the sites, passes, regions, schedules and bytes of a model, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from headinfer_compile.executor import GraphReport
from headinfer_compile.passes.context import AttentionSite, Decline
from headinfer_compile.passes.pipeline import PassReport
from headinfer_compile.passes.schedule import Schedule
from headinfer_compile.passes.schedule_text import schedule_text
from headinfer_compile.planner import Plan
from headinfer_compile.report_text import render
from headinfer_compile.stats import CacheStats


@dataclass(frozen=True)
class Call:
    """One call of the model graph: a region, a site, or a cache update that was left alone."""

    kind: Literal["region", "site", "update_kv"]
    name: str
    same_as: str
    """Calls that say the same here run the same code: a region's structure, a site's class."""
    layer: int | None = None


@dataclass(frozen=True)
class SiteSchedule:
    """The schedule that some sites of one step run."""

    layers: tuple[int, ...]
    schedule: Schedule
    passes: tuple[PassReport, ...]
    """The passes that built it, with the text after each."""

    @cached_property
    def text(self) -> str:
        """The schedule as code with the stream of each op, as ``load_schedule`` reads it."""
        return schedule_text(self.schedule.graph_module, self.schedule.key)


@dataclass(frozen=True)
class StepPlan:
    """What one forward pass attends and moves."""

    past: int
    """Tokens in the cache before."""
    new: int
    phase: Literal["prefill", "decode"]
    head_group: int
    slot_tokens: int
    query_chunk: int
    """Query tokens attended at once."""
    h2d_bytes: int
    """Over all sites, in a step like the ones before and after it."""
    d2h_bytes: int
    schedules: tuple[SiteSchedule, ...]


@dataclass(frozen=True)
class GraphExplanation:
    """One Dynamo graph: what the passes made of it, and the step it was traced in."""

    name: str
    report: GraphReport
    calls: tuple[Call, ...]
    """The model graph, in order."""
    step: StepPlan | None
    """None where no attention could be rewritten."""


@dataclass(frozen=True)
class Explanation:
    """What the compiler does with a model; ``str()`` is a report, ``to_json()`` plain data."""

    title: str
    graphs: tuple[GraphExplanation, ...]
    storage: CacheStats
    """The bytes of the cache afterwards; on the meta device what they would be."""
    plan: Plan | None = None
    """Bytes and seconds on this machine; None where a call was explained, or it does not fit."""

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The attentions that were rewritten, graph by graph."""
        return tuple(site for graph in self.graphs for site in graph.report.sites)

    @property
    def declines(self) -> tuple[Decline, ...]:
        """What the passes left alone, graph by graph."""
        return tuple(entry for graph in self.graphs for entry in graph.report.declines)

    @property
    def schedules(self) -> tuple[SiteSchedule, ...]:
        """The site schedules, graph by graph."""
        return tuple(s for graph in self.graphs if graph.step for s in graph.step.schedules)

    def __str__(self) -> str:
        return render(self)

    def to_json(self) -> dict[str, Any]:
        """The same as nested dicts, lists, strings and numbers, without the text of the graphs."""
        return {
            "title": self.title,
            "graphs": [_graph_json(graph) for graph in self.graphs],
            "storage": dataclasses.asdict(self.storage),
            "plan": None if self.plan is None else self.plan.to_json(),
        }


def _graph_json(graph: GraphExplanation) -> dict[str, Any]:
    report, step = graph.report, None
    if graph.step is not None:
        step = {
            **_fields(graph.step, "schedules"),
            "schedules": [
                {
                    "layers": list(item.layers),
                    "key": dataclasses.asdict(item.schedule.key),
                    "build_seconds": item.schedule.build_seconds,
                    "verify_seconds": item.schedule.verify_seconds,
                    "passes": [_fields(entry, "text") for entry in item.passes],
                    "text": item.text,
                }
                for item in graph.step.schedules
            ],
        }
    return {
        "name": graph.name,
        "sites": [
            {**_fields(site, "mask"), "mask": site.mask.formula if site.mask else None}
            for site in report.sites
        ],
        "declines": [dataclasses.asdict(entry) for entry in report.declines],
        "passes": [_fields(entry, "text") for entry in report.passes],
        "regions": [dataclasses.asdict(region) for region in report.regions.regions],
        "unique_regions": report.regions.num_unique,
        "calls": [dataclasses.asdict(call) for call in graph.calls],
        "step": step,
    }


def _fields(item: Any, *left_out: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(item) if f.name not in left_out]
    return {name: getattr(item, name) for name in names}
