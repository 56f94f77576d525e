"""``profile`` and the names of the ops: what is timed is what ran, and it changes nothing."""

from __future__ import annotations

import gc
import itertools
import json
import re
import statistics
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import CompiledModel, clean_dynamo, random_ids, tiny_llama
from headinfer_compile import HeadInferCache, headinfer, profile
from headinfer_compile.errors import CacheError, DoesNotFitError
from headinfer_compile.profiling import Profile
from headinfer_compile.runtime.observer import observer_for

LAYERS = 2


@pytest.fixture(scope="module")
def compiled(run_seed: int) -> Iterator[CompiledModel]:
    """One model for all tests of this file."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed, layers=LAYERS), num_slots=3)


def feed(compiled: CompiledModel, cache: HeadInferCache, ids: torch.Tensor, steps: int) -> Any:
    """Two chunks of 40 tokens, then single ones; the logits of the last."""
    logits = None
    with torch.no_grad():
        for part in [*ids[:, :80].split(40, dim=1), *ids[:, 80 : 80 + steps].split(1, dim=1)]:
            logits = compiled.model(part, past_key_values=cache).logits
    return logits


@pytest.fixture(scope="module")
def recorded(compiled: CompiledModel, run_seed: int) -> tuple[Profile, Any, Any]:
    """A profile of five steps, the cache's figures, and the time line."""
    ids = random_ids(run_seed, 100)
    with compiled.cache(tail_tokens=8) as cache:
        with profile(cache) as found:
            feed(compiled, cache, ids, 3)
        stats = compiled.assert_streamed(cache)
    return found, stats, found.to_json()


def test_every_op_is_timed_once(recorded: tuple[Profile, Any, Any]) -> None:
    found, stats, _ = recorded
    assert [(step.past, step.new, step.phase) for step in found.steps] == [
        (0, 40, "decode"), (40, 40, "decode"), *[(80 + i, 1, "decode") for i in range(3)],
    ]  # fmt: skip
    spans = [span for step in found.steps for span in step.spans]
    assert Counter(span.name for span in spans) == stats.op_calls
    assert sum(span.nbytes for span in spans if span.name == "prefetch") == stats.h2d_bytes > 0
    assert sum(span.nbytes for span in spans if span.name == "offload") == stats.d2h_bytes > 0
    for step in found.steps:
        assert [site.layer for site in step.sites] == list(range(LAYERS))
        inner = [at for span in step.spans for at in (span.begin, span.end) if at is not None]
        assert step.begin <= min(inner) <= max(inner) <= step.end
        for site in step.sites:
            assert step.begin < site.begin < site.end < step.end
    assert stats.exposed_wait_us == pytest.approx(found.exposed_wait_us)
    assert stats.link_utilisation == pytest.approx(found.link_utilisation)
    assert 0 < stats.link_utilisation < 1


