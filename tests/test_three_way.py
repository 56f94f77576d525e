"""Decode on GPU, link and CPU together: tokens, proofs, orders of the streams, errors, shares."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bars as judge
from benchmarks import three_way
from harness import (
    MAX_LOGIT_DIFFERENCE,
    VOCAB,
    CompiledModel,
    assert_same,
    clean_dynamo,
    generate,
    one_thread,
    random_ids,
    tiny_llama,
    tiny_mistral,
)
from headinfer_compile import HeadInferCache, profile
from headinfer_compile.errors import HostAttentionError
from headinfer_compile.report import explain
from headinfer_compile.runtime import host_attention, host_build, host_compile, host_lane
from headinfer_compile.runtime.host_attention import HostKernel, shared_kernel
from headinfer_compile.runtime.host_lane import HostLane
from headinfer_compile.runtime.step import KVBlock
from headinfer_compile.runtime.streams import Streams, Uses
from headinfer_compile.simulator import simulated

OFF = {"cpu_attention": "off"}


@pytest.fixture(scope="module")
def model() -> Iterator[CompiledModel]:
    """One model for all tests of this file."""
    with one_thread(), clean_dynamo():
        yield CompiledModel(tiny_llama(0, heads=4, kv_heads=2))


def play(model: CompiledModel, cache: HeadInferCache, calls: Sequence[int]) -> list[Tensor]:
    """Logits of each call: new tokens, or tokens to crop when negative."""
    ids, at, logits = random_ids(1, 512), 0, []
    with torch.no_grad():
        for count in calls:
            if count > 0:
                part = ids[:, at : at + count]
                logits.append(model.model(part, past_key_values=cache, use_cache=True).logits)
            else:
                cache.crop(count)
            at += max(0, count)
    return logits


CALLS = (40, 30, *[1] * 7, 3, -6, 1, 5, *[1] * 5)


@pytest.mark.parametrize(
    ("share", "sizes"),
    [(0.3, {}), (1, {"gpu_budget": 10_000}), (0.5, {"page_tokens": 128})],
    ids=str,
)
def test_tokens_are_those_of_the_resident_model(
    model: CompiledModel, share: float, sizes: dict[str, Any]
) -> None:
    model.use(cpu_attention=share)
    ids, oracle = model.prompt(3, tokens=190, new=14)
    with model.cache(tail_tokens=4, **sizes) as cache:
        assert_same(generate(model.model, ids, cache, 14, prefill_chunk_size=95), oracle)
        stats = model.assert_streamed(cache)
    assert stats.cpu_bytes > 0 and stats.cpu_gb_s
    assert stats.op_calls["attend_host"] == stats.op_calls["wait_host"] == 13 * model.layers


@pytest.mark.parametrize("window", [9, pytest.param(21, marks=pytest.mark.slow)])
def test_a_window_hides_rows_from_the_cpu_too(window: int) -> None:
    with clean_dynamo():
        model = CompiledModel(tiny_mistral(2, window), cpu_attention=0.5)
        ids, oracle = model.prompt(5, tokens=50, new=12)
        with model.cache(page_tokens=4, tail_tokens=4) as cache:
            assert_same(generate(model.model, ids, cache, 12), oracle)
            assert model.assert_streamed(cache).cpu_bytes > 0


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_a_batch_in_half_precision_is_as_near_as_without_the_cpu(dtype: torch.dtype) -> None:
    with clean_dynamo():
        resident = tiny_llama(4).to(dtype)  # type: ignore[arg-type]
        model = CompiledModel(resident)
        ids = random_ids(4, 60, batch=2)
        exact = model.forward(ids, model.resident_cache(), 20).float()
        spread = []
        for share in ("off", 0.6):
            model.use(cpu_attention=share)
            with model.cache() as cache:
                parts = [model.forward(ids[:, :52], cache, 26)]
                parts.append(model.forward(ids[:, 52:], cache, 1))
                spread.append(float((torch.cat(parts, 1).float() - exact).norm()))
                assert (cache.stats().cpu_bytes > 0) is (share != "off")
    assert 0 < spread[1] <= 1.5 * spread[0], spread


def test_the_threads_stay_near_the_device(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = frozenset({max(os.sched_getaffinity(0))})
    monkeypatch.setattr(host_lane, "device_cpus", lambda _: near)
    monkeypatch.setattr(host_lane, "shared_kernel", functools.cache(unwrap(shared_kernel)))
    model.use(cpu_attention=0.5)
    ids, oracle = model.prompt(3, tokens=40, new=6)
    with model.cache() as cache:
        assert_same(generate(model.model, ids, cache, 6), oracle)
        assert model.assert_streamed(cache).cpu_bytes > 0
        lane = cache.session.lane
        assert lane is not None and lane.kernel.cpus == near and lane.kernel.threads == 1
        lane.kernel.close()


def test_a_fixed_share_is_bitwise_repeatable_and_right(model: CompiledModel) -> None:
    runs = []
    for share in ("off", 0.5, 0.5):
        model.use(cpu_attention=share)
        with model.cache(tail_tokens=4) as cache:
            runs.append(play(model, cache, CALLS))
    link, *both = runs
    assert all(map(torch.equal, *both))
    for one, other in zip(link, both[0], strict=True):
        torch.testing.assert_close(one, other, atol=MAX_LOGIT_DIFFERENCE, rtol=0)


def test_beams_whose_rows_share_pages_are_right(model: CompiledModel) -> None:
    model.use(cpu_attention=1)
    ids = random_ids(6, 90)
    how: dict[str, Any] = {
        "max_new_tokens": 10, "min_new_tokens": 10, "num_beams": 3, "do_sample": False,
        "pad_token_id": VOCAB,
    }  # fmt: skip
    wanted = model.resident.generate(ids, **how)  # type: ignore[operator]
    with model.cache() as cache:
        found = model.model.generate(ids, past_key_values=cache, **how)
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_prefill_padding_and_off_leave_the_cpu_alone(model: CompiledModel) -> None:
    ids = random_ids(0, 200, batch=2)
    mask = torch.ones(2, 81, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        for options, one_more in ((OFF, {}), ({"cpu_attention": 1}, {"attention_mask": mask})):
            model.use(**options)
            with model.cache() as cache:
                first = {"attention_mask": mask[:, :80]} if one_more else {}
                model.model(ids[:, :80], past_key_values=cache, use_cache=True, **first)
                model.model(ids[:, 80:81], past_key_values=cache, use_cache=True, **one_more)
                assert cache.stats().cpu_bytes == 0
        model.use(cpu_attention=1)
        with model.cache() as cache:
            for at in (0, 100):
                part = ids[:, at : at + 100]
                model.model(part, past_key_values=cache, use_cache=True)
            assert cache.stats().cpu_bytes == 0


def test_auto_has_no_link_to_relieve_on_a_cpu(model: CompiledModel) -> None:
    model.use(cpu_attention="auto")
    with model.cache() as cache:
        play(model, cache, (40, 1, 1))
        assert cache.stats().cpu_bytes == 0


# -- orders of the streams --------------------------------------------------------------------

ORDERS = (40, 40, *[1] * 10, -5, 12, *[1] * 6)


def simulate(model: CompiledModel, **how: Any) -> tuple[list[Tensor], Any]:
    with model.cache(tail_tokens=4) as cache:
        with simulated(cache, **how) as simulation:
            logits = play(model, cache, ORDERS)
        return logits, simulation


@pytest.mark.parametrize("options", [{"num_slots": 2}, {"head_group": 1}], ids=str)
def test_every_order_gives_bitwise_the_same(model: CompiledModel, options: dict[str, Any]) -> None:
    model.use(cpu_attention=0.5, **options)
    with model.cache(tail_tokens=4) as cache:
        wanted = play(model, cache, ORDERS)
    for seed in range(2):
        found, simulation = simulate(model, seed=seed, synchronize=bool(seed % 2))
        assert all(map(torch.equal, found, wanted)), f"seed {seed}"
        assert simulation.edges["compute waits for host.done"] > 10


@pytest.mark.parametrize(
    "edge",
    ["compute waits for host.done", "cpu waits for host.asked", "cpu waits for pages.written"],
)
def test_a_dropped_edge_is_found(model: CompiledModel, edge: str) -> None:
    model.use(cpu_attention=0.5)
    with model.cache(tail_tokens=4) as cache:
        wanted = play(model, cache, ORDERS)
    for seed in range(60):
        found, simulation = simulate(model, seed=seed, synchronize=bool(seed % 2), drop=edge)
        assert simulation.dropped == simulation.edges[edge] > 0
        if not all(map(torch.equal, found, wanted)):
            return
    raise AssertionError(f"without {edge!r}, 60 orders gave the right logits")


# -- errors -----------------------------------------------------------------------------------


@pytest.fixture
def bad_pages(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it holds something, every job is told of more rows than its first page has."""
    switch: list[bool] = []
    good = HostLane.pages

    def pages(lane: HostLane, layer: int, blocks: tuple[KVBlock, ...]) -> Any:
        found = good(lane, layer, blocks)
        if switch:
            found = (ctypes.c_int64 * len(found))(*found)
            found[2] = found[1] + 1
        return found

    monkeypatch.setattr(HostLane, "pages", pages)
    return switch


