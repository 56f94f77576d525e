"""Is the plan right? Predicted beside measured bytes and seconds; fails where one is outside.

The machine is probed in this process, and no run that is compared was used to fit the model. Each
cell is planned with the settings that the backend takes by itself, run, and compared: peak device
bytes, host bytes, seconds of the prefill and of a token. A ``synthetic`` cell fills its pages with
random values and runs its last chunk only: of it the seconds of that chunk are compared.

Tolerances: device bytes 3 %, host bytes 2 %, times 10 %, times that calls of the host bind 20 %.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

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
from benchmarks.synthetic import fill_headinfer
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.config import HeadInferConfig, parse_bytes
from headinfer_compile.cost_model import evaluate
from headinfer_compile.machine import Rates, save_profile
from headinfer_compile.model_facts import ModelFacts, facts_of
from headinfer_compile.plan_memory import Request, Settings
from headinfer_compile.plan_time import chunk_values
from headinfer_compile.planner import Plan, make_plan
from headinfer_compile.probe import probe, this_machine

TOLERANCE = {"gpu_bytes": 0.03, "host_bytes": 0.02, "seconds": 0.10, "host_bound": 0.20}
WARMUP = 4
_WHOLE_WARMUP = 131072
"""Longest context whose prefill runs before it is timed."""
QUICK = (("8K", "0", None), ("32K", "4GiB", None), ("128K", "0", None), ("128K", "auto", "24GiB"))


@dataclass(frozen=True)
class Cell:
    """What one comparison runs."""

    context: int
    budget: str
    card: str | None
    """Emulated device memory."""
    synthetic: bool


class Runner:
    """One model, compiled, with the facts and rates that its plans need."""

    def __init__(
        self, model: PreTrainedModel, name: str, setup: Setup, rates: Rates, args: Any
    ) -> None:
        self.model: Any = model
        self._argument = cache_argument(model)
        self.name, self.setup, self.rates, self.args = name, setup, rates, args
        self.facts: ModelFacts = facts_of(model)
        self.chunk: int = args.chunk
        self.sizes: dict[str, Any] = {}
        if args.page_tokens:
            self.sizes = {"page_tokens": args.page_tokens, "tail_tokens": args.page_tokens // 4}
        model.compile(backend=headinfer, options={"lowering": args.lowering})

    def warm_up(self) -> float:
        """Compile all graphs that the cells run; returns the seconds it took."""
        start = time.perf_counter()
        for budget in (0, 1 << 62):
            with self._cache(budget) as cache, torch.no_grad():
                for tokens in (self.chunk, self.chunk, 1, 1, 1):
                    self._forward(cache, torch.zeros(1, tokens, dtype=torch.int64))
        synchronize(self.setup.device)
        return time.perf_counter() - start

    def _cache(self, budget: int | str) -> HeadInferCache:
        return HeadInferCache(self.model.config, gpu_budget=budget, **self.sizes)

    def _forward(self, cache: HeadInferCache, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.setup.device)
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        out: torch.Tensor = self.model(
            input_ids=ids, position_ids=positions, **{self._argument: cache}, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return out

    def plan(self, cell: Cell) -> Plan:
        """What is predicted for a cell, with the settings that the backend takes by itself."""
        machine = replace(this_machine(measure=False, model=self.model), rates=self.rates)
        budget = None if cell.budget == "auto" else parse_bytes(cell.budget, "budget")
        config = HeadInferConfig()
        request = Request(cell.context, self.chunk, gpu_budget=budget, config=config, **self.sizes)
        return make_plan(self.facts, machine, request, Settings(self.chunk, config))

    def run(self, cell: Cell) -> tuple[Row, Plan]:
        """Plan, run and compare one cell."""
        device, peak = self.setup.device, Peak(self.setup.device)
        ids = torch.randint(0, self.model.config.vocab_size, (1, cell.context))
        with limited(device, cell.card):
            predicted = self.plan(cell)
            before = peak.read()["host_bytes"]
            budget = "auto" if cell.budget == "auto" else parse_bytes(cell.budget, "budget")
            with self._cache(budget) as cache, torch.no_grad():
                self._make_pages(cache, cell, ids)
                past = cell.context - self.chunk if cell.synthetic else 0
                synchronize(device)
                peak.start()
                start = time.perf_counter()
                for part in ids[:, past:].split(self.chunk, dim=1):
                    self._forward(cache, part)
                synchronize(device)
                seconds = time.perf_counter() - start
                host = peak.read()["host_bytes"] - before
                step = self._decode(cache)
                stats, found = cache.stats(), peak.read()
        last = (cell.context - 1) // self.chunk * self.chunk
        values = chunk_values(
            self.facts, predicted.machine, predicted.choice.memory, last, cell.context - last
        )
        expected = (
            evaluate("chunk_seconds", values) if cell.synthetic else predicted.prefill_seconds
        )
        card = f"-{cell.card.lower()}" if cell.card else ""
        shape = f"{self.name}-{self.facts.num_layers}"
        row: Row = {
            "id": f"plan_accuracy/{self.setup.tag}{card}/{shape}/{cell.budget}/n{cell.context}",
            "case": "plan_accuracy", "model": self.name, "context": cell.context,
            "chunk": self.chunk, "budget": cell.budget, "card": cell.card,
            "synthetic": cell.synthetic, "timed": "last chunk" if cell.synthetic else "prefill",
            "host_rss_bytes": host, "resident_bytes": stats.resident_bytes,
            "predicted_resident_bytes": predicted.resident_bytes,
            "limits": dict(predicted.limits), "h2d_bytes": stats.h2d_bytes,
            "sites_rewritten": stats.sites_rewritten, "eager_updates": stats.eager_updates,
            "gpu_peak_reserved_bytes": found.get("gpu_peak_reserved_bytes"),
            "entries": {
                "host_bytes": entry(predicted.host_bytes, stats.host_bytes, "host_bytes"),
                "prefill_seconds": entry(expected, seconds, bound(predicted, "prefill")),
                "seconds_per_token": entry(
                    predicted.seconds_per_token, step, bound(predicted, "decode")
                ),
            },
        }  # fmt: skip
        if device.type == "cuda":
            row["entries"]["gpu_bytes"] = entry(
                predicted.gpu_bytes, found["gpu_peak_bytes"], "gpu_bytes"
            )
        return row, predicted

    def _make_pages(self, cache: HeadInferCache, cell: Cell, ids: torch.Tensor) -> None:
        """Take all memory first, block by block as a prefill does, so that it is not timed.

        A short prefill runs once in full: kernels plan for its shapes and schedules are built.
        """
        cache.reserve(cell.context)
        whole = not cell.synthetic and cell.context <= _WHOLE_WARMUP
        for part in ids.split(self.chunk, dim=1) if whole else [ids[:, : self.chunk]]:
            self._forward(cache, part)
        for end in range(self.chunk, cell.context + self.chunk, self.chunk):
            cache.session.table.ensure(min(end, cell.context))
        if cell.synthetic:
            fill_headinfer(cache, cell.context - self.chunk)
        else:
            cache.reset()
            cache.reserve(cell.context)

    def _decode(self, cache: HeadInferCache) -> float:
        token, times = torch.zeros(1, 1, dtype=torch.int64), []
        for step in range(WARMUP + self.args.steps):
            start = time.perf_counter()
            token = self._forward(cache, token)[:, -1:].argmax(-1)
            synchronize(self.setup.device)
            if step >= WARMUP:
                times.append(time.perf_counter() - start)
        return statistics.median(times)


@contextmanager
def limited(device: torch.device, card: str | None) -> Iterator[None]:
    """Let the process take ``card`` bytes of the device and no more."""
    if card is None or device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_bytes(card, "card") / total, device)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def bound(plan: Plan, phase: str) -> str:
    """The tolerance of a time."""
    return "host_bound" if plan.limits[phase] == "calls of the host" else "seconds"


def entry(predicted: float, measured: float, kind: str) -> Row:
    """One comparison."""
    error = (predicted - measured) / measured if measured else float(predicted != 0)
    tolerance = TOLERANCE[kind]
    return {
        "predicted": predicted, "measured": measured, "error": round(error, 4),
        "tolerance": tolerance, "ok": abs(error) <= tolerance,
    }  # fmt: skip


def cells_of(args: Any) -> list[Cell]:
    """The cells that the arguments ask for."""
    if args.quick:
        cells = [Cell(parse_tokens(text), budget, card, False) for text, budget, card in QUICK]
        return [*cells, Cell(parse_tokens("512K"), "0", None, True)]
    found = []
    for context in args.context:
        synthetic = context >= args.synthetic_from and not args.real
        found += [Cell(context, budget, None, synthetic) for budget in args.budgets]
        if args.card and context <= args.card_up_to:
            found.append(Cell(context, "auto", args.card, synthetic))
    return found


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("plan_accuracy", "Predicted beside measured bytes and seconds.")
    add, cuda = cli.add_argument, torch.cuda.is_available()
    contexts = ["8K", "32K", "128K", "512K"] if cuda else ["256"]
    add("--context", type=parse_tokens, nargs="+", default=[parse_tokens(t) for t in contexts])
    add("--chunk", type=parse_tokens, default=16384 if cuda else 96)
    add("--budgets", nargs="+", default=["0", "4GiB", "auto"])
    add("--card", default="24GiB" if cuda else None, help="emulated card of one more cell each")
    add("--card-up-to", type=parse_tokens, default=131072, help="longest context on that card")
    add("--synthetic-from", type=parse_tokens, default=524288, help="only the last chunk is real")
    add("--real", action="store_true", help="prefill every context in full")
    add("--quick", action="store_true", help="five cells in about three minutes")
    add("--steps", type=int, default=12, help="timed decode steps, after 4 of warm-up")
    add("--page-tokens", type=int, help="short pages, for short contexts")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    profile = probe()
    save_profile(profile)  # the backend chooses by the same rates
    say("probed in %.1f s: %s", profile.seconds, profile.rates)
    model = build(args.model, setup.device, layers=args.layers)
    runner = Runner(model, args.model, setup, profile.rates, args)
    say("compiled in %.1f s", runner.warm_up())
    rows = []
    for cell in cells_of(args):
        row, predicted = runner.run(cell)
        row |= {"rates": profile.to_json()["rates"], **provenance(setup.device, args.note)}
        row["predicted_parts"] = {
            "prefill": predicted.choice.prefill.parts, "decode": predicted.choice.decode.parts,
            "tiers": predicted.tiers,
        }  # fmt: skip
        write_rows(args.out, [row])
        rows.append(row)
        _report(cell, row)
    return rows


def _report(cell: Cell, row: Row) -> None:
    say(
        "%s budget %s%s%s", format_tokens(cell.context), cell.budget,
        f" on {cell.card}" if cell.card else "", ", last chunk" if cell.synthetic else "",
    )  # fmt: skip
    for name, found in row["entries"].items():
        show = show_bytes if name.endswith("bytes") else lambda value: f"{value:.4f} s"
        say(
            "  %-18s predicted %12s measured %12s  %+6.1f %% %s", name, show(found["predicted"]),
            show(found["measured"]), 100 * found["error"], "" if found["ok"] else "OUTSIDE",
        )  # fmt: skip


if __name__ == "__main__":
    outside = [row["id"] for row in main() if not all(e["ok"] for e in row["entries"].values())]
    if outside:
        sys.exit(f"outside the tolerance: {', '.join(outside)}")
