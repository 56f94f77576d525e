"""Draws the pictures of ``benchmarks/results`` from its JSON, by one command and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.common import RESULTS, Row, format_tokens, say
from benchmarks.figures import Results, read_results

mpl.use("Agg")

from matplotlib import pyplot as plt

GIB = 1 << 30
Axes = Any
"""matplotlib's; it is an optional dependency without types of its own here."""


def _series(results: Results, case: str) -> dict[str, list[Row]]:
    """Rows without a memory limit by variant, then context, of the model with most rows."""
    rows = [
        row for row in results.rows
        if row.get("case") == case and "failure" not in row and row.get("gpu_memory") is None
    ]  # fmt: skip
    shapes = [(row.get("model"), row.get("layers")) for row in rows]
    if not shapes:
        return {}
    shape = max(sorted(set(shapes), key=str), key=shapes.count)
    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (str(row["variant"]), int(row["context"]))):
        if (row.get("model"), row.get("layers")) == shape:
            series.setdefault(row["variant"], []).append(row)
    return series


def _finish(axes: Axes, results: Results, title: str, label: str, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [format_tokens(count) for count in contexts])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel(label)
    axes.set_title(f"{title}\n{results.device}", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _contexts(series: dict[str, list[Row]]) -> list[int]:
    return sorted({int(row["context"]) for rows in series.values() for row in rows})


def draw_prefill(results: Results, axes: Axes) -> bool:
    """Tokens per second of prefill, with what the operations alone would take."""
    series = _series(results, "prefill")
    for name, rows in series.items():
        contexts = [row["context"] for row in rows]
        axes.plot(contexts, [row["tokens_per_s"] for row in rows], marker="o", label=name)
    if not series:
        return False
    longest = max(series.values(), key=len)
    axes.plot(
        [row["context"] for row in longest],
        [row["context"] / row["roofline_s"] for row in longest],
        "k--", label="compute roofline",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    _finish(axes, results, "Prefill", "tokens / s", _contexts(series))
    return True


def draw_decode(results: Results, axes: Axes) -> bool:
    """Seconds per token of decode, with the link and device memory as limits."""
    series = _series(results, "decode")
    for name, rows in series.items():
        middle = [row["step_ms"]["median"] / 1e3 for row in rows]
        low = [m - row["step_ms"]["p10"] / 1e3 for m, row in zip(middle, rows, strict=True)]
        high = [row["step_ms"]["p90"] / 1e3 - m for m, row in zip(middle, rows, strict=True)]
        axes.errorbar(
            [row["context"] for row in rows], middle, yerr=[low, high], marker="o", capsize=2,
            label=name,
        )  # fmt: skip
    if not series:
        return False
    for name, style, text in (
        ("headinfer:0", "k--", "all KV over the link"),
        ("resident", "k:", "all KV in device memory"),
    ):
        rows = series.get(name, [])
        if rows:
            axes.plot(
                [row["context"] for row in rows], [row["roofline_ms"] / 1e3 for row in rows], style,
                label=f"roofline: {text}",
            )  # fmt: skip
    axes.set_yscale("log")
    _finish(axes, results, "Decode", "seconds / token (median, p10 to p90)", _contexts(series))
    return True


def draw_memory(results: Results, axes: Axes) -> bool:
    """Peak device memory of prefill, and the fixed bytes of a streamed cache."""
    series = {
        name: [row for row in rows if "gpu_peak_bytes" in row]
        for name, rows in _series(results, "prefill").items()
    }
    series = {name: rows for name, rows in series.items() if rows}
    for name, rows in series.items():
        axes.plot(
            [row["context"] for row in rows], [row["gpu_peak_bytes"] / GIB for row in rows],
            marker="o", label=f"{name}: peak",
        )  # fmt: skip
    fixed = [row for row in results.rows if row.get("case") == "memory"]
    fixed.sort(key=lambda row: int(row["context"]))
    if fixed:
        axes.plot(
            [row["context"] for row in fixed], [row["fixed_bytes"] / GIB for row in fixed], "k--",
            marker="s", label="headinfer:0: slots, staging and tail",
        )  # fmt: skip
    contexts = sorted({*_contexts(series), *(int(row["context"]) for row in fixed)})
    if not contexts:
        return False
    axes.set_yscale("log")
    _finish(axes, results, "Device memory", "GiB", contexts)
    return True


def draw_timeline(results: Results, axes: Axes) -> bool:
    """Kernels and copies of one decode step by stream, its first 40 ms."""
    rows = [row for row in results.rows if row.get("case") == "timeline"]
    if not rows:
        return False
    row = max(rows, key=lambda row: str(row["date"]))
    lanes = sorted({(span["kind"], str(span["stream"])) for span in row["spans"]})
    for lane, (kind, stream) in enumerate(lanes):
        spans = [
            (span["start_us"] / 1e3, span["us"] / 1e3)
            for span in row["spans"]
            if (span["kind"], str(span["stream"])) == (kind, stream)
        ]
        axes.broken_barh(spans, (lane - 0.4, 0.8), color=f"C{lane}")
    axes.set_yticks(range(len(lanes)), [f"{kind}\nstream {stream}" for kind, stream in lanes])
    axes.set_xlim(0, min(40.0, max(s["start_us"] + s["us"] for s in row["spans"]) / 1e3))
    axes.set_xlabel("ms since the step began")
    label = f"One decode step, {row['variant']}, {format_tokens(row['context'])}"
    axes.set_title(f"{label}\n{results.device}", fontsize=10)
    return True


def draw_needle(results: Results, axes: Axes) -> bool:
    """Share of planted pairs recalled, over depth and length."""
    rows = [row for row in results.rows if row.get("case") == "needle"]
    if not rows:
        return False
    rows.sort(key=lambda row: int(row["context"]))
    depths = sorted({cell["depth"] for row in rows for cell in row["depths"]})
    grid = [
        [
            next(
                (c["right"] / c["asked"] for c in row["depths"] if c["depth"] == depth),
                float("nan"),
            )
            for row in rows
        ]
        for depth in depths
    ]
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
    axes.set_xticks(range(len(rows)), [format_tokens(row["context"]) for row in rows])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the pair")
    right, asked = sum(row["right"] for row in rows), sum(row["asked"] for row in rows)
    axes.set_title(f"Needle: {right} of {asked} recalled\n{results.device}", fontsize=10)
    plt.colorbar(image, ax=axes)
    return True


PICTURES: dict[str, Callable[[Results, Axes], bool]] = {
    "prefill": draw_prefill,
    "decode": draw_decode,
    "memory": draw_memory,
    "timeline": draw_timeline,
    "needle": draw_needle,
}


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw every picture for which there are figures; returns their paths."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    cli.add_argument("--results", type=Path, default=RESULTS)
    cli.add_argument("--out", type=Path, help="folder; the results' own unless given")
    cli.add_argument("--device", help="part of the name of the device whose figures are drawn")
    args = cli.parse_args(argv)
    results = read_results(args.results, args.device)
    folder: Path = args.out or args.results
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in PICTURES.items():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        if draw(results, axes):
            path = folder / f"{name}.png"
            # No date or version inside, so that equal figures give equal files.
            figure.savefig(path, dpi=120, metadata={"Software": None})
            made.append(path)
            say("%s", path)
        else:
            say("%s: nothing measured", name)
        plt.close(figure)
    return made


if __name__ == "__main__":
    main()
