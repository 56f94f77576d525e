"""The CPU lane on a GPU: real streams, host functions of the driver, no synchronisation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import clean_dynamo
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.errors import HostAttentionError
from headinfer_compile.runtime.host_lane import HostLane
from headinfer_compile.runtime.step import KVBlock
from test_gpu import decode, model_on_gpu, prompt

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles its own model."""
    with clean_dynamo():
        yield


def compiled(seed: int, share: float | str, dtype: torch.dtype = torch.float32) -> Any:
    model = model_on_gpu(seed, dtype)
    model.compile(backend=headinfer, options={"lowering": "eager", "cpu_attention": share})
    return model


def cache_of(model: Any, **sizes: Any) -> HeadInferCache:
    sizes = {"gpu_budget": 0, "page_tokens": 64, "tail_tokens": 16, **sizes}
    return HeadInferCache(model.config, **sizes)


@pytest.mark.parametrize("budget", [0, "400KiB"])
@pytest.mark.parametrize("share", [0.4, 1, "auto"])
def test_tokens_equal_the_resident_run(share: float | str, budget: int | str) -> None:
    seed = torch.seed() % 2**31
    model, ids = model_on_gpu(seed), prompt(seed, 700)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)
    model.compile(backend=headinfer, options={"lowering": "eager", "cpu_attention": share})
    with cache_of(model, gpu_budget=budget) as cache:
        found = model.generate(
            ids, past_key_values=cache, max_new_tokens=60, do_sample=False, prefill_chunk_size=200
        )
        stats = cache.stats()
    assert torch.equal(found, expected), f"seed {seed}"
    assert (stats.sites_rewritten, stats.eager_updates, stats.materialised_layers) == (3, 0, 0)
    assert stats.cpu_bytes > 0 and stats.h2d_bytes > 0


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_a_step_does_not_wait_on_the_host(share: float | str) -> None:
    model, ids = compiled(1, share), prompt(1, 600)
    with cache_of(model) as cache:
        decode(model, cache, ids)
        for _ in range(6):
            decode(model, cache, ids[:, :1])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                decode(model, cache, ids[:, :1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert cache.stats().cpu_bytes > 0 or share == "auto"


def run(model: Any, ids: Tensor, delayed: str | None) -> Tensor:
    """Logits of some steps, with a stream held up at the start of each."""
    logits = []
    with cache_of(model) as cache:
        logits.append(decode(model, cache, ids[:, :500])[:, -1:])
        for at in range(500, 524):
            if delayed is not None:
                with cache.session.streams.on(delayed):
                    torch.cuda._sleep(3_000_000)
            logits.append(decode(model, cache, ids[:, at : at + 1]))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("delayed", ["cpu", "d2h", "h2d"])
def test_a_slow_stream_changes_no_bit(delayed: str) -> None:
    model, ids = compiled(2, 0.5), prompt(2, 600)
    wanted = run(model, ids, None)
    assert torch.equal(run(model, ids, delayed), wanted)


def test_bfloat16_is_as_near_as_without_the_cpu() -> None:
    ids = prompt(3, 600)
    exact = run(compiled(3, "off"), ids, None)
    spread = [
        float((run(compiled(3, share, torch.bfloat16), ids, None) - exact).norm() / exact.norm())
        for share in ("off", 0.5)
    ]
    assert spread[1] <= 1.5 * spread[0] + 1e-3


def go_on(model: Any, cache: HeadInferCache, ids: Tensor) -> None:
    """Decode to the end of ``ids``, each step only after the one before is done."""
    for at in range(cache.get_seq_length(), ids.shape[1]):
        decode(model, cache, ids[:, at : at + 1])
        torch.cuda.synchronize()


def test_a_job_that_fails_is_an_error_at_a_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = compiled(4, 0.5), prompt(4, 600)
    wanted = run(model, ids, None)[:, 1:4]
    good, bad = HostLane.pages, [False]

    def pages(lane: HostLane, layer: int, blocks: tuple[KVBlock, ...]) -> Any:
        found = good(lane, layer, blocks)
        if bad[0]:
            found = (ctypes.c_int64 * len(found))(*found)
            found[2] = found[1] + 1
        return found

    monkeypatch.setattr(HostLane, "pages", pages)
    with cache_of(model) as cache:
        decode(model, cache, ids[:, :500])
        decode(model, cache, ids[:, 500:501])
        bad[0] = True
        with pytest.raises(HostAttentionError, match="impossible sizes"):
            go_on(model, cache, ids)
        bad[0] = False
        cache.crop(501 - cache.get_seq_length())
        found = [decode(model, cache, ids[:, at : at + 1]) for at in (501, 502)]
    torch.testing.assert_close(torch.cat(found, 1), wanted[:, 1:], atol=1e-4, rtol=1e-4)


def test_closing_waits_for_the_jobs_in_flight() -> None:
    model, ids = compiled(5, 1), prompt(5, 600)
    for _ in range(3):
        with cache_of(model) as cache:
            decode(model, cache, ids)
            with cache.session.streams.on("cpu"):
                torch.cuda._sleep(20_000_000)
            decode(model, cache, ids[:, :1])
    torch.cuda.synchronize()
