"""The figures of the CPU lane, for the bars G1 to G6; as ``figures.py``."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.common import Row
from benchmarks.figures import GIB, Figure, K, Missing, Results

_SHAPE = {"model": "llama", "layers": 32}


def _row(results: Results, context: int, setting: str, queries: int, budget: str = "0") -> Row:
    wanted = {"context": context, "setting": setting, "queries": queries, "gpu_budget": budget}
    return results.find("three_way", **_SHAPE, **wanted)


def kernel_alone(results: Results) -> Figure:
    """The kernel with all cores over a plain read of the same pages."""
    rows = [
        row for row in results.rows
        if row.get("case") == "host_attention" and not row.get("flags")
        and (row["queries_per_kv"], row["queries"]) == (4, 1) and row["threads"] == row["cores"]
    ]  # fmt: skip
    if not rows:
        raise Missing("not run: host_attention with all cores, 4x1")
    row = max(rows, key=lambda row: str(row["date"]))
    note = f"{row['attend_gb_s']['median']} of {row['read_gb_s']['median']} GB/s, {row['level']}"
    if "beside_gb_s" in row:
        note += (
            f"; beside the link {row['beside_gb_s']['median']} + "
            f"{row['beside_link_gb_s']['median']}"
        )
    return Figure(row["of_read"], row, note)


def over_link(context: int) -> Callable[[Results], Figure]:
    """Tokens per second of ``auto`` over those of the link alone."""

    def measure(results: Results) -> Figure:
        ours, link = (_row(results, context, setting, 1) for setting in ("auto", "off"))
        ratio = link["step_ms"]["median"] / ours["step_ms"]["median"]
        note = (
            f"{ours['step_ms']['median']:.1f} against {link['step_ms']['median']:.1f} ms; "
            f"{ours['total_gb_s']} GB/s in all, blocks sent and on the CPU "
            f"{ours['blocks_sent_and_on_cpu']}; synthetic filled pages"
        )
        return Figure(ratio, ours, note)

    return measure


def over_offloaded(results: Results) -> Figure:
    """Tokens per second of ``auto`` over those of transformers' offloaded cache."""
    ours = _row(results, 128 * K, "auto", 1)
    base = results.find(
        "decode", **_SHAPE, variant="hf-offloaded", context=128 * K, gpu_memory=None
    )
    ratio = base["step_ms"]["median"] / ours["step_ms"]["median"]
    return Figure(
        ratio, ours, f"{ours['step_ms']['median']:.1f} against {base['step_ms']['median']:.1f} ms"
    )


def draft(field: str) -> Callable[[Results], Figure]:
    """A pass of 4 query tokens over one of 1: its time, or its bytes."""

    def measure(results: Results) -> Figure:
        four, one = (_row(results, 128 * K, "auto", queries) for queries in (4, 1))
        if not one["cpu_bytes"]:
            raise Missing("auto had left the CPU out: this would be the link alone")
        if field == "bytes":
            moved = [row["h2d_bytes"] + row["cpu_bytes"] for row in (four, one)]
            return Figure(moved[0] / moved[1], four, f"{moved[0]:,} against {moved[1]:,}")
        times = [row["step_ms"]["median"] for row in (four, one)]
        return Figure(times[0] / times[1], four, f"{times[0]:.1f} against {times[1]:.1f} ms")

    return measure


def never_slower(results: Results) -> Figure:
    """The slowest ``auto`` over the link alone, of all contexts and query counts run."""
    worst: Figure | None = None
    for row in results.rows:
        if row.get("case") != "three_way" or row.get("setting") != "auto":
            continue
        wanted = {name: row[name] for name in ("model", "layers", "context", "queries")}
        link = results.find("three_way", **wanted, setting="off", gpu_budget=row["gpu_budget"])
        ratio = row["step_ms"]["median"] / link["step_ms"]["median"]
        if worst is None or ratio > worst.value:
            worst = Figure(ratio, row, f"at {row['context']} tokens, {row['queries']} queries")
    if worst is None:
        raise Missing("not run: three_way auto")
    return worst


def three_tiers(results: Results) -> Figure:
    """A step with KV on the GPU, over the link and on the CPU, over the slowest of the three."""
    row = _row(results, 512 * K, "auto", 1, "auto")
    rates = row["roofline"]
    cpu = results.find("host_attention", threads=row["cpu_threads"], queries_per_kv=4, queries=1)
    parts = {
        "resident": row["resident_bytes"] / rates["hbm_gb_s"],
        "link": row["h2d_bytes"] / rates["h2d_gb_s"],
        "CPU": row["cpu_bytes"] / cpu["read_gb_s"]["median"],
    }
    compute = row["weight_bytes"] / rates["hbm_gb_s"]
    floor_ms = (max(parts.values()) + compute) / 1e6
    split = ", ".join(f"{name} {nbytes / 1e6:.1f} ms" for name, nbytes in parts.items())
    note = (
        f"{row['step_ms']['median']:.1f} ms; {split}, weights {compute / 1e6:.1f} ms; "
        f"{row['resident_bytes'] / GIB:.1f} GiB resident"
    )
    return Figure(row["step_ms"]["median"] / floor_ms, row, note)


def logits_spread(results: Results) -> Figure:
    """What the CPU changes in the logits over what another GPU kernel changes at the same place."""
    rows = [row for row in _fixed_shares(results) if "spread" in row["logits"]]
    if not rows:
        raise Missing("not run: three_way with a fixed share, since it takes a spread of its own")
    row = max(rows, key=lambda row: row["logits"]["norm_difference"] / row["logits"]["spread"])
    found, spread = row["logits"]["norm_difference"], row["logits"]["spread"]
    note = f"{found:.2e} at share {row['setting']}; two GPU kernels {spread:.2e}"
    return Figure(found / spread, row, note)


def repeatable(results: Results) -> Figure:
    """Share of the fixed shares run that gave the same bits twice."""
    rows = _fixed_shares(results)
    if not rows:
        raise Missing("not run: three_way with a fixed share")
    same = sum(row["logits"]["repeatable"] for row in rows)
    return Figure(same / len(rows), rows[-1], f"{same} of {len(rows)}")


def _fixed_shares(results: Results) -> list[Row]:
    return [
        row for row in results.rows
        if row.get("case") == "three_way" and row["setting"] not in ("auto", "off")
    ]  # fmt: skip
