"""Does device memory grow with the context? Fixed bytes of a streamed cache, by context.

Each length is prefilled, or where it is longer than two chunks filled with random pages, and then
runs one real chunk and four decode steps. ``allocated_bytes`` is what the allocator holds for the
cache afterwards; it must be what ``stats()`` says. ``peak_over_weights_bytes`` covers activations
and attention workspace too.
"""

from __future__ import annotations

import torch

from benchmarks.common import (
    Peak,
    Row,
    Setup,
    format_tokens,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    show_bytes,
    synchronize,
    write_rows,
)
from benchmarks.models import build
from benchmarks.prefill import make_variant
from benchmarks.synthetic import fill_headinfer
from benchmarks.variants import Variant, Variants


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(variant: Variant, context: int, chunk: int, setup: Setup) -> Row:
    """One length with a fresh cache."""
    device = setup.device
    ids = torch.randint(0, variant.model.config.vocab_size, (1, context), device=device)
    synchronize(device)
    before, peak = _allocated(device), Peak(device)
    variant.open(context)
    peak.start()
    with torch.no_grad(), variant.active():
        synthetic = context > 2 * chunk
        if synthetic:
            variant.forward(ids[:, :chunk])
            fill_headinfer(variant.cache, context - chunk)
            peak.start()
            variant.forward(ids[:, -chunk:])
        else:
            variant.prefill(ids, chunk)
        for _ in range(4):
            variant.decode(ids[:, -1:])
    synchronize(device)
    stats, found = variant.cache.stats(), peak.read()
    allocated = _allocated(device) - before - stats.resident_bytes
    del ids
    row: Row = {
        "context": context, "chunk": chunk, "synthetic": synthetic, "variant": variant.name,
        "fixed_bytes": stats.fixed_bytes, "slot_bytes": stats.slot_bytes,
        "staging_bytes": stats.staging_bytes, "tail_bytes": stats.tail_bytes,
        "workspace_bytes": stats.workspace_bytes, "resident_bytes": stats.resident_bytes,
        "kv_bytes": stats.kv_bytes, "host_kv_bytes": stats.host_bytes, **found,
    }  # fmt: skip
    if device.type == "cuda":
        row["allocated_bytes"] = allocated
        row["peak_over_weights_bytes"] = found["gpu_peak_bytes"] - before
    variant.close()
    return row


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("memory", "Fixed device bytes of a streamed cache against the context.")
    cuda = torch.cuda.is_available()
    contexts = [8 << 10, 128 << 10, 512 << 10] if cuda else [256, 512, 2048]
    cli.add_argument("--context", type=parse_tokens, nargs="+", default=contexts)
    cli.add_argument("--chunk", type=parse_tokens, default=16384 if cuda else 128)
    tiny = "headinfer:0:page_tokens=64:tail_tokens=32"
    cli.add_argument("--variant", default="headinfer:0" if cuda else tiny)
    cli.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model = build(args.model, setup.device, layers=args.layers)
    variant = make_variant(Variants(model), args.variant, args.lowering)
    # Compilation and kernels keep device memory of their own; it is in place before the first row.
    measure(variant, args.chunk + 64, args.chunk, setup)
    rows = []
    for context in args.context:
        row = measure(variant, context, args.chunk, setup)
        shape = f"{model.config.model_type}-{model.config.num_hidden_layers}"
        name = f"memory/{setup.tag}/{shape}/{args.variant}/n{context}/c{args.chunk}"
        rows.append({"id": name, "case": "memory", **row} | provenance(setup.device, args.note))
        write_rows(args.out, rows)
        say(
            "%6s: fixed %s (slots %s, staging %s, tail %s), allocator %s, peak over weights %s",
            format_tokens(context), show_bytes(row["fixed_bytes"]), show_bytes(row["slot_bytes"]),
            show_bytes(row["staging_bytes"]), show_bytes(row["tail_bytes"]),
            show_bytes(row.get("allocated_bytes")), show_bytes(row.get("peak_over_weights_bytes")),
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
