"""A plan as text for a terminal: bytes by tier, seconds, settings, bounds, and two pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headinfer_compile.config import format_bytes

if TYPE_CHECKING:
    from headinfer_compile.planner import Plan, PlanPoint

_WIDTH = 40


def render(plan: Plan) -> str:
    """The whole report."""
    sections = [
        _title(plan),
        _bytes(plan),
        _seconds(plan),
        _settings(plan),
        _roofline(plan),
        picture(plan),
        "\n".join(f"warning: {text}" for text in plan.warnings),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    machine = plan.machine
    cards = f"{machine.gpus} x " if machine.gpus > 1 else ""
    gpu = f"{cards}{format_bytes(machine.gpu_memory)} GPU" if machine.gpu_memory else "no GPU"
    return (
        f"{plan.model}: {plan.context:,} tokens in chunks of {plan.chunk:,}, batch {plan.batch}\n"
        f"{machine.name}: {gpu}, {format_bytes(machine.host_memory)} of host memory for KV; "
        f"rates: {machine.source}"
    )


def _bytes(plan: Plan) -> str:
    rows = [("bytes", "")]
    rows += [(f"  {name}", format_bytes(count)) for name, count in plan.tiers.items()]
    if plan.machine.gpu_memory:
        rows.append(("  peak on the GPU", format_bytes(plan.gpu_bytes)))
    rows.append(("  KV of all tokens", format_bytes(plan.kv_bytes)))
    return _table(rows)


def _seconds(plan: Plan) -> str:
    rate = plan.context / plan.prefill_seconds
    limits = plan.limits
    return _table(
        [
            ("time", "", ""),
            (
                "  prefill",
                format_seconds(plan.prefill_seconds),
                f"{rate:,.0f} tokens/s, bound by {limits['prefill']}",
            ),
            (
                "  a token",
                format_seconds(plan.seconds_per_token),
                f"bound by {limits['decode']}",
            ),
            ("  largest context", f"{plan.max_context:,}", f"bound by {limits['context']}"),
        ]
    )


def _settings(plan: Plan) -> str:
    lines = ["settings"]
    for name, value in plan.settings.items():
        shown = (
            ", ".join(f"{key} {count:,}" for key, count in value.items())
            if isinstance(value, dict)
            else f"{value:,}"
        )
        lines.append(f"  {name}: {shown}")
    lines += [f"  why {name}: {reason}" for name, reason in plan.reasons.items()]
    for phase, seconds in plan.head_groups.items():
        each = ", ".join(f"{group} {format_seconds(time)}" for group, time in seconds.items())
        lines.append(f"  seconds of {phase} by head group: {each}")
    return "\n".join(lines)


def _roofline(plan: Plan) -> str:
    rows = [("roofline", "TFLOP", "HBM", "link", "FLOP/byte", "TFLOP/s", "time", "bound by")]
    for row in plan.roofline:
        rows.append(
            (
                f"  {row.phase} {row.part}",
                f"{row.flop / 1e12:.3g}",
                format_bytes(row.hbm_bytes),
                format_bytes(row.link_bytes),
                f"{row.intensity:.3g}",
                f"{row.attainable / 1e12:.3g}",
                format_seconds(row.seconds),
                row.bound,
            )
        )
    return _table(rows)


def picture(plan: Plan) -> str:
    """Memory and time against the context, on logarithmic bars."""
    columns: list[tuple[str, Callable[[PlanPoint], float], Callable[[float], str]]] = [
        ("GPU", lambda p: p.gpu_bytes, format_bytes),
        ("host", lambda p: p.host_bytes, format_bytes),
        ("prefill", lambda p: p.prefill_seconds, format_seconds),
        ("a token", lambda p: p.seconds_per_token, format_seconds),
    ]
    rows = [("context", *(name for name, _, _ in columns), "prefill (#), a token (*)")]
    points = plan.curve
    for point in points:
        cells = tuple(show(value(point)) for _, value, show in columns)
        bar = _marks(plan, point)
        marker = " <" if point.context == plan.max_context else ""
        rows.append((f"  {point.context:,}", *cells, bar + marker))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    lines = []
    for row in rows:
        cells = tuple(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True))
        lines.append("  ".join((*cells, row[-1])).rstrip())
    return "\n".join(lines)


def _marks(plan: Plan, point: PlanPoint) -> str:
    """A bar whose length doubles with neither: one column for each doubling above the first."""
    first = plan.curve[0]
    bars = []
    for mark, value, low in (
        ("#", point.prefill_seconds, first.prefill_seconds),
        ("*", point.seconds_per_token, first.seconds_per_token),
    ):
        length = 1 + max(0, round(math.log2(max(value / low, 1))))
        bars.append(mark * min(_WIDTH, length))
    return " ".join(bars)
