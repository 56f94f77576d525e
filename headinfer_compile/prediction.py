"""When each op of a step runs, predicted from a few rates: streams in order, events between them.

The model is small on purpose: a stream runs its ops in order, an op starts when its stream is free
and the events it waits for have come, and it takes the longest of its link bytes, memory bytes and
FLOP at the machine's rates. The host is taken to be ahead of the streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headinfer_compile.machine import Machine, Rates
from headinfer_compile.passes.schedule import Schedule
from headinfer_compile.site_ops import SiteOp, ring_tokens

_LEAST_SECONDS = 3e-6
"""What a kernel or copy takes however small it is; assumed."""


def op_seconds(op: SiteOp, rates: Rates) -> float:
    """Seconds that an op takes on its stream; an op that only records or waits takes none."""
    if op.stream == "cpu":
        return max(op.memory_bytes / rates.dram_beside_link, _LEAST_SECONDS)
    attention = rates.causal if op.causal else rates.attention
    needs = [op.memory_bytes / rates.hbm, op.flop / attention]
    if op.link_bytes:
        rate = rates.link(op.link_bytes) if op.stream == "h2d" else rates.d2h[-1][1]
        needs.append(op.link_bytes / rate)
    longest = max(needs)
    return max(longest, _LEAST_SECONDS) if longest else 0.0


@dataclass(frozen=True)
class RegionWork:
    """What a region between two sites needs, at least."""

    name: str
    weight_bytes: int
    flop: int
    known_seconds: float | None = None
    """Its time, where it was measured."""

    def seconds(self, rates: Rates) -> float:
        """Time to read the weights once or to multiply by them, whichever is longer."""
        if self.known_seconds is not None:
            return self.known_seconds
        return max(self.weight_bytes / rates.hbm, self.flop / rates.matmul, _LEAST_SECONDS)


@dataclass(frozen=True)
class OpTime:
    """When an op runs, in seconds."""

    op: SiteOp
    start: float
    end: float
    waited: float = 0.0
    """How long its stream stood still for an event before it."""


@dataclass(frozen=True)
class SiteTime:
    """A site of the step."""

    layer: int
    start: float
    end: float
    ops: tuple[OpTime, ...]


@dataclass(frozen=True)
class RegionTime:
    """A region of the step, on compute."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Prediction:
    """A predicted step."""

    machine: Machine
    began: float
    """When the step begins on the clock of all times below, in seconds."""
    seconds: float
    sites: tuple[SiteTime, ...]
    regions: tuple[RegionTime, ...]
    attention_seconds: float
    """Compute busy with ops of the sites."""
    region_seconds: float
    h2d_seconds: float
    d2h_seconds: float
    exposed_wait_seconds: float
    """Compute stood still for transfers."""

    @property
    def link_utilisation(self) -> float:
        """Share of the step in which the link to the device is busy, 0 to 1."""
        return self.h2d_seconds / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """What takes most of the step: ``link``, ``attention`` or ``weights``."""
        busy = {
            "link": max(self.h2d_seconds, self.d2h_seconds),
            "attention": self.attention_seconds,
            "weights": self.region_seconds,
        }
        compute = self.attention_seconds + self.region_seconds
        if busy["link"] >= compute:
            return "link"
        return max(("attention", "weights"), key=busy.__getitem__)


@dataclass
class _Clock:
    """Streams of a step as they are filled."""

    rates: Rates
    free: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    exposed: float = 0.0
    written: dict[int, float] = field(default_factory=dict)
    """By layer: when its last offload ends."""
    ring: dict[str, float] = field(default_factory=dict)
    """When the tokens end that the next site takes in."""
    carried: int = 0
    """How many of them are transfers."""

    def run(self, op: SiteOp, events: Sequence[float]) -> OpTime:
        free = self.free.get(op.stream, 0.0)
        start = max([free, *events])
        seconds = op_seconds(op, self.rates)
        self.free[op.stream] = start + seconds
        self.busy[op.stream] = self.busy.get(op.stream, 0.0) + seconds
        if op.stream == "compute":
            self.exposed += start - free
        return OpTime(op, start, start + seconds, start - free)

    def run_region(self, region: RegionWork) -> RegionTime:
        start = self.free.get("compute", 0.0)
        self.free["compute"] = start + region.seconds(self.rates)
        return RegionTime(region.name, start, self.free["compute"])

    def run_site(self, layer: int, schedule: Schedule, ops: Sequence[SiteOp]) -> SiteTime:
        start = self.free.get("compute", 0.0)
        ends = dict(self.ring)
        times: list[OpTime] = []
        if self.carried < schedule.entry:
            times += self._start_cold(layer, ends, schedule, ops)
        for op in ops:
            events = [ends.get(edge.op, 0.0) for edge in op.after]
            if op.op == "prefetch":
                events.append(self.written.get(layer + op.next_layer, 0.0))
            if op.op == "attend_host":
                events.append(self.free.get("compute", 0.0))  # its query is copied there
            time = self.run(op, events)
            ends[op.name] = time.end
            if op.op == "offload":
                self.written[layer] = time.end
            times.append(time)
        self.ring = {
            f"r{index}": ends.get(name, 0.0) for index, name in enumerate(ring_tokens(schedule))
        }
        self.carried = schedule.exit
        return SiteTime(layer, start, self.free.get("compute", 0.0), tuple(times))

    def _start_cold(
        self, layer: int, ends: dict[str, float], schedule: Schedule, ops: Sequence[SiteOp]
    ) -> list[OpTime]:
        """The transfers that no earlier site has started, as the prologue starts them."""
        waits = {edge.op: op for op in ops if op.op == "wait" for edge in op.after}
        times = []
        for token in (f"r{index}" for index in range(schedule.entry)):
            copy = replace(
                waits[token], name=token, op="prefetch", stream="h2d", after=(),
                link_bytes=waits[token].slot_bytes, code=f"{token}: started before the site",
            )  # fmt: skip
            events = ends.get(token, 0.0), self.written.get(layer, 0.0)
            times.append(self.run(copy, events))
            ends[token] = times[-1].end
        return times


#: A call of the model graph: a region, or the layer of a site with its schedule and its ops.
StepCall = RegionWork | tuple[int, Schedule, Sequence[SiteOp]]


def predict(calls: Sequence[StepCall], machine: Machine, chained: bool) -> Prediction:
    """Predict a step.

    Args:
        calls: The model graph in order.
        machine: Whose rates count.
        chained: The step is one of many alike, each of which starts the first transfers of the
            next; what is returned is a step in the middle. Else the first transfers start cold.
    """
    clock = _Clock(machine.rates)
    for _ in range(2 if chained else 1):
        began = clock.free.get("compute", 0.0)
        clock.busy, clock.exposed = {}, 0.0
        done = [
            clock.run_region(call) if isinstance(call, RegionWork) else clock.run_site(*call)
            for call in calls
        ]
    regions = [item for item in done if isinstance(item, RegionTime)]
    return Prediction(
        machine=machine,
        began=began,
        # A step ends with its compute; copies to the host may go on beside the next one.
        seconds=clock.free.get("compute", 0.0) - began,
        sites=tuple(item for item in done if isinstance(item, SiteTime)),
        regions=tuple(regions),
        attention_seconds=clock.busy.get("compute", 0.0),
        region_seconds=sum(region.end - region.start for region in regions),
        h2d_seconds=clock.busy.get("h2d", 0.0),
        d2h_seconds=clock.busy.get("d2h", 0.0),
        exposed_wait_seconds=clock.exposed,
    )
