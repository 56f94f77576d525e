"""What ``explain`` returns: the sites, passes, regions, schedules and bytes of a model, as data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headinfer_compile.executor import GraphReport
from headinfer_compile.html_page import page
from headinfer_compile.passes.context import AttentionSite, Decline
from headinfer_compile.passes.pipeline import PassReport
from headinfer_compile.passes.schedule import Schedule
from headinfer_compile.passes.schedule_text import schedule_text
from headinfer_compile.planner import Plan
from headinfer_compile.prediction import Prediction
from headinfer_compile.report_text import render
from headinfer_compile.site_ops import SiteOp, StepShape
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
    ops: tuple[SiteOp, ...]
    """What each op touches and waits for."""

    @cached_property
    def text(self) -> str:
        """The schedule as code with the stream of each op, as ``load_schedule`` reads it."""
        return schedule_text(self.schedule.graph_module, self.schedule.key)


@dataclass(frozen=True)
class SiteRun:
    """One site of a step."""

    layer: int
    schedule: int
    """Index of the schedule it runs, in the step's."""
    base: int
    """The ring slot that slot 0 of its ops is."""


@dataclass(frozen=True)
class HeadGroupChoice:
    """What the step would be with another head group."""

    head_group: int
    chosen: bool
    groups: int
    slot_tokens: int
    transfers: int
    """Over all sites, like ``h2d_bytes``."""
    transfer_bytes: int
    """Of the largest transfer."""
    slot_bytes: int
    """Of all slots."""
    h2d_bytes: int
    prediction: Prediction


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
    cpu_bytes: int
    """K and V that the CPU attends where they lie."""
    cpu_kernel: str | None
    """Where the kernel that does so comes from; None where none does."""
    schedules: tuple[SiteSchedule, ...]
    sites: tuple[SiteRun, ...]
    """In the order they run."""
    shape: StepShape
    prediction: Prediction
    choices: tuple[HeadGroupChoice, ...]
    reasons: Mapping[str, str]
    """Why the numbers of the options are what they are, by option and phase."""


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

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs no network and works from a file.

        Args:
            path: Of the file; its folder has to exist.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(page(self), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The same as nested dicts, lists, strings and numbers, without the text of the graphs."""
        return {
            "title": self.title,
            "graphs": [_graph_json(graph) for graph in self.graphs],
            "storage": dataclasses.asdict(self.storage),
            "plan": None if self.plan is None else self.plan.to_json(),
        }


def _graph_json(graph: GraphExplanation) -> dict[str, Any]:
    report = graph.report
    return {
        "name": graph.name,
        "sites": [
            {**_fields(site, "mask"), "mask": site.mask.formula if site.mask else None}
            for site in report.sites
        ],
        "declines": [dataclasses.asdict(entry) for entry in report.declines],
        "passes": [_fields(entry, "before", "text") for entry in report.passes],
        "regions": [dataclasses.asdict(region) for region in report.regions.regions],
        "unique_regions": report.regions.num_unique,
        "calls": [dataclasses.asdict(call) for call in graph.calls],
        "step": None if graph.step is None else _step_json(graph.step),
    }


def _step_json(step: StepPlan) -> dict[str, Any]:
    return {
        **_fields(step, "schedules", "sites", "shape", "prediction", "choices"),
        "schedules": [
            {
                "layers": list(item.layers),
                "key": dataclasses.asdict(item.schedule.key),
                "build_seconds": item.schedule.build_seconds,
                "verify_seconds": item.schedule.verify_seconds,
                "passes": [_fields(entry, "before", "text") for entry in item.passes],
                "text": item.text,
                "ops": [dataclasses.asdict(op) for op in item.ops],
            }
            for item in step.schedules
        ],
        "sites": [dataclasses.asdict(site) for site in step.sites],
        "prediction": prediction_json(step.prediction),
        "head_groups": [
            {**_fields(choice, "prediction"), "prediction": prediction_json(choice.prediction)}
            for choice in step.choices
        ],
    }


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """The figures of a prediction, without its time line."""
    return {
        **_fields(prediction, "machine", "sites", "regions", "began"),
        "link_utilisation": prediction.link_utilisation,
        "limit": prediction.limit,
        "machine": prediction.machine.name,
        "rates": prediction.machine.source,
    }


def _fields(item: Any, *left_out: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(item) if f.name not in left_out]
    return {name: getattr(item, name) for name in names}
