"""Times of every op of a session's calls.

Nothing here waits for the device. A ``Timer`` records CUDA events around the ops and reads them
when the steps are done; on a device without streams it reads the host's clock at the same points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headinfer_compile.runtime.spans import Mark, Span, about, span_of

if TYPE_CHECKING:
    from headinfer_compile.runtime.session import Session
    from headinfer_compile.runtime.spec import SiteSpec
    from headinfer_compile.runtime.streams import Streams

#: Ops that put work on the compute stream; the others only queue copies, events or views.
_COMPUTE_OPS = frozenset((
    "pack", "wait", "attend", "attend_merge", "attend_resident", "wait_host", "merge_host", "store"
))  # fmt: skip
_COPIES = frozenset(("prefetch", "offload", "attend_host"))

_POOL = 2048
"""Events made before the first step is timed: those of a step of 32 layers and 16 blocks each."""

#: An op: its name, layer, what it is about, result, stream, marks, bytes, nanoseconds of the host.
Note = tuple[str, int | None, Any, Any, str, Mark, Mark, int, int, int]


@dataclass
class Timings:
    """Sums over the steps that were timed, in microseconds."""

    decode_us: float = 0.0
    decode_link_us: float = 0.0
    """Copies to the device were under way."""
    exposed_wait_us: float | None = None
    """Compute stood still for a transfer; None until a step was timed."""


@dataclass
class SiteMark:
    """A site that ran in a step."""

    layer: int
    schedule: Any
    begin: Mark
    end: Mark = None


@dataclass
class StepTrace:
    """One compiled call."""

    past: int
    new: int
    phase: str
    step: Any
    """The ``Step``, whose blocks the schedules are about; with the other sizes it was made for."""
    specs: tuple[SiteSpec, ...]
    geometry: Any
    head_group: int
    num_slots: int
    begin: Mark
    host_begin: float
    end: Mark = None
    host_end: float = 0.0
    notes: list[Note] = field(default_factory=list)
    """The ops that were queued, until they are read."""
    spans: list[Span] = field(default_factory=list)
    """The ops, once they are read."""
    sites: list[SiteMark] = field(default_factory=list)

    def marks(self) -> Iterator[Mark]:
        """Every mark of the step."""
        yield from (self.begin, self.end)
        for note in self.notes:
            yield from note[5:7]
        for site in self.sites:
            yield from (site.begin, site.end)


class _Copy:
    """A context that marks when the copies in it begin and end."""

    def __init__(self, timer: Timer, role: str, stream: AbstractContextManager[object]) -> None:
        self._timer, self._role, self._stream = timer, role, stream

    def __enter__(self) -> None:
        self._stream.__enter__()
        self._timer.copy = (self._role, self._timer.mark(self._role), None)

    def __exit__(self, *error: Any) -> None:
        _, begin, _ = self._timer.copy
        self._timer.copy = (self._role, begin, self._timer.mark(self._role))
        self._stream.__exit__(*error)


class Timer:
    """Times the ops of up to ``max_steps`` compiled calls of one session."""

    def __init__(self, session: Session, max_steps: int) -> None:
        self.session = session
        self.max_steps = max_steps
        self.steps: list[StepTrace] = []
        self.current: StepTrace | None = None
        self.copy: tuple[str, Mark, Mark] = ("", None, None)
        self.transfers: dict[int, Span] = {}
        """Those under way where reading has come to."""
        self.named: dict[int, Span] = {}
        """Those under way now, where profilers are told their names."""
        self._last: Mark = None
        """The newest mark on compute."""
        # A CUDA event is made when it is first recorded, which takes longer than the record.
        count = _POOL if torch.cuda.is_available() else 0
        self._pool = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        for event in self._pool:
            event.record()
        self._resolved = 0
        self._zero_ns = time.perf_counter_ns()
        self._base: tuple[Mark, float] | None = None
        """A mark that was read, with its microseconds."""

    # -- marks ------------------------------------------------------------------------------

    @property
    def _streams(self) -> Streams | None:
        return None if self.session.geometry is None else self.session.streams

    def mark(self, role: str) -> Mark:
        """A point in time on the stream of ``role``, which is not waited for."""
        streams = self._streams
        if streams is None or not streams.is_cuda:
            if torch.cuda.is_available() and streams is None:
                return self._event_on_current()
            return time.perf_counter_ns()
        event = self._event()
        streams.record(event, role)
        return event

    def _event(self) -> torch.cuda.Event:
        return self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)

    def _event_on_current(self) -> Mark:
        event = self._event()
        event.record()
        return event

    def host_us(self) -> float:
        """The host's clock."""
        return (time.perf_counter_ns() - self._zero_ns) / 1e3

    # -- what the session calls -------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one compiled call."""
        self._read_finished()
        if len(self.steps) >= self.max_steps:
            yield
            return
        session = self.session
        begin = self.mark("compute"), self.host_us()
        done = StepTrace(session.length, 0, "", None, (), None, 0, 0, *begin)
        self.current, self._last = done, done.begin
        try:
            yield
            step = session.step
            if step is not None:
                done.step, done.new, done.phase = step, step.new, step.phase
                done.specs, done.geometry = tuple(session.specs), session.geometry
                done.head_group = session.layout(step.phase).head_group
                done.num_slots = session.config.slots
                done.end, done.host_end = self.mark("compute"), self.host_us()
                self.steps.append(done)
        finally:
            self.current = None
            if self._streams is not None:
                self._streams.timed = None

    def begin_site(self, layer: int, schedule: Any) -> None:
        """A site of the model graph begins."""
        if self.current is not None:
            assert self._streams is not None
            self._streams.timed = partial(_Copy, self)
            self._last = self.mark("compute")
            self.current.sites.append(SiteMark(layer, schedule, self._last))

    def end_site(self) -> None:
        """The ops of the site are queued."""
        if self.current is not None:
            self.current.sites[-1].end = self._last

    def run(
        self, name: str, function: Callable[..., Any], session: Session, args: Sequence[Any],
        layer: int | None,
    ) -> Any:  # fmt: skip
        """Run an op of a site of ``layer`` and note it."""
        step, counters = self.current, session.counters
        if step is None:
            return function(session, *args)
        before, host_begin = counters.moved_bytes, time.perf_counter_ns()
        result = function(session, *args)
        host_end = time.perf_counter_ns()
        stream, begin, end, nbytes = "host", None, None, 0
        if name in _COMPUTE_OPS:
            stream, begin = "compute", self._last
            self._last = end = self.mark("compute")
        elif name in _COPIES:
            if self.copy[2] is not None:
                stream, begin, end = self.copy
                nbytes = counters.moved_bytes - before
            self.copy = ("", None, None)
        elif name == "release":
            begin = end = self._last
        step.notes.append(
            (name, layer, about(name, args), result if name == "prefetch" else None, stream,
             begin, end, nbytes, host_begin, host_end)
        )  # fmt: skip
        return result

    # -- reading ----------------------------------------------------------------------------

    def _read_finished(self) -> None:
        """Read the steps that the device has finished, without waiting for it."""
        while self._resolved < len(self.steps) and all(
            mark.query() for mark in self.steps[self._resolved].marks() if _is_event(mark)
        ):
            self._read(self.steps[self._resolved])

    def close(self) -> None:
        """Read everything that is left; waits for the device, after the last step."""
        if torch.cuda.is_available() and self._resolved < len(self.steps):
            torch.cuda.synchronize()
        while self._resolved < len(self.steps):
            self._read(self.steps[self._resolved])

    def _read(self, step: StepTrace) -> None:
        """Turn the marks of a step into microseconds."""
        self._resolved += 1
        events = [mark for mark in step.marks() if _is_event(mark)]
        if _is_event(step.begin):
            # Near one another: a float of milliseconds is exact to a microsecond for seconds only.
            before = self._base
            at = step.host_begin if before is None else before[1] + _between(before[0], step.begin)
            self._base = (step.begin, at)
        found: dict[int, float] = {}

        def read(mark: Mark) -> float | None:
            if mark is None:
                return None
            if not _is_event(mark):
                return float((mark - self._zero_ns) / 1e3)
            assert self._base is not None
            if id(mark) not in found:
                found[id(mark)] = self._base[1] + _between(self._base[0], mark)
            return found[id(mark)]

        for name, layer, noted, result, stream, begin, end, nbytes, *host in step.notes:
            span = span_of(name, layer, noted, step.num_slots, self.transfers)
            if name == "prefetch":
                span.transfer = result
                self.transfers[result] = span
            span.stream, span.nbytes = stream, nbytes
            span.begin, span.end = read(begin), read(end)
            span.host_begin, span.host_end = ((at - self._zero_ns) / 1e3 for at in host)
            step.spans.append(span)
        step.notes.clear()
        for site in step.sites:
            site.begin, site.end = read(site.begin), read(site.end)
        base = step.begin
        step.begin, step.end = read(step.begin), read(step.end)
        self._count(step)
        # The base is kept for the step after.
        self._pool += list({id(e): e for e in events if e is not base}.values())

    def _count(self, step: StepTrace) -> None:
        timings = self.session.counters.timings
        waits = [s.end - s.begin for s in step.spans if s.name == "wait" and s.end is not None]
        timings.exposed_wait_us = (timings.exposed_wait_us or 0.0) + sum(waits)
        if step.phase == "decode":
            timings.decode_us += step.end - step.begin
            timings.decode_link_us += busy_us(step.spans, "h2d")


def busy_us(spans: Sequence[Span], stream: str) -> float:
    """Microseconds in which a stream runs an op."""
    return float(sum(s.end - s.begin for s in spans if s.stream == stream))


def _is_event(mark: Mark) -> bool:
    return isinstance(mark, torch.cuda.Event)


def _between(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    return float(first.elapsed_time(second)) * 1e3
