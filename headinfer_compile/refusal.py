"""What a request that does not fit lacks, and what would fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headinfer_compile.config import format_bytes
from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.plan_memory import Memory, Request, memory_of
from headinfer_compile.plan_search import largest_context, smallest_settings

_GIB = 1 << 30


def refusal(
    facts: ModelFacts, machine: Machine, request: Request, memory: Memory, longest: int
) -> str:
    """Say what a request lacks and the three nearest settings that would work, each tried.

    Args:
        facts: The model.
        machine: What there is.
        request: What does not fit.
        memory: What the settings that need least would take.
        longest: The largest context that fits.
    """
    shortage = memory.shortage
    assert shortage is not None
    what = "host memory for KV pages" if shortage.where == "host" else "GPU memory"
    ways = "; ".join(_ways_out(facts, machine, request, longest))
    return (
        f"{facts.name} at {request.context:,} tokens does not fit: it needs "
        f"{format_bytes(shortage.needed_bytes)} of {what}, and there are "
        f"{format_bytes(shortage.available_bytes)}. What would work: {ways}"
    )


def _ways_out(facts: ModelFacts, machine: Machine, request: Request, longest: int) -> list[str]:
    """The three nearest settings that fit, each tried."""
    ways: list[tuple[str, Machine, Request]] = []
    if longest > 0:
        ways.append((f"context={longest}", machine, replace(request, context=longest)))
    if request.chunk is not None:
        half = request.chunk // 2
        while half >= 64 and not _fits(facts, machine, replace(request, chunk=half)):
            half //= 2
        ways.append((f"chunk={half}", machine, replace(request, chunk=max(1, half))))
    for name in ("host_budget", "gpu_budget"):
        if getattr(request, name) is not None:
            changes: dict[str, Any] = {name: None}
            ways.append((f"{name}='auto'", machine, replace(request, **changes)))
    half = request.batch // 2
    while half > 1 and not _fits(facts, machine, replace(request, batch=half)):
        half //= 2
    if half:
        one = replace(request, batch=half)
        if not _fits(facts, machine, one):
            one = replace(one, context=max(1, largest_context(facts, machine, one)[0]))
        suffix = "" if one.context == request.context else f" with context={one.context}"
        ways.append((f"batch={half}{suffix}", machine, one))
    free = replace(request, host_budget=None, gpu_budget=None)
    for name in ("host_memory", "gpu_memory"):
        larger = _enough(facts, machine, free, name)
        if larger is not None:
            size = getattr(larger, name) // _GIB
            suffix = " and automatic budgets" if free != request else ""
            ways.append((f"a machine with {name}={size}GiB{suffix}", larger, free))
    return [text for text, where, asked in ways if _fits(facts, where, asked)][:3]


def _fits(facts: ModelFacts, machine: Machine, request: Request) -> bool:
    settings = smallest_settings(request)
    return memory_of(facts, machine, request, settings, request.context).shortage is None


def _enough(facts: ModelFacts, machine: Machine, request: Request, name: str) -> Machine | None:
    """``machine`` with as much more of one memory as the request needs, in GiB."""

    def with_gib(count: int) -> Machine:
        changes: dict[str, Any] = {name: count * _GIB}
        return replace(machine, **changes)

    low, high = getattr(machine, name) // _GIB, 1 << 14
    if not _fits(facts, with_gib(high), request):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(facts, with_gib(middle), request):
            high = middle
        else:
            low = middle
    return with_gib(high)
