"""Do the figures hold their bars? Reads the results and writes ``bars.json``, one row a bar.

A bar is for an H100. Where the best figure there is comes from another device, it is written with
``holds`` false and the note says on which device it was measured and whether it would hold there;
where there is no figure, ``holds`` is null and the note says what was not run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from benchmarks import figures, figures_cpu
from benchmarks.common import RESULTS, Row, read_rows, say, versions, write_rows
from benchmarks.figures import BAR_DEVICE, CARD, Figure, K, M, Missing, Results, read_results


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars."""

    id: str
    question: str
    op: Literal[">=", "<="]
    bar: float
    unit: str
    measure: Callable[[Results], Figure]


_GRAPHS = "headinfer:auto:cuda_graphs=true"
_QWEN = {"model": "qwen2", "layers": 28}
_PREFILL = "prefill 128K, all KV in host RAM, tokens/s against"
_DECODE = "decode 128K, all streamed:"

BARS = (
    Bar("B1a", f"{_PREFILL} resident", ">=", 0.98, "x", figures.prefill_against("resident")),
    Bar("B1b", f"{_PREFILL} hf-offloaded", ">=", 1.7, "x", figures.prefill_against("hf-offloaded")),
    Bar("B1c", f"{_PREFILL} paper", ">=", 1.5, "x", figures.prefill_against("paper")),
    Bar("B2a", f"{_DECODE} link, 3 slots", ">=", 0.97, "share",
        figures.link("headinfer:0", 128 * K)),
    Bar(
        "B2b", f"{_DECODE} link, 2 slots", ">=", 0.97, "share",
        figures.link("headinfer:0:num_slots=2", 128 * K),
    ),
    Bar(
        "B2c", f"{_DECODE} hf-offloaded over ours", ">=", 4.5, "x",
        figures.step_ratio("headinfer:0", "hf-offloaded", 128 * K, inverse=True),
    ),
    *(
        bar
        for letter, context in (("8K", 8 * K), ("32K", 32 * K))
        for bar in (
            Bar(
                f"B3{'a' if context == 8 * K else 'b'}",
                f"decode {letter}, auto, CUDA graphs, against resident-compiled", "<=", 0.8, "x",
                figures.step_ratio(_GRAPHS, "resident-compiled", context),
            ),
            Bar(
                f"B3{'c' if context == 8 * K else 'd'}",
                f"decode {letter}, auto, CUDA graphs, against (weights + KV) / HBM rate", "<=", 1.3,
                "x", figures.hbm_ratio(_GRAPHS, context),
            ),
            Bar(
                f"B3{'e' if context == 8 * K else 'f'}",
                f"decode {letter}, auto, no CUDA graphs, against plain torch.compile", "<=", 1.0,
                "x", figures.step_ratio("headinfer:auto", "resident-inductor", context),
            ),
        )
    ),
    Bar("B3g", "prefill 1K-32K, auto, tokens/s against resident", ">=", 0.98, "x",
        figures.prefill_short),
    Bar(
        "B4", "decode 128K, 24 GB emulated, auto, against streamed bytes / link", "<=", 1.05, "x",
        figures.emulated_step,
    ),
    Bar("B5a", "fixed bytes, chunk 16,384: most of 8K to 512K", "<=", 320, "MiB",
        figures.fixed_bytes),
    Bar("B5b", "fixed bytes, most over least of 8K to 512K", "<=", 1.02, "x", figures.fixed_spread),
    Bar("B6a", "prefill 512K, 24 GB emulated: GPU peak", "<=", 17.5, "GiB",
        figures.peak("prefill", 512 * K)),
    Bar("B6b", "decode 512K, 24 GB emulated: GPU peak", "<=", 17.5, "GiB",
        figures.peak("decode", 512 * K)),
    Bar("B6c", "prefill 512K, 24 GB emulated: of the compute roofline", ">=", 0.96, "share",
        figures.long_prefill),
    Bar("B7a", "Qwen2.5-7B shape, real prefill of 1M, 24 GB emulated: GPU peak", "<=", 18.0, "GiB",
        figures.peak("prefill", M, **_QWEN)),
    Bar("B7b", "Qwen2.5-7B shape, decode at 1M: link", ">=", 0.97, "share",
        figures.link("headinfer:0", M, **_QWEN, gpu_memory=CARD)),
    Bar("B8a", "Llama-3-8B shape, decode at 1M: link", ">=", 0.97, "share",
        figures.link("headinfer:0", M)),
    Bar("B8b", "Llama-3-8B shape, real prefill of 1M runs: tokens/s", ">=", 0.0, "tok/s",
        figures.million_prefill),
    Bar("B9a", "pinning 32 GiB while prefilling: added time", "<=", 0.02, "share", figures.startup),
    Bar("B9b", "longest launch gap during registration", "<=", 5.0, "ms", figures.stalls),
    Bar("G1", "host kernel alone, all cores, 4 heads per KV head, against a plain read", ">=", 0.95,
        "x", figures_cpu.kernel_alone),
    *(
        Bar(f"G2{letter}", f"three-way decode {context // K}K, auto, tokens/s against link only",
            ">=", 2.2, "x", figures_cpu.over_link(context))
        for letter, context in (("a", 128 * K), ("b", 512 * K))
    ),
    Bar("G2c", "three-way decode, auto, slowest of all runs: time against link only", "<=", 1.02,
        "x", figures_cpu.never_slower),
    Bar("G3", "three-way decode 128K, auto, tokens/s against hf-offloaded", ">=", 11, "x",
        figures_cpu.over_offloaded),
    Bar("G4a", "three-way decode 128K, 4 query tokens: bytes against 1", "<=", 1.01, "x",
        figures_cpu.draft("bytes")),
    Bar("G4b", "three-way decode 128K, 4 query tokens: time against 1", "<=", 1.3, "x",
        figures_cpu.draft("time")),
    Bar("G5", "decode 512K, KV on GPU, link and CPU: time against the slowest + weights", "<=", 1.1,
        "x", figures_cpu.three_tiers),
    Bar("G6a", "three-way logits from link only, over the spread of resident kernels", "<=", 1.0,
        "x", figures_cpu.logits_spread),
    Bar("G6b", "three-way logits: fixed shares that repeat bit for bit", ">=", 1.0, "share",
        figures_cpu.repeatable),
    Bar("B10", "needle, all depths, 8K to 1M: cells right", ">=", 1.0, "share", figures.needle),
)  # fmt: skip


