"""Measured and predicted steps as the events of a Chrome trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headinfer_compile.prediction import Prediction
from headinfer_compile.runtime.spans import Span
from headinfer_compile.runtime.trace import StepTrace

Event = dict[str, Any]

_LANES = ("compute", "h2d", "d2h", "cpu", "host")
_FIRST_SLOT = 10
MEASURED, PREDICTED = 1, 2


def trace_events(steps: Sequence[StepTrace], predicted: Sequence[Prediction]) -> Iterator[Event]:
    """Lanes of streams, host and slots with link rates, and the predicted lanes beside them."""
    slots = {span.slot for step in steps for span in step.spans if span.slot is not None}
    lanes = [*enumerate(_LANES, start=1), *((_FIRST_SLOT + s, f"slot {s}") for s in sorted(slots))]
    for process, name in ((MEASURED, "measured"), (PREDICTED, "predicted")):
        yield _meta("process_name", process, 0, {"name": name})
        yield _meta("process_sort_index", process, 0, {"sort_index": process})
        for lane, title in lanes if process == MEASURED else lanes[: _LANES.index("host")]:
            yield _meta("thread_name", process, lane, {"name": title})
            yield _meta("thread_sort_index", process, lane, {"sort_index": lane})
    for step, expected in zip(steps, predicted, strict=True):
        yield from _measured(step)
        yield from _expected(step, expected)
    yield from _slots(steps)
    yield from _link(steps)


def _measured(step: StepTrace) -> Iterator[Event]:
    title = f"{step.phase}: {step.new} new tokens after {step.past}"
    yield _span(MEASURED, "host", step.host_begin, step.host_end, title, {})
    at = step.begin
    for site in step.sites:
        yield _span(MEASURED, "compute", at, site.begin, f"region before layer {site.layer}", {})
        at = site.end
    yield _span(MEASURED, "compute", at, step.end, "last region", {})
    for span in step.spans:
        facts = {
            name: value
            for name in ("layer", "group", "chunk", "block", "slot", "transfer")
            if (value := getattr(span, name)) is not None
        }
        if span.nbytes:
            facts["bytes"] = span.nbytes
        yield _span(MEASURED, "host", span.host_begin, span.host_end, span.name, facts)
        if span.stream != "host" and span.end is not None:
            if span.nbytes and span.end > span.begin:
                facts["GB/s"] = round(span.nbytes / (span.end - span.begin) / 1e3, 2)
            yield _span(MEASURED, span.stream, span.begin, span.end, span.name, facts)
    yield from _flows(step.spans)


def _flows(spans: Sequence[Span]) -> Iterator[Event]:
    """An arrow from each transfer to its wait."""
    copies = {span.transfer: span for span in spans if span.name == "prefetch"}
    for span in spans:
        copy = copies.get(span.transfer) if span.name == "wait" else None
        if copy is not None and copy.end is not None:
            common = {"cat": "event", "name": "slot.filled", "id": span.transfer, "pid": MEASURED}
            yield {**common, "ph": "s", "tid": _lane("h2d"), "ts": _time(copy.begin)}
            yield {**common, "ph": "f", "bp": "e", "tid": _lane("compute"), "ts": _time(span.end)}


def _expected(step: StepTrace, prediction: Prediction) -> Iterator[Event]:
    """The predicted step, drawn from where the measured one began."""

    def at(seconds: float) -> float:
        return float(step.begin + (seconds - prediction.began) * 1e6)

    for region in prediction.regions:
        yield _span(PREDICTED, "compute", at(region.start), at(region.end), region.name, {})
    for site in prediction.sites:
        for time in site.ops:
            if time.end > time.start:
                op = time.op
                facts = {"layer": site.layer + op.next_layer, "block": op.block, "what": op.what}
                yield _span(PREDICTED, op.stream, at(time.start), at(time.end), op.op, facts)


def _slots(steps: Sequence[StepTrace]) -> Iterator[Event]:
    """What each slot holds, from the start of its copy to its release."""
    filled: dict[int, Span] = {}
    for span in (span for step in steps for span in step.spans):
        if span.transfer is None or span.begin is None:
            continue
        if span.name == "prefetch":
            filled[span.transfer] = span
        elif span.name == "release" and span.transfer in filled:
            copy = filled.pop(span.transfer)
            assert copy.slot is not None
            name = f"layer {copy.layer} block {copy.block}"
            facts = {"group": copy.group, "bytes": copy.nbytes, "filled after us": copy.end}
            yield _event(MEASURED, _FIRST_SLOT + copy.slot, copy.begin, span.end, name, facts)


def _link(steps: Sequence[StepTrace]) -> Iterator[Event]:
    """Rates of the link, up while a copy runs and down after it."""
    for stream in ("h2d", "d2h"):
        for span in (span for step in steps for span in step.spans if span.stream == stream):
            if span.end > span.begin:
                rate = round(span.nbytes / (span.end - span.begin) / 1e3, 2)
                for moment, value in ((span.begin, rate), (span.end, 0)):
                    yield {
                        "ph": "C", "pid": MEASURED, "tid": 0, "name": f"{stream} GB/s",
                        "ts": _time(moment), "args": {"GB/s": value},
                    }  # fmt: skip


def _lane(stream: str) -> int:
    return _LANES.index(stream) + 1


def _time(us: float) -> float:
    return round(us, 3)


def _span(
    process: int, stream: str, begin: float, end: float, name: str, facts: dict[str, Any]
) -> Event:
    return _event(process, _lane(stream), begin, end, name, facts)


def _event(
    process: int, lane: int, begin: float, end: float, name: str, facts: dict[str, Any]
) -> Event:
    return {
        "ph": "X", "cat": "headinfer", "pid": process, "tid": lane, "name": name,
        "ts": _time(begin), "dur": _time(max(0.0, end - begin)), "args": facts,
    }  # fmt: skip


def _meta(name: str, process: int, lane: int, facts: dict[str, Any]) -> Event:
    return {"ph": "M", "pid": process, "tid": lane, "name": name, "args": facts}
