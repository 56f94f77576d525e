"""How fast is a prompt read? Tokens per second of chunked prefill, for every variant and context.

Variants take turns in each round, so that drift of the machine falls on all of them. The first
round is not counted: it compiles, plans kernels and takes memory; its time is kept as ``first_s``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common import (
    Peak,
    Row,
    Setup,
    format_tokens,
    in_turns,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    show_bytes,
    summary,
    synchronize,
    write_rows,
)
from benchmarks.models import build
from benchmarks.roofline import Roofline, measure
from benchmarks.variants import DEFAULT, Variant, Variants


def time_prefill(variant: Variant, ids: torch.Tensor, chunk: int) -> tuple[float, torch.Tensor]:
    """Seconds of one prefill of ``ids`` ``[1, n]`` into an empty cache, and the logits."""
    device = ids.device
    synchronize(device)
    start = time.perf_counter()
    logits = variant.prefill(ids, chunk)
    synchronize(device)
    return time.perf_counter() - start, logits


class Cell:
    """All rounds of one variant at one context."""

    def __init__(self, variant: Variant, context: int, chunk: int, setup: Setup) -> None:
        self.variant, self.context, self.chunk, self.setup = variant, context, chunk, setup
        self.peak = Peak(setup.device)
        self.first_s = 0.0
        self.seconds: list[float] = []
        self.peaks: Row = {}
        self.details: Row = {}
        self.logits: torch.Tensor | None = None
        self.failure: str | None = None

    def run(self, ids: torch.Tensor, warmup: bool) -> None:
        """One prefill; running out of memory is a result."""
        variant = self.variant
        try:
            with torch.no_grad(), variant.active():
                if variant.cache is None:
                    variant.open(self.context)
                else:
                    variant.restart(self.context)
                self.peak.start()
                seconds, logits = time_prefill(variant, ids, self.chunk)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.failure = f"does not fit: {str(error).splitlines()[0]}"
            variant.close()
            return
        # A copy: a compiled call may write its next result over this one.
        self.logits = logits.float().clone()
        if warmup:
            self.first_s = seconds
        else:
            self.seconds.append(seconds)
        self.peaks, self.details = self.peak.read(), variant.details()
        if variant.keeps_kv_on_gpu:
            variant.close()

    def row(self, roofline: Roofline, reference: torch.Tensor | None, note: str) -> Row:
        """What was measured so far; ``reference`` are the logits of another variant."""
        variant, setup = self.variant, self.setup
        shape, chunk = variant.shape, variant.chunk(self.chunk)
        name = getattr(variant.model.config, "model_type", "model")
        row: Row = {
            "id": f"prefill/{setup.tag}/{name}-{shape.layers}/{variant.name}"
            f"/n{self.context}/c{self.chunk}",
            "case": "prefill", "variant": variant.name, "context": self.context, "chunk": chunk,
            "model": name, "layers": shape.layers, "gpu_memory": setup.gpu_memory,
        }  # fmt: skip
        if self.failure is not None:
            row["failure"] = self.failure
        else:
            # Where only one round ran it was the warm-up, and the row says so.
            times = self.seconds or [self.first_s]
            seconds = summary(times)
            floor = roofline.prefill_seconds(shape, self.context, chunk)
            row |= {
                "seconds": seconds, "first_s": round(self.first_s, 4), "cold": not self.seconds,
                "tokens_per_s": round(self.context / seconds["median"], 1),
                "roofline_s": round(floor, 4), "of_roofline": round(floor / seconds["median"], 4),
                "logits_error": _error(self.logits, reference),
                **self.peaks, "details": self.details,
            }  # fmt: skip
        return row | {"roofline": roofline.as_row()} | provenance(setup.device, note)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("prefill", "Tokens per second of chunked prefill.")
    add = cli.add_argument
    tiny = not torch.cuda.is_available()
    add("--context", type=parse_tokens, nargs="+", default=[128 if tiny else 128 << 10])
    add("--chunk", type=parse_tokens, default=64 if tiny else 16384)
    add("--variants", nargs="+", default=list(DEFAULT))
    add("--rounds", type=int, default=3, help="counted rounds; 0 counts the first one")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model, roofline, made = prepare_variants(args, setup)
    rows: dict[str, Row] = {}
    for context in args.context:
        ids = torch.randint(0, model.config.vocab_size, (1, context), device=setup.device)
        cells = [Cell(variant, context, args.chunk, setup) for variant in made]
        for turn, cell in in_turns(cells, args.rounds + 1):
            if cell.failure is None:
                cell.run(ids, warmup=turn == 0)
                _report(cell, turn)
            row = cell.row(roofline, cells[0].logits, args.note)
            rows[row["id"]] = row
            write_rows(args.out, [row])
        for cell in cells:
            cell.variant.close()
    return list(rows.values())


def _error(logits: torch.Tensor | None, reference: torch.Tensor | None) -> float | None:
    """Relative difference of two variants' logits, a check that they compute the same."""
    if logits is None or reference is None:
        return None
    return round(float((logits - reference).norm() / reference.norm()), 6)


def prepare_variants(
    args: argparse.Namespace, setup: Setup
) -> tuple[PreTrainedModel, Roofline, list[Variant]]:
    """The model, the rates of the machine, and those of ``args.variants`` that run here."""
    model = build(args.model, setup.device, layers=args.layers)
    variants = Variants(model)
    say(
        "%s: %d layers, best kernel %s", args.model, model.config.num_hidden_layers, variants.kernel
    )
    names = [name for name in args.variants if usable(variants, name)]
    roofline = measure(setup.device, variants.make("resident").shape, model.dtype)
    say("%s", roofline.as_row())
    return model, roofline, [make_variant(variants, name, args.lowering) for name in names]


def usable(variants: Variants, name: str) -> bool:
    """Whether a variant runs here; says why not."""
    reason = variants.unavailable(name)
    if reason is not None:
        say("%s left out: %s", name, reason)
    return reason is None


def make_variant(variants: Variants, name: str, lowering: str) -> Variant:
    """A variant by name, with ``lowering`` where it is ours."""
    options: dict[str, Any] = {"lowering": lowering} if name.startswith("headinfer") else {}
    return variants.make(name, **options)


def _report(cell: Cell, turn: int) -> None:
    label = f"{cell.variant.name} {format_tokens(cell.context)}"
    if cell.failure is not None:
        say("%-28s %s", label, cell.failure)
        return
    seconds = (cell.seconds or [cell.first_s])[-1]
    say(
        "%-28s round %d: %8.3f s %9.0f tok/s, GPU peak %s, host %s",
        label, turn, seconds, cell.context / seconds,
        show_bytes(cell.peaks.get("gpu_peak_bytes")), show_bytes(cell.peaks["host_peak_bytes"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
