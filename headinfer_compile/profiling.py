"""``profile``: what the streams did in real steps, beside what was predicted, as a Chrome trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headinfer_compile.cache import HeadInferCache
from headinfer_compile.errors import CacheError
from headinfer_compile.machine import Machine
from headinfer_compile.prediction import Prediction, RegionWork, StepCall, predict
from headinfer_compile.probe import this_machine
from headinfer_compile.runtime.trace import StepTrace, Timer, busy_us
from headinfer_compile.site_ops import SiteOp, StepShape, site_ops
from headinfer_compile.trace_events import trace_events

_MAX_STEPS = 64


class Profile:
    """The steps that were timed; complete once the ``with profile(cache)`` block has ended."""

    def __init__(self, timer: Timer, machine: Machine) -> None:
        self.machine = machine
        self._timer = timer

    @property
    def steps(self) -> tuple[StepTrace, ...]:
        """One for each compiled call, with its ops; times in microseconds from the start."""
        return tuple(self._timer.steps)

    @property
    def link_utilisation(self) -> float | None:
        """Share of the decode steps in which the link was copying; None where none was timed."""
        steps = [step for step in self.steps if step.phase == "decode"]
        total = sum(step.end - step.begin for step in steps)
        return sum(busy_us(step.spans, "h2d") for step in steps) / total if total else None

    @property
    def exposed_wait_us(self) -> float:
        """Time that compute stood still for transfers, over all steps."""
        spans = [span for step in self.steps for span in step.spans if span.name == "wait"]
        return float(sum(span.end - span.begin for span in spans))

    def predictions(self) -> list[Prediction]:
        """Each step as the cost model has it; regions take the time that they took."""
        return [self._predict(step) for step in self.steps]

    def _predict(self, step: StepTrace) -> Prediction:
        shape = StepShape(step.step, step.specs, step.geometry, step.head_group, step.num_slots)
        ops: dict[int, tuple[SiteOp, ...]] = {}
        calls: list[StepCall] = []
        at = step.begin
        for site in step.sites:
            calls.append(RegionWork("region", 0, 0, (site.begin - at) / 1e6))
            if id(site.schedule) not in ops:
                ops[id(site.schedule)] = site_ops(site.schedule, shape)
            calls.append((site.layer, site.schedule, ops[id(site.schedule)]))
            at = site.end
        calls.append(RegionWork("region", 0, 0, (step.end - at) / 1e6))
        # Whether the step before has started the first transfers shows in how many it started.
        started = sum(span.name == "prefetch" for span in step.spans)
        built = sum(op.op == "prefetch" for site in step.sites for op in ops[id(site.schedule)])
        chained = bool(step.sites and step.sites[-1].schedule.exit) and started == built
        return predict(calls, self.machine, chained)

    def to_json(self) -> dict[str, Any]:
        """A Chrome trace: open it in Perfetto or ``chrome://tracing``."""
        return {
            "traceEvents": list(trace_events(self.steps, self.predictions())),
            "displayTimeUnit": "ms",
            "otherData": {
                "predicted for": f"{self.machine.name}, rates {self.machine.source}",
                "link_utilisation": self.link_utilisation,
                "exposed_wait_us": self.exposed_wait_us,
                "note": "predicted regions take as long as they did",
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_json()), encoding="utf-8")


@contextmanager
def profile(
    cache: HeadInferCache, *, max_steps: int = _MAX_STEPS, machine: Machine | None = None
) -> Iterator[Profile]:
    """Time what the streams do in the compiled calls inside the block.

    CUDA events are recorded around the ops and read when their step is over, so no step waits for
    the host; on a CPU the host's clock is read. ``cache.stats()`` then knows ``link_utilisation``
    and ``exposed_wait_us``. Steps replayed as CUDA graphs show no ops.

    Args:
        cache: Whose calls are timed; one profile at a time.
        max_steps: Calls that are timed, the first ones; later ones run as ever.
        machine: For the prediction beside the measurement; None: as ``headinfer probe`` has
            measured here, else assumed.

    Raises:
        CacheError: The cache is being profiled already.
    """
    session = cache.session
    if session.timer is not None:
        raise CacheError("this HeadInferCache is being profiled already: end that profile first")
    timer = session.timer = Timer(session, max_steps)
    around = session.around_call

    @contextmanager
    def call() -> Iterator[None]:
        with around(), timer.call():
            yield

    session.around_call = call
    try:
        yield Profile(timer, machine or this_machine(measure=False))
    finally:
        session.around_call, session.timer, session.observer = around, None, None
        timer.close()
