"""What happens when in one decode step? Kernels and copies by stream, from the profiler."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    Row,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    synchronize,
    write_rows,
)
from benchmarks.models import build
from benchmarks.prefill import make_variant
from benchmarks.variants import Variant, Variants

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def record(variant: Variant, token: torch.Tensor) -> list[dict[str, Any]]:
    """Spans of the second of three steps: kind, stream, name, start and microseconds."""
    activities = [ProfilerActivity.CPU]
    if token.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with torch.no_grad(), variant.active(), profile(activities=activities) as profiler:
        for index in range(3):
            with torch.profiler.record_function(f"step {index}"):
                variant.decode(token)
                synchronize(token.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    step = next(
        event for event in events
        if event.get("name") == "step 1" and event.get("cat") == "user_annotation"
    )  # fmt: skip
    kinds = _DEVICE if token.is_cuda else ("cpu_op",)
    spans = [
        {
            "kind": event["cat"],
            "stream": event.get("args", {}).get("stream", 0),
            "name": event["name"][:80],
            "start_us": round(event["ts"] - step["ts"], 2),
            "us": round(event["dur"], 2),
        }
        for event in events
        if event.get("cat") in kinds and step["ts"] <= event["ts"] < step["ts"] + step["dur"]
    ]
    return sorted(spans, key=lambda span: span["start_us"])


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("timeline", "Kernels and copies of one decode step, by stream.")
    cuda = torch.cuda.is_available()
    cli.add_argument("--context", type=parse_tokens, default=32 << 10 if cuda else 256)
    cli.add_argument("--chunk", type=parse_tokens, default=16384 if cuda else 128)
    cli.add_argument("--variant", default="headinfer:0")
    cli.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model = build(args.model, setup.device, layers=args.layers)
    variant = make_variant(Variants(model), args.variant, args.lowering)
    token = torch.zeros((1, 1), dtype=torch.long, device=setup.device)
    with torch.no_grad(), variant.active():
        variant.open(args.context + 16)
        variant.fill(args.context, args.chunk)
        for _ in range(4):
            variant.decode(token)
    spans = record(variant, token)
    variant.close()
    busy: dict[str, float] = {}
    for span in spans:
        busy[f"{span['kind']} {span['stream']}"] = (
            busy.get(f"{span['kind']} {span['stream']}", 0.0) + span["us"]
        )
    shape = f"{model.config.model_type}-{model.config.num_hidden_layers}"
    row = {
        "id": f"timeline/{setup.tag}/{shape}/{args.variant}/n{args.context}", "case": "timeline",
        "variant": args.variant, "context": args.context, "busy_us": busy, "spans": spans,
    } | provenance(setup.device, args.note)  # fmt: skip
    write_rows(args.out, [row])
    say("%d spans; busy us: %s", len(spans), {name: round(us) for name, us in busy.items()})
    return [row]


if __name__ == "__main__":
    main()