def test_the_trace_is_one_that_viewers_read(
    recorded: tuple[Profile, Any, Any], tmp_path: Path
) -> None:
    found, stats, trace = recorded
    path = tmp_path / "trace.json"
    found.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == trace
    events = trace["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    drawn = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            drawn[event["pid"], lanes[event["pid"], event["tid"]]].append(event)
    for lane in ("compute", "h2d", "d2h", "host", "slot 0", "slot 1", "slot 2"):
        assert drawn[1, lane], lane
    for lane in ("compute", "h2d", "d2h"):
        assert drawn[2, lane], lane
    copies = [e for e in drawn[1, "h2d"] if e["name"] == "prefetch"]
    assert sum(e["args"]["bytes"] for e in copies) == stats.h2d_bytes
    # The same transfers are predicted, but for those that the last step starts for another.
    predicted = Counter((e["args"]["layer"] % LAYERS, e["args"]["block"]) for e in drawn[2, "h2d"])
    measured = Counter((e["args"]["layer"], e["args"]["block"]) for e in copies)
    assert predicted == measured
    # On one stream nothing overlaps; a slot holds one block at a time.
    for (_, lane), spans in drawn.items():
        if lane != "host":
            spans.sort(key=lambda e: e["ts"])
            for one, other in itertools.pairwise(spans):
                assert one["ts"] + one["dur"] <= other["ts"] + 0.01, (lane, one, other)
    assert {e["name"] for e in events if e["ph"] == "C"} == {"h2d GB/s", "d2h GB/s"}
    flows = Counter((e["ph"], e["id"]) for e in events if e.get("cat") == "event")
    assert len(flows) > 10 and set(flows.values()) == {1}
    assert trace["otherData"]["link_utilisation"] == stats.link_utilisation


def test_a_profile_changes_nothing(compiled: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 100)
    with compiled.cache() as cache, compiled.cache() as other:
        before = feed(compiled, cache, ids, 3)
        with profile(other, max_steps=2) as found:
            assert torch.equal(feed(compiled, other, ids, 3), before)
        assert len(found.steps) == 2
        assert other.session.timer is None and other.session.observer is None
        assert cache.stats().exposed_wait_us is None and cache.stats().link_utilisation is None
        plain, timed = cache.stats().op_calls, other.stats().op_calls
        assert plain == timed
        # Afterwards it is as if there had been none.
        feed_again = [compiled.forward(ids[:, 90:91], c, 1) for c in (cache, other)]
        assert torch.equal(*feed_again)
        assert len(found.steps) == 2
        other.reset()
        assert other.stats().exposed_wait_us is None


def test_a_second_profile_and_an_error(compiled: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 80)
    with compiled.cache(tail_tokens=8, host_budget=48 * compiled.token_bytes) as cache:
        with profile(cache) as found:
            with pytest.raises(CacheError, match="profiled already"), profile(cache):
                pass
            compiled.forward(ids[:, :40], cache, 40)
            with pytest.raises(DoesNotFitError):
                compiled.forward(ids[:, 40:], cache, 40)
            compiled.forward(ids[:, 40:41], cache, 1)
        assert [step.past for step in found.steps] == [0, 40]
        with profile(cache) as after:
            compiled.forward(ids[:, 41:42], cache, 1)
        assert [step.past for step in after.steps] == [41]


def test_a_profile_does_not_keep_the_cache(compiled: CompiledModel, seed: int) -> None:
    cache = compiled.cache()
    with profile(cache):
        compiled.forward(random_ids(seed, 40), cache, 40)
    session = weakref.ref(cache.session)
    cache.close()
    del cache
    gc.collect()
    assert session() is None


def test_ops_carry_their_names_in_a_profiler(compiled: CompiledModel, seed: int) -> None:
    with compiled.cache() as cache:
        ids = random_ids(seed, 81)
        compiled.forward(ids[:, :80], cache, 40)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            compiled.forward(ids[:, 80:], cache, 1)
        calls = sum(cache.stats().op_calls.values())
        compiled.forward(ids[:, :1], cache, 1)
        assert cache.session.observer is None
        assert sum(cache.stats().op_calls.values()) > calls
    names = [event.key for event in seen.key_averages() if event.key.startswith("headinfer.")]
    for layer in range(LAYERS):
        for block in range(3):
            assert f"headinfer.attend_merge layer={layer} group=0 chunk=0 block={block}" in names
        for op in ("prefetch", "wait"):
            assert [
                n for n in names if n.startswith(f"headinfer.{op} layer={layer} group=0 block=")
            ]


def test_transfers_keep_their_names_over_calls(compiled: CompiledModel, seed: int) -> None:
    """A profiled step waits for what the one before has started, and says for which block."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with compiled.cache() as cache, profile(cache):
        compiled.forward(random_ids(seed, 82), cache, 40)
        with torch.profiler.profile(activities=activities):
            compiled.forward(random_ids(seed, 1), cache, 1)
        assert cache.session.in_flight
        with torch.profiler.profile(activities=activities) as seen:
            compiled.forward(random_ids(seed, 1), cache, 1)
    waits = [e.key for e in seen.key_averages() if e.key.startswith("headinfer.wait layer=")]
    assert waits and all("block=" in name for name in waits)


def test_nvtx_ranges_are_nested_and_named(
    compiled: CompiledModel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `nvtx=True` pushes on a GPU; here the calls are only noted."""
    depth, seen = [0], []

    def push(name: str) -> None:
        seen.append((depth[0], name))
        depth[0] += 1

    def pop() -> None:
        depth[0] -= 1

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", pop)
    monkeypatch.setattr(
        "headinfer_compile.executor.observer_for", lambda timer, _: observer_for(timer, nvtx=True)
    )
    with compiled.cache() as cache:
        ids = random_ids(seed, 81)
        compiled.forward(ids[:, :80], cache, 40)
        seen.clear()
        compiled.forward(ids[:, 80:], cache, 1)
    assert depth == [0]
    assert [name for level, name in seen if level == 0] == [
        f"headinfer site layer={layer}" for layer in range(LAYERS)
    ]
    ops = [name for level, name in seen if level == 1]
    assert ops and all(re.match(r"headinfer\.\w+ layer=\d+", name) for name in ops)
    assert any("headinfer.prefetch" in name and "slot=" in name for name in ops)


def test_an_op_costs_little_more_when_it_is_timed(compiled: CompiledModel, seed: int) -> None:
    """On a machine of any speed: what the timer does for an op, not what a step takes."""
    ids = random_ids(seed, 300)
    with compiled.cache(tail_tokens=256) as cache:
        compiled.forward(ids[:, :80], cache, 40)
        costs: dict[bool, list[float]] = {False: [], True: []}
        for index in range(60):
            timed = bool(index % 2)
            with profile(cache) if timed else torch.no_grad():
                before, start = sum(cache.stats().op_calls.values()), time.process_time()
                compiled.forward(ids[:, 80 + index : 81 + index], cache, 1)
                seconds = time.process_time() - start
                calls = sum(cache.stats().op_calls.values()) - before
            costs[timed].append(seconds / calls)
    off, on = (statistics.median(costs[key]) for key in (False, True))
    assert on - off < 60e-6, f"{off * 1e6:.1f} us and {on * 1e6:.1f} us an op"


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_profile_costs_under_two_percent_of_a_streamed_step(seed: int) -> None:
    """Steps with and without, in turn: 8 layers, 32 MiB transfers, everything streamed."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, dtype=torch.bfloat16,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(device="cuda", dtype=torch.bfloat16).eval()
    model.compile(backend=headinfer, options={"lowering": "eager"})
    ids = random_ids(seed, 65536).cuda() % 128
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad(), HeadInferCache(config, gpu_budget=0) as cache:
        for part in ids.split(16384, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        for index in range(44):
            timed = bool(index % 2)
            torch.cuda.synchronize()
            with profile(cache) if timed else nullcontext() as found:
                start = time.perf_counter()
                model(ids[:, :1], past_key_values=cache)
                torch.cuda.synchronize()
                if index > 3:
                    seconds[timed].append(time.perf_counter() - start)
        stats = cache.stats()
        assert stats.materialised_layers == stats.eager_updates == 0
    assert isinstance(found, Profile)
    (step,) = found.steps
    copies = [span for span in step.spans if span.name == "prefetch"]
    assert len(copies) == 8 * 8
    rates = [
        span.nbytes / (span.end - span.begin) * 1e6 for span in copies if span.nbytes > 1 << 24
    ]
    assert 5e9 < statistics.median(rates) < 500e9
    assert found.link_utilisation is not None and 0.5 < found.link_utilisation <= 1.01
    # A copy begins only after the slot was freed, and is read only after it has ended.
    by_transfer = {span.transfer: span for span in copies}
    for span in step.spans:
        if span.name == "wait" and span.transfer in by_transfer:
            assert by_transfer[span.transfer].end <= span.end + 5
    off, on = (statistics.median(seconds[key]) for key in (False, True))
    assert on < 1.02 * off, f"{off * 1e3:.2f} ms without and {on * 1e3:.2f} ms with"