def test_a_failed_job_raises_and_leaves_the_cache_as_it_was(
    model: CompiledModel, bad_pages: list[bool]
) -> None:
    model.use(cpu_attention=0.5)
    with model.cache() as cache:
        wanted = play(model, cache, (40, 1, 1, 1))
    ids = random_ids(1, 512)
    with model.cache() as cache, torch.no_grad():
        found = play(model, cache, (40, 1, 1))
        bad_pages.append(True)
        for _ in range(2):
            with pytest.raises(HostAttentionError, match="impossible sizes"):
                model.model(ids[:, 42:43], past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == cache.session.length == 42
        bad_pages.clear()
        found.append(model.model(ids[:, 42:43], past_key_values=cache, use_cache=True).logits)
    assert all(map(torch.equal, found, wanted))


class LateStreams(Streams):
    """Runs jobs at once, or keeps them, as a GPU that lags behind the host does."""

    late = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.kept: list[tuple[HostKernel, int]] = []

    def call(self, kernel: HostKernel, job: int, uses: Uses) -> None:
        self.kept.append((kernel, job))
        if not self.late:
            self.catch_up()

    def catch_up(self) -> None:
        """Run what was kept."""
        for kernel, job in self.kept:
            kernel.run(job)
        self.kept.clear()


def test_a_job_that_fails_late_raises_at_the_next_step_until_its_tokens_are_dropped(
    model: CompiledModel, bad_pages: list[bool]
) -> None:
    model.use(cpu_attention=0.5)
    with model.cache() as cache:
        wanted = play(model, cache, (40, 1, 1, 1, 1))
    ids = random_ids(1, 512)

    def step(cache: HeadInferCache, at: int) -> Tensor:
        logits: Tensor
        logits = model.model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        return logits

    with model.cache() as cache, torch.no_grad():
        cache.session.make_streams = LateStreams
        play(model, cache, (40, 1, 1))
        streams = cache.session.streams
        assert isinstance(streams, LateStreams)
        streams.late = True
        bad_pages.append(True)
        step(cache, 42)
        bad_pages.clear()
        step(cache, 43)
        streams.catch_up()
        for _ in range(2):
            with pytest.raises(HostAttentionError, match=r"from 42 on .* crop\(-2\)"):
                step(cache, 44)
            assert cache.get_seq_length() == 44
        streams.late = False
        cache.crop(-2)
        found = [step(cache, 42), step(cache, 43)]
    assert all(map(torch.equal, found, wanted[-2:]))


def test_without_a_compiler_the_link_takes_everything_and_it_is_said_once(
    model: CompiledModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # Empty caches of this test alone: those of the process hold a kernel.
    monkeypatch.setattr(host_attention, "library", functools.cache(unwrap(host_build.library)))
    monkeypatch.setattr(host_lane, "shared_kernel", functools.cache(unwrap(shared_kernel)))
    model.use(cpu_attention=0.5)
    ids, oracle = model.prompt(3, tokens=40, new=6)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with model.cache() as cache:
                assert_same(generate(model.model, ids, cache, 6), oracle)
                assert model.assert_streamed(cache).cpu_bytes == 0
    (said,) = [r.getMessage() for r in caplog.records if "attended on the CPU" in r.getMessage()]
    assert "no C++ compiler '/no/such/compiler'" in said


# -- reports ----------------------------------------------------------------------------------


def test_explain_and_the_schedule_show_the_third_lane(model: CompiledModel) -> None:
    found = explain(
        model.resident, context=200, options={"cpu_attention": 0.5}, page_tokens=16,
        tail_tokens=8,
    )  # fmt: skip
    text = str(found)
    assert "on the CPU" in text and "attends on the CPU" in text
    assert f"kernel on the CPU: {host_build.library_origin()}" in text
    step = found.graphs[-1].step
    assert step is not None and step.cpu_bytes > 0 and step.h2d_bytes > 0
    assert step.cpu_kernel == host_build.library_origin()
    (schedule, *_) = step.schedules
    assert "= headinfer.attend_host(handle, layer, q, 0," in schedule.text
    assert "# compute, after attend_host" in schedule.text


@pytest.mark.slow
def test_the_benchmark_compares_shares_and_its_figures_are_judged(tmp_path: Path) -> None:
    out = tmp_path / "three_way.json"
    sizes = ["--context", "300", "--chunk", "100", "--page-tokens", "32", "--steps", "2"]
    how = ["--model", "tiny", "--device", "cpu", "--lowering", "eager", "--rounds", "1"]
    made = three_way.main([*how, *sizes, "--settings", "off", "0.5", "--out", str(out)])
    rows = {(row["setting"], row["queries"]): row for row in made}
    assert rows["off", 1]["cpu_bytes"] == 0 and rows["off", 1]["h2d_bytes"] > 0
    for queries in (1, 4):
        row, link = rows["0.5", queries], rows["off", queries]
        assert row["cpu_bytes"] + row["h2d_bytes"] == pytest.approx(link["h2d_bytes"], rel=0.02)
        assert row["logits"]["repeatable"] and row["logits"]["norm_difference"] < 1e-5
    bars = judge.main(["--results", str(tmp_path), "--out", str(tmp_path / "bars.json")])
    found = {bar["id"]: bar for bar in bars}
    assert found["G6b"]["measured"] == 1.0
    assert found["G2a"]["note"].startswith("not run: three_way")


def test_the_library_is_the_one_of_this_source() -> None:
    names = [path.name for path in host_compile.source_files()]
    assert names[0] == "host_attention.cpp" and len(names) == 6


def test_a_profile_shows_when_the_cpu_attends(model: CompiledModel) -> None:
    model.use(cpu_attention=0.5)
    with model.cache() as cache:
        play(model, cache, (80,))
        with profile(cache) as found:
            play(model, cache, (1,))
    spans = [span for step in found.steps for span in step.spans if span.name == "attend_host"]
    assert [span.layer for span in spans] == [0, 1]
    for span in spans:
        assert span.stream == "cpu" and span.end > span.begin
    assert sum(span.nbytes for span in spans) == cache.stats().cpu_bytes
