"""Does the CPU beside the link make decode faster? Decode steps by share of the host blocks.

One cache, one compiled model: only ``cpu_attention`` changes between the settings, which take turns
in each round, on the same filled pages. ``off`` is the link alone. Steps of several query tokens
are those of prompt lookup or drafts. ``logits`` compares a step of one token at the same place: its
difference from the link alone, by norms as in ``logits``, beside what another GPU kernel changes in
the link alone (``spread``), and whether it is repeatable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks.common import (
    Peak,
    Row,
    Setup,
    in_turns,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    summary,
    synchronize,
    write_rows,
)
from benchmarks.models import build, shape_of
from benchmarks.roofline import measure
from benchmarks.synthetic import fill_headinfer
from headinfer_compile import HeadInferCache, HeadInferConfig, headinfer
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.executor import CompiledGraph
from headinfer_compile.runtime.attention import kernel_table

WARMUP = 4
SETTLE = 24
"""Steps that ``auto`` gets at first, to find its share."""


class Model:
    """A compiled model whose options can be changed without compiling again."""

    def __init__(self, model: Any, lowering: str) -> None:
        self.model = model
        self._argument = cache_argument(model)
        self.options: dict[str, Any] = {"lowering": lowering}
        self.graphs: list[CompiledGraph] = []
        model.compile(backend=self._backend)

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = headinfer(gm, example_inputs, options=self.options)
        if isinstance(compiled, CompiledGraph):
            self.graphs.append(compiled)
        return compiled

    def use(self, setting: str) -> None:
        """Take ``cpu_attention`` = ``setting`` from now on."""
        share = setting if setting in ("auto", "off") else float(setting)
        self.options = {**self.options, "cpu_attention": share}
        for graph in self.graphs:
            graph.config = HeadInferConfig.from_options(self.options)

    def step(self, ids: torch.Tensor, cache: HeadInferCache) -> torch.Tensor:
        """Logits of the last token of a call."""
        out: torch.Tensor
        held = {self._argument: cache}
        out = self.model(ids, use_cache=True, logits_to_keep=1, **held).logits
        return out


@dataclass
class Cell:
    """All rounds of one setting and number of query tokens."""

    setting: str
    queries: int
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    queued_ms: list[float] = field(default_factory=list)
    h2d_bytes: int = 0
    cpu_bytes: int = 0
    steps: int = 0
    cpu_gb_s: float | None = None
    lead_us: float | None = None
    blocks: list[int] = field(default_factory=list)
    """Of a step: host blocks sent and attended on the CPU, by a site, at the end."""
    peaks: Row = field(default_factory=dict)

    def run(self, model: Model, cache: HeadInferCache, steps: int, settle: int) -> None:
        """Warm up, time ``steps`` steps one by one and as many queued, and drop the tokens."""
        device = model.model.device
        ids = torch.zeros((1, self.queries), dtype=torch.long, device=device)
        length = cache.get_seq_length()
        model.use(self.setting)
        for _ in range(WARMUP + settle):
            ids = self._next(model, cache, ids)
            synchronize(device)
        peak = Peak(device)
        peak.start()
        before, (ran, spent) = cache.stats(), _lane(cache)
        for _ in range(steps):
            start = time.perf_counter()
            ids = self._next(model, cache, ids)
            queued = time.perf_counter()
            synchronize(device)
            self.step_ms.append((time.perf_counter() - start) * 1e3)
            self.host_ms.append((queued - start) * 1e3)
        start = time.perf_counter()
        for _ in range(steps):
            ids = self._next(model, cache, ids)
        synchronize(device)
        self.queued_ms.append((time.perf_counter() - start) / steps * 1e3)
        after, (ran_now, spent_now) = cache.stats(), _lane(cache)
        self.h2d_bytes += after.h2d_bytes - before.h2d_bytes
        self.cpu_bytes += after.cpu_bytes - before.cpu_bytes
        self.steps += 2 * steps
        if spent_now > spent:
            self.cpu_gb_s = round((ran_now - ran) / (spent_now - spent), 2)
            self.lead_us = after.cpu_lead_us
        self.peaks = peak.read()
        # The schedules of the last call are those of the last step.
        key = next(iter(cache.session.plans.values())).schedule.key
        self.blocks = [key.host, key.cpu]
        cache.crop(length - cache.get_seq_length())

    def _next(self, model: Model, cache: HeadInferCache, ids: torch.Tensor) -> torch.Tensor:
        return model.step(ids, cache)[:, -1:].argmax(-1).expand(1, self.queries)

    def row(self) -> Row:
        """What was measured so far."""
        step, queued = summary(self.step_ms), summary(self.queued_ms)
        h2d, cpu = self.h2d_bytes // self.steps, self.cpu_bytes // self.steps
        return {
            "setting": self.setting, "queries": self.queries, "step_ms": step,
            "host_ms": summary(self.host_ms), "queued_step_ms": queued, "h2d_bytes": h2d,
            "cpu_bytes": cpu, "link_gb_s": round(h2d / step["median"] / 1e6, 2),
            "total_gb_s": round((h2d + cpu) / step["median"] / 1e6, 2),
            "cpu_gb_s_while_busy": self.cpu_gb_s, "cpu_lead_us": self.lead_us,
            "blocks_sent_and_on_cpu": self.blocks, **self.peaks,
        }  # fmt: skip


def _lane(cache: HeadInferCache) -> tuple[int, int]:
    """Bytes and nanoseconds of the jobs of the CPU so far."""
    lane = cache.session.lane
    return (lane.report.bytes, lane.report.nanoseconds) if lane is not None else (0, 0)


def _threads(cache: HeadInferCache) -> int | None:
    lane = cache.session.lane
    return lane.kernel.threads if lane is not None else None


def _logits(model: Model, cache: HeadInferCache, setting: str) -> torch.Tensor:
    """Logits of one token at the end of what is filled, which stays as it is."""
    model.use(setting)
    ids = torch.ones((1, 1), dtype=torch.long, device=model.model.device)
    found = model.step(ids, cache).float()
    cache.crop(-1)
    return found


@contextmanager
def _other_kernels(cache: HeadInferCache) -> Iterator[None]:
    """Let every attention on the device take the next best kernel to the one it has taken."""
    chosen = cache.session.kernels
    before = dict(chosen)
    for request, kernel in before.items():
        others = [k for k in kernel_table() if k != kernel and k.supports(request) is None]
        if others:
            chosen[request] = min(others, key=lambda other: other.cost(request))
    try:
        yield
    finally:
        chosen.update(before)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("three_way", "Seconds of one decode step on GPU, link and CPU together.")
    add = cli.add_argument
    tiny = not torch.cuda.is_available()
    add("--context", type=parse_tokens, nargs="+", default=[400 if tiny else 128 << 10])
    add("--chunk", type=parse_tokens, default=100 if tiny else 16384)
    add("--settings", nargs="+", default=["off", "0.5", "0.6", "0.7", "auto"])
    add("--queries", type=int, nargs="+", default=[1, 4])
    add("--steps", type=int, default=8, help="timed steps a round, twice: one by one and queued")
    add("--rounds", type=int, default=2)
    add("--gpu-budget", default="0", help="KV bytes that may stay on the GPU, or auto")
    add("--page-tokens", default="auto")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model = Model(build(args.model, setup.device, layers=args.layers), args.lowering)
    pages = int(args.page_tokens) if args.page_tokens != "auto" else "auto"
    rows: list[Row] = []
    for context in args.context:
        budget = int(args.gpu_budget) if args.gpu_budget.isdecimal() else args.gpu_budget
        cache = HeadInferCache(model.model.config, gpu_budget=budget, page_tokens=pages)
        with cache, torch.no_grad():
            first = torch.zeros((1, min(args.chunk, context)), dtype=torch.long)
            model.step(first.to(setup.device), cache)
            fill_headinfer(cache, context)
            say("%d tokens filled", context)
            rows += _measure(args, setup, model, cache, context)
    return rows


def _measure(
    args: Any, setup: Setup, model: Model, cache: HeadInferCache, context: int
) -> list[Row]:
    logits = _compare(model, cache, args.settings)
    shape, budget = shape_of(model.model), args.gpu_budget
    roofline = measure(setup.device, shape, model.model.dtype).as_row()
    cells = {(s, q): Cell(s, q) for s in args.settings for q in args.queries}
    config = model.model.config
    rows: dict[str, Row] = {}
    for turn, (setting, queries) in in_turns(list(cells), args.rounds):
        cell = cells[setting, queries]
        settle = SETTLE if setting == "auto" and turn == 0 else 0
        cell.run(model, cache, args.steps, settle)
        name = f"{config.model_type}-{config.num_hidden_layers}/n{context}/q{queries}/{setting}"
        name += "" if budget == "0" else f"/{budget}"
        row = {
            "id": f"three_way/{setup.tag}/{name}", "case": "three_way", "context": context,
            "model": config.model_type, "layers": config.num_hidden_layers, "synthetic": True,
            **cell.row(), "logits": logits[setting], "gpu_budget": budget,
            "weight_bytes": shape.weight_bytes, "roofline": roofline,
            "resident_bytes": cache.stats().resident_bytes, "cpu_threads": _threads(cache),
            **provenance(setup.device, args.note),
        }  # fmt: skip
        rows[row["id"]] = row
        write_rows(args.out, [row])
        say(
            "%d queries, %-4s round %d: %.3f ms (queued %.3f, host %.3f), link %s + CPU %s "
            "GB/s, blocks %s, lead %s us", queries, setting, turn, row["step_ms"]["median"],
            row["queued_step_ms"]["median"], row["host_ms"]["median"], row["link_gb_s"],
            row["cpu_gb_s_while_busy"], row["blocks_sent_and_on_cpu"], row["cpu_lead_us"],
        )  # fmt: skip
    stats = cache.stats()
    assert stats.eager_updates == stats.materialised_layers == 0, stats
    return list(rows.values())


def _compare(model: Model, cache: HeadInferCache, settings: Sequence[str]) -> dict[str, Row]:
    base = _logits(model, cache, "off")
    with _other_kernels(cache):
        other = _logits(model, cache, "off")
    spread = float((other - base).norm() / base.norm())
    found: dict[str, Row] = {}
    for setting in settings:
        one, two = (_logits(model, cache, setting) for _ in range(2))
        nearest = min(float((one - wanted).norm() / base.norm()) for wanted in (base, other))
        found[setting] = {
            "norm_difference": nearest, "spread": spread, "repeatable": torch.equal(one, two),
        }  # fmt: skip
        say("%s: logits %s", setting, found[setting])
    return found


if __name__ == "__main__":
    main()
