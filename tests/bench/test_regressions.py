"""Regression benchmarks of the CPU, judged by what does not depend on the machine.

``make bench-ci`` runs them against ``benchmarks/baseline.json``; ``make bench-ci ACCEPT=1`` writes
it anew. Counts must not rise at all; ratios of two times of one run may by their tolerance.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.fx import Graph, GraphModule
from transformers import DynamicCache, LlamaForCausalLM

from harness import CompiledModel, clean_dynamo, dynamo_graphs, generate, random_ids, tiny_llama
from headinfer_compile import HeadInferCache, HeadInferConfig, headinfer
from headinfer_compile.passes.pipeline import Dump, build_schedule
from headinfer_compile.passes.schedule import PlanContext, Schedule

if os.environ.get("HEADINFER_BENCH") is None:
    pytest.skip("run by `make bench-ci`", allow_module_level=True)

BASELINE = Path(__file__).resolve().parents[2] / "benchmarks" / "baseline.json"
PROMPT, CHUNK, NEW, LAYERS = 700, 128, 24, 3
# Times are the shortest of many, which neighbours on the machine disturb least; what is left of
# their noise is well under twice the baseline.
RATIO_TOLERANCE = 1.0


class Baseline:
    """Compares figures with the stored ones, or stores them."""

    def __init__(self, path: Path, accept: bool) -> None:
        self._path, self._accept = path, accept
        self._stored: dict[str, dict[str, float]] = {}
        if path.exists():
            self._stored = json.loads(path.read_text(encoding="utf-8"))

    def check(self, benchmark: BenchmarkFixture, tolerance: float = 0.0, **figures: float) -> None:
        """Fail where a figure is above its baseline by more than ``tolerance`` (0.1 is 10 %)."""
        benchmark.extra_info.update(figures)
        if self._accept:
            for name, value in figures.items():
                self._stored[name] = {"value": value, "tolerance": tolerance}
            text = json.dumps(self._stored, indent=1, sort_keys=True)
            self._path.write_text(text + "\n", encoding="ascii")
            return
        worse = []
        for name, value in figures.items():
            stored = self._stored.get(name)
            if stored is None:
                worse.append(f"{name} is {value:g} and has no baseline")
            elif value > stored["value"] * (1 + stored["tolerance"]):
                allowed = f", {stored['tolerance']:.0%} more allowed" if stored["tolerance"] else ""
                worse.append(f"{name} is {value:g}, the baseline is {stored['value']:g}{allowed}")
        if worse:
            pytest.fail(
                "\n".join(worse) + f"\nIf this is meant, accept the new figures: make bench-ci "
                f"ACCEPT=1 (writes {self._path.name}), and say why in the commit",
                pytrace=False,
            )


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    return Baseline(BASELINE, bool(os.environ.get("ACCEPT")))


@pytest.fixture(scope="module")
def llama() -> Iterator[CompiledModel]:
    with clean_dynamo():
        yield CompiledModel(tiny_llama(0, layers=LAYERS))


def _shortest(benchmark: BenchmarkFixture) -> float:
    """Seconds of the shortest round."""
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.min)


def _prefilled(llama: CompiledModel, **options: Any) -> HeadInferCache:
    cache = llama.cache(**options)
    llama.forward(random_ids(1, PROMPT), cache, CHUNK)
    return cache


def test_prefill(llama: CompiledModel, benchmark: BenchmarkFixture, baseline: Baseline) -> None:
    cache = benchmark.pedantic(_prefilled, (llama,), rounds=3, warmup_rounds=1)
    stats = cache.stats()
    baseline.check(
        benchmark,
        prefill_d2h_bytes_per_kv_byte=round(stats.d2h_bytes / stats.kv_bytes, 6),
        prefill_h2d_bytes_per_token=round(stats.h2d_bytes / PROMPT, 3),
        prefill_ops_per_layer=sum(stats.op_calls.values()) / LAYERS,
        prefill_host_bytes_per_kv_byte=round(stats.host_bytes / stats.kv_bytes, 6),
        prefill_fixed_bytes=stats.fixed_bytes,
    )


def test_decode(llama: CompiledModel, benchmark: BenchmarkFixture, baseline: Baseline) -> None:
    cache = _prefilled(llama)
    token = random_ids(2, 1)
    llama.forward(token, cache, 1)
    before = cache.stats()
    # One whole tail, so that its write-back is counted once.
    steps = 8

    def decode() -> None:
        llama.forward(token.expand(1, steps), cache, 1)

    benchmark.pedantic(decode, rounds=1)
    stats = cache.stats()
    ops = sum(stats.op_calls.values()) - sum(before.op_calls.values())
    moved = stats.h2d_bytes - before.h2d_bytes
    baseline.check(
        benchmark,
        decode_ops_per_step=ops / steps,
        decode_h2d_bytes_per_kv_byte=round(moved / steps / stats.kv_bytes, 6),
        decode_d2h_bytes_per_step=(stats.d2h_bytes - before.d2h_bytes) / steps,
    )


def test_graphs(benchmark: BenchmarkFixture, baseline: Baseline) -> None:
    with clean_dynamo():
        llama = CompiledModel(tiny_llama(0, layers=LAYERS))

        def two_prompts() -> None:
            for seed, tokens in ((3, PROMPT), (4, PROMPT - 100)):
                ids = random_ids(seed, tokens)
                generate(llama.model, ids, llama.cache(), 4, prefill_chunk_size=CHUNK)

        benchmark.pedantic(two_prompts, rounds=1)
        reports = [graph.report.regions for graph in llama.graphs]
        schedules = [s for graph in llama.graphs for s in graph.schedules.values()]
        baseline.check(
            benchmark,
            dynamo_graphs=dynamo_graphs(),
            unique_regions_per_graph=max(report.num_unique for report in reports),
            regions_per_layer=max(report.num_regions for report in reports) / LAYERS,
            schedules=len(schedules),
        )


def _decode_schedule(llama: CompiledModel) -> tuple[Schedule, HeadInferConfig]:
    """The schedule of a decode step over many host blocks."""
    cache = _prefilled(llama)
    llama.forward(random_ids(5, 1), cache, 1)
    graph, schedule = max(
        (
            (graph, schedule)
            for graph in llama.graphs
            for schedule in graph.schedules.values()
            if schedule.key.one_query
        ),
        key=lambda pair: pair[1].num_nodes,
    )
    return schedule, graph.config


def _bare_graph(nodes: int) -> GraphModule:
    """A chain of ``nodes`` calls: what FX alone needs for a graph of this size."""
    graph = Graph()
    value = graph.placeholder("x")
    for _ in range(nodes):
        value = graph.call_function(torch.ops.aten.neg.default, (value,))
    graph.output(value)
    return GraphModule({}, graph)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_schedule_build(
    llama: CompiledModel, benchmark: BenchmarkFixture, baseline: Baseline
) -> None:
    schedule, config = _decode_schedule(llama)

    def build() -> None:
        build_schedule(PlanContext(schedule.key, config), Dump(None), keep_text=False)

    bare: list[float] = []

    def beside() -> None:
        bare.append(_seconds(lambda: _bare_graph(schedule.num_nodes)))

    # The bare graph is built before every timed build: drift of the machine is in both.
    benchmark.pedantic(build, setup=beside, rounds=15, warmup_rounds=2)
    ratio = _shortest(benchmark) / min(bare)
    host_blocks = schedule.key.host
    baseline.check(
        benchmark,
        schedule_nodes_per_host_block=round(schedule.num_nodes / host_blocks, 4),
        schedule_transfers_per_host_block=schedule.num_transfers / host_blocks,
    )
    baseline.check(benchmark, RATIO_TOLERANCE, schedule_build_against_bare_fx=round(ratio, 3))


def test_step_against_inductor(benchmark: BenchmarkFixture, baseline: Baseline) -> None:
    """A decode step that streams everything, against plain ``torch.compile`` on the same model."""
    with clean_dynamo():
        resident = tiny_llama(0, layers=2)
        ours, plain = (LlamaForCausalLM(resident.config).eval() for _ in range(2))
        for model in (ours, plain):
            model.load_state_dict(resident.state_dict())
        # Uncompiled, the prompt costs no compilation; the cache takes it through its exact path.
        cache = HeadInferCache(resident.config, page_tokens=64, tail_tokens=16, gpu_budget=0)
        dynamic = DynamicCache()
        with torch.no_grad():
            for held in (cache, dynamic):
                resident(random_ids(6, 300), past_key_values=held)
        ours.compile(backend=headinfer)
        plain.compile(dynamic=True)
        token = random_ids(7, 1)

        @torch.no_grad()
        def step(model: LlamaForCausalLM, held: Any) -> None:
            for _ in range(4):
                model(token, past_key_values=held, use_cache=True)

        for _ in range(3):
            step(ours, cache)
            step(plain, dynamic)
        beside: list[float] = []
        benchmark.pedantic(
            step,
            (ours, cache),
            setup=lambda: beside.append(_seconds(lambda: step(plain, dynamic))),
            rounds=40,
        )
        ratio = _shortest(benchmark) / min(beside)
        assert cache.stats().h2d_bytes > 0
        baseline.check(benchmark, RATIO_TOLERANCE, step_against_inductor=round(ratio, 3))
