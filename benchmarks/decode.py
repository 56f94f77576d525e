"""How long does a token take? Seconds per decode step, for every variant and context.

A step is a forward pass of one token, the argmax of its logits, and a synchronisation, as
``generate`` has one a token. After the single steps a run of steps without synchronisation gives
the rate that the queue alone would allow. Variants take turns in each round.
"""

from __future__ import annotations

import time

import torch

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
from benchmarks.prefill import prepare_variants
from benchmarks.roofline import Roofline
from benchmarks.variants import DEFAULT, Variant

WARMUP = 4


class Cell:
    """All rounds of one variant at one context."""

    def __init__(self, variant: Variant, context: int, chunk: int, setup: Setup) -> None:
        self.variant, self.context, self.chunk, self.setup = variant, context, chunk, setup
        self.peak = Peak(setup.device)
        self.step_ms: list[float] = []
        self.host_ms: list[float] = []
        self.queued_ms: list[float] = []
        self.unguarded_ms: list[float] = []
        self.streamed: list[int] = []
        self.resident = 0
        self.h2d_bytes = 0
        self.steps = 0
        self.fill_s = 0.0
        self.peaks: Row = {}
        self.details: Row = {}
        self.failure: str | None = None

    def run(self, ids: torch.Tensor, steps: int, rounds: int, synthetic: bool) -> None:
        """Fill the cache where it is empty, warm up, and time ``steps`` steps."""
        # A cache that stays open needs room for all rounds; more would only pad a static one.
        turns = 1 if self.variant.keeps_kv_on_gpu else rounds
        room = self.context + turns * (3 * steps + WARMUP)
        try:
            with torch.no_grad(), self.variant.active():
                if self.variant.cache is None:
                    self._fill(ids, room, synthetic)
                self._run(ids, steps)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.failure = f"does not fit: {str(error).splitlines()[0]}"
            self.variant.close()
            return
        if self.variant.keeps_kv_on_gpu:
            self.variant.close()

    def _run(self, ids: torch.Tensor, steps: int) -> None:
        variant, device = self.variant, ids.device
        token = ids[:, -1:]
        for _ in range(WARMUP):
            token = self._next(token)
        synchronize(device)
        self.peak.start()
        before = variant.details().get("h2d_bytes", 0)
        for _ in range(steps):
            held = self._held()
            self.streamed.append(variant.streamed_bytes(held))
            self.resident = variant.resident_bytes(held)
            start = time.perf_counter()
            token = self._next(token)
            queued = time.perf_counter()
            synchronize(device)
            self.step_ms.append((time.perf_counter() - start) * 1e3)
            self.host_ms.append((queued - start) * 1e3)
        start = time.perf_counter()
        for _ in range(steps):
            token = self._next(token)
        synchronize(device)
        self.queued_ms.append((time.perf_counter() - start) / steps * 1e3)
        self.peaks, self.details = self.peak.read(), variant.details()
        self.h2d_bytes += self.details.get("h2d_bytes", 0) - before
        self.steps += 2 * steps
        if variant.name.startswith("headinfer") and self.resident and not self.streamed[-1]:
            self._run_unguarded(token, steps)

    def _run_unguarded(self, token: torch.Tensor, steps: int) -> None:
        """Steps of which Dynamo checks no guards, as a user may ask for once all is compiled."""
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            for _ in range(steps):
                start = time.perf_counter()
                token = self._next(token)
                synchronize(token.device)
                self.unguarded_ms.append((time.perf_counter() - start) * 1e3)

    def _held(self) -> int:
        length = self.variant.cache.get_seq_length()
        # A static cache keeps its length on the device; reading it here is outside the timing.
        return int(length)

    def _fill(self, ids: torch.Tensor, room: int, synthetic: bool) -> None:
        variant = self.variant
        variant.open(room)
        synchronize(ids.device)
        start = time.perf_counter()
        if synthetic:
            variant.fill(self.context, self.chunk)
        else:
            variant.prefill(ids, self.chunk)
        synchronize(ids.device)
        self.fill_s = time.perf_counter() - start

    def _next(self, token: torch.Tensor) -> torch.Tensor:
        return self.variant.decode(token)[:, -1:].argmax(-1)

    def row(self, roofline: Roofline, synthetic: bool, note: str) -> Row:
        """What was measured so far."""
        variant, setup, shape = self.variant, self.setup, self.variant.shape
        name = getattr(variant.model.config, "model_type", "model")
        row: Row = {
            "id": f"decode/{setup.tag}/{name}-{shape.layers}/{variant.name}/n{self.context}",
            "case": "decode", "variant": variant.name, "context": self.context,
            "chunk": variant.chunk(self.chunk), "model": name, "layers": shape.layers,
            "gpu_memory": setup.gpu_memory, "synthetic": synthetic,
        }  # fmt: skip
        if self.failure is not None:
            row["failure"] = self.failure
        elif self.step_ms:
            step, queued = summary(self.step_ms), summary(self.queued_ms)
            streamed = sum(self.streamed) // len(self.streamed)
            moved = self.h2d_bytes // self.steps if self.h2d_bytes else streamed
            link = roofline.h2d_gb_s
            floor = roofline.decode_seconds(shape, self.resident, streamed) * 1e3
            row |= {
                "step_ms": step, "host_ms": summary(self.host_ms), "queued_step_ms": queued,
                "unguarded_step_ms": summary(self.unguarded_ms) if self.unguarded_ms else None,
                "streamed_bytes": streamed, "moved_bytes": moved, "resident_bytes": self.resident,
                "weight_bytes": shape.weight_bytes, "fill_s": round(self.fill_s, 3),
                "link_gb_s": round(moved / step["median"] / 1e6, 3),
                "of_link": round(moved / step["median"] / 1e6 / link, 4) if link else None,
                "queued_of_link": (
                    round(moved / queued["median"] / 1e6 / link, 4) if link else None
                ),
                "roofline_ms": round(floor, 4), "of_roofline": round(floor / step["median"], 4),
                **self.peaks, "details": self.details,
            }  # fmt: skip
        return row | {"roofline": roofline.as_row()} | provenance(setup.device, note)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("decode", "Seconds of one decode step.")
    add = cli.add_argument
    tiny = not torch.cuda.is_available()
    add("--context", type=parse_tokens, nargs="+", default=[128 if tiny else 128 << 10])
    add("--chunk", type=parse_tokens, default=64 if tiny else 16384)
    add("--variants", nargs="+", default=list(DEFAULT))
    add("--steps", type=int, default=16, help="timed steps a round, after 4 of warm-up")
    add("--rounds", type=int, default=2)
    add("--synthetic", action="store_true", help="random KV instead of a prefill")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model, roofline, made = prepare_variants(args, setup)
    rows: dict[str, Row] = {}
    for context in args.context:
        ids = torch.randint(0, model.config.vocab_size, (1, context), device=setup.device)
        cells = [Cell(variant, context, args.chunk, setup) for variant in made]
        for turn, cell in in_turns(cells, args.rounds):
            if cell.failure is None:
                cell.run(ids, args.steps, args.rounds, args.synthetic)
            row = cell.row(roofline, args.synthetic, args.note)
            _report(cell, row, turn)
            rows[row["id"]] = row
            write_rows(args.out, [row])
        for cell in cells:
            cell.variant.close()
    return list(rows.values())


def _report(cell: Cell, row: Row, turn: int) -> None:
    label = f"{cell.variant.name} {format_tokens(cell.context)}"
    if cell.failure is not None:
        say("%-28s %s", label, cell.failure)
        return
    say(
        "%-28s round %d: %8.3f ms (p10 %.3f, p90 %.3f; queued %.3f; host %.3f; without guards %s), "
        "link %s GB/s = %s, GPU peak %s",
        label, turn, row["step_ms"]["median"], row["step_ms"]["p10"], row["step_ms"]["p90"],
        row["queued_step_ms"]["median"], row["host_ms"]["median"],
        (row["unguarded_step_ms"] or {}).get("median"), row["link_gb_s"],
        row["of_link"], show_bytes(cell.peaks.get("gpu_peak_bytes")),
    )  # fmt: skip


if __name__ == "__main__":
    main()
