"""What does the proof of the schedules cost in a long prefill?

Every plan key that a prefill in chunks meets is collected from a model on the meta device: no
weights, no K and V, the same steps of the same session. Each schedule, and each prologue that a
site could need, is built and proved as the compiled call does it, several times over; what counts
is the least time of each, since other work on the machine only adds to it. ``share`` is all of it
over the seconds of the same prefill in a results file.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.common import (
    RESULTS,
    Row,
    format_tokens,
    parse_tokens,
    parser,
    prepare,
    provenance,
    read_rows,
    say,
    slug,
    write_rows,
)
from benchmarks.models import build
from headinfer_compile import HeadInferCache, HeadInferConfig
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.passes import verify
from headinfer_compile.passes.pipeline import Dump, build_prologue, build_schedule
from headinfer_compile.passes.schedule import PlanContext, PlanKey, Schedule
from headinfer_compile.report_graphs import PlannedGraph, Recorder, compiled_by

_UNLIMITED_BYTES = 1 << 50


def keys_of(
    model: PreTrainedModel, context: int, chunk: int, config: HeadInferConfig
) -> list[PlanKey]:
    """The plan keys of a prefill with all K and V in host memory, in the order they are met.

    Args:
        model: On the meta device.
        context: Tokens of the prompt.
        chunk: Tokens of a chunk; the last may be shorter.
        config: Options of the compiled call.
    """
    found: dict[PlanKey, None] = {}
    recorder = Recorder(replace(config, lowering="eager"), PlannedGraph, model)
    with (
        HeadInferCache(model.config, gpu_budget=0, host_budget=_UNLIMITED_BYTES) as cache,
        compiled_by(model, recorder),
        torch.no_grad(),
    ):
        for start in range(0, context, chunk):
            new = min(chunk, context - start)
            ids = torch.empty((1, new), dtype=torch.int64, device="meta")
            model(ids, **{cache_argument(model): cache})
            for graph in recorder.take():
                found.update(dict.fromkeys(graph.keys.values()))
    return list(found)


def build_all(keys: list[PlanKey], config: HeadInferConfig) -> list[tuple[Schedule, bool]]:
    """The schedule of each key, and the prologue of each that enters with transfers in flight."""
    made = []
    for key in keys:
        schedule, _ = build_schedule(PlanContext(key, config), Dump(None), keep_text=False)
        made.append((schedule, False))
    cold = dict.fromkeys(replace(key, next_transfers=()) for key in keys if key.entry)
    return [*made, *((build_prologue(PlanContext(key, config)), True) for key in cold)]


def least_seconds(schedule: Schedule, prologue: bool, rounds: int) -> float:
    """The least time of ``rounds`` proofs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        verify.run(schedule.graph_module, schedule.key, prologue=prologue)
        times.append(time.perf_counter() - start)
    return min(times)


def measured_prefill(path: Path, model: str, layers: int, context: int, chunk: int) -> Row | None:
    """The row of the same prefill on a GPU, all K and V in host memory; None if it was not run."""
    for row in read_rows(path):
        same = (row.get("model"), row.get("layers"), row.get("context"), row.get("chunk"))
        on_gpu = row.get("variant") == "headinfer:0" and not row["device"].startswith("cpu")
        if on_gpu and row.get("gpu_memory") is None and same == (model, layers, context, chunk):
            return row
    return None


def cpu_name() -> str:
    """The processor by name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(args: argparse.Namespace) -> Row:
    """Collect the keys, prove them, compare with the prefill."""
    config = HeadInferConfig()
    model = build(args.model, torch.device("meta"), layers=args.layers, dtype=torch.bfloat16)
    keys = keys_of(model, args.context, args.chunk, config)
    first: list[float] = []
    least: list[float] = []
    for _ in range(args.rounds):
        made = build_all(keys, config)
        first.append(sum(schedule.verify_seconds for schedule, _ in made))
        again = [least_seconds(schedule, prologue, args.rounds) for schedule, prologue in made]
        least = list(map(min, least or again, again))
    nodes = sum(schedule.num_nodes for schedule, _ in made)
    total = sum(least)
    layers = model.config.num_hidden_layers
    measured = measured_prefill(
        args.prefill, model.config.model_type, layers, args.context, args.chunk
    )
    seconds = None if measured is None else measured["seconds"]["median"]
    return {
        "id": f"proof/{slug(cpu_name())}/{args.model}-{layers}/n{args.context}/c{args.chunk}",
        "case": "proof", "model": args.model, "layers": layers, "context": args.context,
        "chunk": args.chunk, "keys": len(keys), "prologues": len(made) - len(keys),
        "nodes": nodes, "most_nodes": max(schedule.num_nodes for schedule, _ in made),
        "us_per_node": round(total / nodes * 1e6, 3), "proof_s": round(total, 6),
        "proof_of_the_build_s": round(min(first), 6), "rounds": args.rounds,
        "cpu": cpu_name(), "prefill_s": seconds,
        "prefill": None if measured is None else measured["id"],
        "share": None if seconds is None else round(total / seconds, 6),
        "share_of_the_build": None if seconds is None else round(min(first) / seconds, 6),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the row that was written."""
    cli = parser("proof", "Seconds of proof in a prefill, and their share of it.")
    cli.set_defaults(model="llama-3-8b", device="cpu")
    cli.add_argument("--context", type=parse_tokens, default=parse_tokens("128K"))
    cli.add_argument("--chunk", type=int, default=16384)
    cli.add_argument("--rounds", type=int, default=9, help="repetitions, of which the least counts")
    cli.add_argument(
        "--prefill", type=Path, default=RESULTS / "prefill.json", help="results to compare with"
    )
    args = cli.parse_args(argv)
    setup = prepare(args)
    row = measure(args) | provenance(setup.device, args.note)
    write_rows(args.out, [row])
    say(
        "%s prefill of %s: %d keys, %d nodes, %.1f us a node, %.1f ms of proof, share %s",
        format_tokens(args.context), args.model, row["keys"], row["nodes"], row["us_per_node"],
        row["proof_s"] * 1e3, row["share"],
    )  # fmt: skip
    return [row]


if __name__ == "__main__":
    main()
