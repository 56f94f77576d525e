"""The figures that bars and pictures are made of, found in the rows of the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Row, read_rows

K, M, MIB, GIB = 1 << 10, 1 << 20, 1 << 20, 1 << 30
CARD = 24 * GIB
BAR_DEVICE = "H100"


class Missing(LookupError):
    """A figure that a bar needs was not measured; the message says which."""


@dataclass(frozen=True)
class Results:
    """Rows of all result files, of one device."""

    rows: list[Row]
    device: str

    def find(self, case: str, **wanted: Any) -> Row:
        """The newest row with these fields.

        Raises:
            Missing: There is none, or it failed.
        """
        found = [
            row
            for row in self.rows
            if row.get("case") == case
            and all(row.get(key) == value for key, value in wanted.items())
        ]
        what = ", ".join(f"{key}={value}" for key, value in wanted.items() if value is not None)
        if not found:
            raise Missing(f"not run: {case} {what}")
        newest: Row = max(found, key=lambda row: str(row["date"]))
        if "failure" in newest:
            raise Missing(f"{case} {what}: {newest['failure']}")
        return newest

    def find_all(self, case: str, **wanted: Any) -> list[Row]:
        """All rows with these fields, by context.

        Raises:
            Missing: There is none.
        """
        rows = [
            row
            for row in self.rows
            if row.get("case") == case
            and all(row.get(key) == value for key, value in wanted.items())
        ]
        if not rows:
            raise Missing(f"not run: {case} {', '.join(f'{k}={v}' for k, v in wanted.items())}")
        return sorted(rows, key=lambda row: int(row["context"]))


@dataclass(frozen=True)
class Figure:
    """What a bar is judged by."""

    value: float
    source: Row
    """The row whose command and versions stand for the figure."""
    note: str = ""


def _llama(**wanted: Any) -> dict[str, Any]:
    return {"model": "llama", "layers": 32, "gpu_memory": None, **wanted}


def prefill_against(other: str) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        ours = results.find("prefill", **_llama(variant="headinfer:0", context=128 * K))
        base = results.find("prefill", **_llama(variant=other, context=128 * K))
        note = (
            f"{ours['tokens_per_s']:.0f} against {base['tokens_per_s']:.0f} tok/s "
            f"(kernel {base['details'].get('kernel')}, chunk {base['chunk']})"
        )
        return Figure(ours["tokens_per_s"] / base["tokens_per_s"], ours, note)

    return measure


def link(variant: str, context: int, **wanted: Any) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        row = results.find("decode", **{**_llama(variant=variant, context=context), **wanted})
        note = (
            f"{row['step_ms']['median']:.2f} ms a token, {row['link_gb_s']} of "
            f"{row['roofline']['h2d_gb_s']} GB/s; without a sync a step {row['queued_of_link']}"
        )
        return Figure(row["of_link"], row, note + _synthetic(row))

    return measure


def _synthetic(row: Row) -> str:
    return "; synthetic filled pages" if row.get("synthetic") else ""


def _step(results: Results, variant: str, context: int, **wanted: Any) -> Row:
    return results.find("decode", **{**_llama(variant=variant, context=context), **wanted})


def step_ratio(
    ours: str, base: str, context: int, inverse: bool = False
) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        row, other = _step(results, ours, context), _step(results, base, context)
        ratio = row["step_ms"]["median"] / other["step_ms"]["median"]
        note = f"{row['step_ms']['median']:.2f} against {other['step_ms']['median']:.2f} ms"
        return Figure(1 / ratio if inverse else ratio, row, note + _synthetic(row))

    return measure


def hbm_ratio(variant: str, context: int) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        row = _step(results, variant, context)
        nbytes = row["weight_bytes"] + row["resident_bytes"]
        floor_ms = nbytes / row["roofline"]["hbm_gb_s"] / 1e6
        note = f"{row['step_ms']['median']:.2f} ms; bytes at the copy rate {floor_ms:.2f} ms"
        return Figure(row["step_ms"]["median"] / floor_ms, row, note)

    return measure


def prefill_short(results: Results) -> Figure:
    worst: Figure | None = None
    for context in (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K):
        try:
            ours = results.find("prefill", **_llama(variant="headinfer:auto", context=context))
            base = results.find("prefill", **_llama(variant="resident", context=context))
        except Missing:
            continue
        ratio = ours["tokens_per_s"] / base["tokens_per_s"]
        if worst is None or ratio < worst.value:
            worst = Figure(ratio, ours, f"the lowest of the contexts run, at {context // K}K")
    if worst is None:
        raise Missing("not run: prefill of headinfer:auto and resident at 1K to 32K")
    return worst


def _card(results: Results, case: str, variant: str, context: int, **wanted: Any) -> Row:
    rows = results.find_all(case, **{**_llama(variant=variant, context=context), **wanted,
                                     "gpu_memory": CARD})  # fmt: skip
    return rows[-1]


def emulated_step(results: Results) -> Figure:
    row = _card(results, "decode", "headinfer:auto", 128 * K)
    floor_ms = row["streamed_bytes"] / row["roofline"]["h2d_gb_s"] / 1e6
    note = (
        f"{row['step_ms']['median']:.2f} ms; {row['streamed_bytes'] / GIB:.2f} GiB streamed and "
        f"{row['resident_bytes'] / GIB:.2f} GiB resident: {floor_ms:.2f} ms at the link's rate"
    )
    return Figure(row["step_ms"]["median"] / floor_ms, row, note + _synthetic(row))


def _fixed_rows(results: Results) -> list[Row]:
    rows = [
        row for row in results.find_all("memory", variant="headinfer:0", chunk=16 * K)
        if row["context"] in (8 * K, 128 * K, 512 * K)
    ]  # fmt: skip
    if len(rows) < 3:
        raise Missing("not run: memory at 8K, 128K and 512K with chunk 16K")
    return rows


def fixed_bytes(results: Results) -> Figure:
    rows = _fixed_rows(results)
    top = max(rows, key=lambda row: int(row["fixed_bytes"]))
    held = ", ".join(
        f"{row['context'] // K}K {row.get('allocated_bytes', 0) / MIB:.1f}" for row in rows
    )
    return Figure(top["fixed_bytes"] / MIB, top, f"the allocator holds MiB: {held}")


def fixed_spread(results: Results) -> Figure:
    rows = _fixed_rows(results)
    sizes = [row["fixed_bytes"] for row in rows]
    return Figure(max(sizes) / min(sizes), rows[-1], ", ".join(f"{s / MIB:.1f} MiB" for s in sizes))


def peak(case: str, context: int, **wanted: Any) -> Callable[[Results], Figure]:
    def measure(results: Results) -> Figure:
        row = _card(results, case, "headinfer:0", context, **wanted)
        reserved = row["gpu_peak_reserved_bytes"] / GIB
        note = f"reserved {reserved:.2f} GiB, host peak {row['host_peak_bytes'] / GIB:.1f} GiB"
        return Figure(row["gpu_peak_bytes"] / GIB, row, note + _synthetic(row))

    return measure


def long_prefill(results: Results) -> Figure:
    row = _card(results, "prefill", "headinfer:0", 512 * K)
    note = f"{row['seconds']['median']:.1f} s; operations alone {row['roofline_s']:.1f} s"
    if row.get("cold"):
        note += "; one run, with pinning and what was left to compile in it"
    return Figure(row["of_roofline"], row, note)


def million_prefill(results: Results) -> Figure:
    row = results.find("prefill", **_llama(variant="headinfer:0", context=M))
    return Figure(row["tokens_per_s"], row, f"{row['seconds']['median']:.0f} s")


def startup(results: Results) -> Figure:
    rows = [row for row in results.rows if row.get("case") == "startup" and "added" in row]
    if not rows:
        raise Missing("not run: startup, prefill")
    row = max(rows, key=lambda row: str(row["date"]))
    pinned = row["pinned_bytes"] / GIB
    return Figure(
        row["added"], row, f"{pinned:.1f} GiB pinned in {row['new_pages_s']['median']:.1f} s"
    )


def stalls(results: Results) -> Figure:
    rows = [row for row in results.rows if row.get("case") == "startup" and "longest_gap_ms" in row]
    if not rows:
        raise Missing("not run: startup, launch")
    row = max(rows, key=lambda row: str(row["date"]))
    note = (
        f"{row['stalls_over_5_ms']} gaps over 5 ms in {row['register_s']} s of registration; "
        f"alone the longest is {row['longest_gap_alone_ms']} ms"
    )
    return Figure(row["longest_gap_ms"], row, note)


def needle(results: Results) -> Figure:
    rows = results.find_all("needle")
    asked, right = sum(row["asked"] for row in rows), sum(row["right"] for row in rows)
    lengths = [int(row["context"]) for row in rows]
    if max(lengths) < M or min(lengths) > 8 * K:
        raise Missing(f"not run: needle from 8K to 1M, only {lengths}")
    note = f"{right} of {asked} over {len(rows)} lengths, {min(lengths) // K}K to 1M"
    return Figure(right / asked, rows[-1], note)


def read_results(folder: Path, device: str | None) -> Results:
    """All rows of one device: the one asked for, else an H100's, else the one with most rows."""
    rows = [
        row
        for path in sorted(folder.glob("*.json"))
        if path.name not in ("bars.json", "test_slow.json")
        for row in read_rows(path)
        if "case" in row
    ]
    names = sorted({str(row["device"]) for row in rows})
    if device is not None:
        names = [name for name in names if device in name]
    if not names:
        return Results([], device or "none")
    best = max(
        names,
        key=lambda name: (
            BAR_DEVICE in name,
            not name.startswith("cpu"),
            sum(row["device"] == name for row in rows),
        ),
    )  # fmt: skip
    return Results([row for row in rows if row["device"] == best], best)