def judge(bar: Bar, results: Results) -> Row:
    """The row of one bar."""
    row: Row = {
        "id": bar.id, "question": bar.question, "measured": None, "bar": bar.bar, "op": bar.op,
        "unit": bar.unit, "holds": None, "device": results.device, "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": "", "note": "",
    }  # fmt: skip
    try:
        figure = bar.measure(results)
    except Missing as missing:
        return row | {"note": str(missing)}
    meets = figure.value >= bar.bar if bar.op == ">=" else figure.value <= bar.bar
    source, note = figure.source, figure.note
    if BAR_DEVICE not in source["device"]:
        verdict = "meets the bar there" if meets else "misses the bar there too"
        note = f"measured on {source['device']}, not on an {BAR_DEVICE}; {verdict}. {note}"
    return row | {
        "measured": round(figure.value, 4), "holds": meets and BAR_DEVICE in source["device"],
        "device": source["device"], "versions": source["versions"], "date": source["date"],
        "command": source["command"], "note": note,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> list[Row]:
    """Write the bars; returns their rows."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    cli.add_argument("--results", type=Path, default=RESULTS)
    cli.add_argument("--out", type=Path, default=RESULTS / "bars.json")
    cli.add_argument("--device", help="part of the name of the device whose figures are judged")
    cli.add_argument(
        "--causes", type=Path, help="JSON of bar to text for its note; RESULTS/causes.json if there"
    )
    args = cli.parse_args(argv)
    results = read_results(args.results, args.device)
    path = args.causes or args.results / "causes.json"
    causes = json.loads(path.read_text(encoding="utf-8")) if args.causes or path.exists() else {}
    if unknown := causes.keys() - {bar.id for bar in BARS}:
        raise SystemExit(f"{path}: no bar is called {', '.join(sorted(unknown))}")
    known = {row["id"]: row for row in read_rows(args.out)}
    rows = []
    for bar in BARS:
        row = judge(bar, results)
        # A figure of an earlier run stays when this run has none.
        if row["measured"] is None and known.get(bar.id, {}).get("measured") is not None:
            row = known[bar.id]
        if bar.id in causes and not row["note"].endswith(causes[bar.id]):
            row = row | {"note": f"{row['note']}. {causes[bar.id]}"}
        rows.append(row)
        say(
            "%-4s %-8s %s %s %s  %s",
            bar.id,
            row["measured"],
            bar.op,
            bar.bar,
            row["holds"],
            row["note"],
        )
    write_rows(args.out, rows)
    return rows


if __name__ == "__main__":
    main()
