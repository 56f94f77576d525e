"""Who looks at the ops of a session's calls: the profilers that listen, and a ``Timer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headinfer_compile.runtime.spans import Span, about, span_of
from headinfer_compile.runtime.trace import Timer

if TYPE_CHECKING:
    from headinfer_compile.runtime.session import Session


class Observer:
    """Sees every op of one compiled call: names it to the profilers that listen, and times it."""

    def __init__(self, timer: Timer | None, nvtx: bool, profiler: bool) -> None:
        self.timer = timer
        self._nvtx, self._profiler = nvtx, profiler
        self._layer: int | None = None
        self._transfers: dict[int, Span] = {} if timer is None else timer.named

    def begin_site(self, layer: int, schedule: Any) -> None:
        """A site of ``layer`` begins and will run ``schedule``."""
        self._layer = layer
        if self._nvtx:
            torch.cuda.nvtx.range_push(f"headinfer site layer={layer}")
        if self.timer is not None:
            self.timer.begin_site(layer, schedule)

    def end_site(self) -> None:
        """The site's ops are queued."""
        if self.timer is not None:
            self.timer.end_site()
        if self._nvtx:
            torch.cuda.nvtx.range_pop()

    def run(
        self, name: str, function: Callable[..., Any], session: Session, args: Sequence[Any]
    ) -> Any:
        """Run an op under its names."""
        if self.timer is not None and not (self._nvtx or self._profiler):
            return self.timer.run(name, function, session, args, self._layer)
        noted, slots = about(name, args), session.config.slots
        span = span_of(name, self._layer, noted, slots, self._transfers)
        range_ = torch.profiler.record_function(span.label) if self._profiler else None
        if self._nvtx:
            torch.cuda.nvtx.range_push(span.label)
        if range_ is not None:
            range_.__enter__()
        try:
            if self.timer is None:
                result = function(session, *args)
            else:
                result = self.timer.run(name, function, session, args, self._layer)
        finally:
            if range_ is not None:
                range_.__exit__(None, None, None)
            if self._nvtx:
                torch.cuda.nvtx.range_pop()
        if name == "prefetch":
            span.transfer = result
            self._transfers[result] = span
        return result


def observer_for(timer: Timer | None, nvtx: bool) -> Observer | None:
    """Who looks at the ops of the next call; None where nobody does."""
    profiler = bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]
    if timer is None and not nvtx and not profiler:
        return None
    return Observer(timer, nvtx, profiler)
