"""Layers with a window keep what it sees: bounded memory, equal tokens, no race, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness import (
    VOCAB,
    CompiledModel,
    assert_same,
    clean_dynamo,
    generate,
    one_thread,
    random_ids,
    register_unknown_attention,
    tiny_mistral,
)
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError, DoesNotFitError
from headinfer_compile.runtime import block_plan, retention
from headinfer_compile.runtime.block_plan import BlockPlan, first_kept
from headinfer_compile.runtime.pages import BlockTable
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.slab import HostSlab, SlabAllocator
from headinfer_compile.runtime.token_block import TokenBlock
from headinfer_compile.simulator import simulated
from test_simulator import play

WINDOW, KEPT, PAGE = 20, 12, 16


def tiny_mixed(seed: int) -> Any:
    """Windows in two layers of three."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=3, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        use_sliding_window=True, max_position_embeddings=4096, initializer_range=0.25,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.head_dim = 8
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "KEPT_TOKENS", KEPT)
    monkeypatch.setattr(retention, "KEPT_TOKENS", KEPT)


@pytest.fixture(scope="module")
def mixed() -> Iterator[CompiledModel]:
    """One model with windows in two layers of three, compiled once."""
    with one_thread(), clean_dynamo():
        yield CompiledModel(tiny_mixed(0))


def kept_tokens(cache: HeadInferCache, layer: int) -> int:
    """Tokens of the host pages that a layer has."""
    blocks = cache.session.table.blocks
    return sum(block.tokens for block in blocks if layer in block.pages)


def most(chunk: int) -> int:
    """Tokens of the pages that a layer with a window has at most: those seen, kept and new, each
    end within a page."""
    return WINDOW + KEPT + chunk + 2 * PAGE


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_mixed, {}),
        (lambda seed: tiny_mistral(seed, WINDOW), {"cpu_attention": 0.5, "num_slots": 2}),
        pytest.param(tiny_mixed, {"cpu_attention": 0.5}, marks=pytest.mark.slow),
        pytest.param(lambda seed: tiny_mistral(seed, WINDOW), {}, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_bounded_pages(make: Any, options: dict[str, Any], seed: int) -> None:
    m = CompiledModel(make(seed), **options)
    ids, oracle = m.prompt(seed, 203, 70)
    sizes = []
    for tokens in (131, 203):
        cache = m.cache()
        run = generate(m.model, ids[:, :tokens], cache, 70, prefill_chunk_size=32)
        if tokens == 203:
            assert_same(run, oracle)
        m.assert_streamed(cache)
        windows = cache.session.table.windows
        assert windows and all(kept_tokens(cache, layer) <= most(8) for layer in windows)
        full = set(range(m.layers)) - set(windows)
        assert all(kept_tokens(cache, layer) >= cache.length - 8 for layer in full)
        sizes.append(cache.stats())
    per_layer = m.token_bytes // m.layers
    grown = sizes[1].host_bytes - sizes[0].host_bytes
    assert grown <= (len(full) * (203 - 131) + (len(windows) + len(full)) * PAGE) * per_layer
    assert sizes[1].host_bytes <= sizes[1].kv_bytes + m.layers * 2 * PAGE * per_layer


def test_a_window_that_fits_on_the_device_stays_there(seed: int) -> None:
    """All layers have a window: no host memory, and no more of the device's than it takes."""
    m = CompiledModel(tiny_mistral(seed, WINDOW))
    ids, oracle = m.prompt(seed, 300, 120)
    budget = most(32) * m.token_bytes
    with m.cache(gpu_budget=budget, page_tokens=PAGE) as cache:
        run = generate(m.model, ids, cache, 120, prefill_chunk_size=32)
        assert_same(run, oracle)
        stats = cache.stats()
        assert stats.sites_rewritten == m.layers and not stats.eager_updates
        assert (stats.host_bytes, stats.h2d_bytes, stats.materialised_layers) == (0, 0, 0)
        assert stats.resident_bytes <= budget < 300 * m.token_bytes


def test_resident_pages_are_given_up(mixed: CompiledModel, seed: int) -> None:
    """The room that windows leave on the device is taken by later tokens, within the budget."""
    budget = 10 * PAGE * mixed.token_bytes
    ids, oracle = mixed.prompt(seed, 400, 70)
    seen: list[set[HostSlab]] = []
    with mixed.cache(gpu_budget=budget, page_tokens=PAGE) as cache:
        for _ in range(2):
            run = generate(mixed.model, ids, cache, 70, prefill_chunk_size=32)
            assert_same(run, oracle)
            session, stats = cache.session, cache.stats()
            resident = sum(block.tier == "gpu" for block in session.table.blocks)
            # Ten blocks of all layers; of the two layers with a window the newest few are kept.
            assert 2 * 10 + 4 > resident > 10 + 4
            assert stats.resident_bytes == session.table.bytes_on("gpu") <= budget
            assert stats.h2d_bytes > 0 and not stats.materialised_layers
            assert all(kept_tokens(cache, layer) <= most(32) for layer in (0, 2))
            with pytest.raises(CacheError, match="keep what it sees"):
                cache.crop(-300)
            assert cache.get_seq_length() == session.length
            seen.append({s for block in session.table.blocks for s in block.slabs.values()})
            cache.reset()
            assert session.length == 0
        # Host memory that the prompt needs served both conversations.
        assert seen[0] & seen[1]
        # In one piece nothing is given up before: the blocks are placed anew, within the budget.
        with torch.no_grad():
            mixed.forward(ids, cache, 400)
        assert cache.stats().resident_bytes <= budget


def test_prefill_keeps_no_more_than_a_chunk(mixed: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 300)
    with mixed.cache() as cache, torch.no_grad():
        for part in ids.split(30, dim=1):
            mixed.model(part, past_key_values=cache)
            assert kept_tokens(cache, 0) <= most(30)
        want = mixed.forward(ids, mixed.resident_cache(), 300)[:, -30:]
        again = mixed.model(ids[:, -1:], past_key_values=cache).logits
        assert again.shape[1] == 1
    with mixed.cache() as cache:
        found = mixed.forward(ids, cache, 30)[:, -30:]
    assert float((found - want).abs().max()) <= 1e-4


def test_crop(mixed: CompiledModel, seed: int) -> None:
    """Back by what is kept and on with other tokens; further back is refused, and to 0 is not."""
    ids, other = random_ids(seed, 160), random_ids(seed + 1, 60)
    with mixed.cache() as cache:
        mixed.forward(ids, cache, 32)
        held = cache.length
        cache.crop(-KEPT)
        with pytest.raises(CacheError, match="Nothing was dropped") as refused:
            cache.crop(-100)
        assert cache.length == cache.session.length == held - KEPT
        shortest = int(str(refused.value).split("can go back to ")[1].split()[0])
        # Pages were given up last when the last chunk began.
        assert shortest <= 128 - KEPT
        cache.crop(shortest - cache.length)
        joined = torch.cat([ids[:, :shortest], other], dim=1)
        want = mixed.forward(joined, mixed.resident_cache(), joined.shape[1])[:, shortest:]
        found = mixed.forward(other, cache, 25)
        assert float((found - want).abs().max()) <= 1e-4
        cache.reset()
        found = mixed.forward(joined, cache, 32)
        want = mixed.forward(joined, mixed.resident_cache(), joined.shape[1])
        assert float((found - want).abs().max()) <= 1e-4
        cache.crop(-cache.length)
        found = mixed.forward(joined, cache, 17)
        assert float((found - want).abs().max()) <= 1e-4
        assert cache.stats().eager_updates == 0


def test_what_needs_older_tokens_is_refused(mixed: CompiledModel, seed: int) -> None:
    """A mask without the window, and a call of the uncompiled model; the cache goes on after."""
    ids = random_ids(seed, 130)
    with mixed.cache() as cache, torch.no_grad():
        mixed.forward(ids[:, :120], cache, 40)
        everything = torch.ones(1, 1, 5, 125, dtype=torch.bool)
        with pytest.raises(CacheError, match="keeps the newest tokens alone"):
            mixed.model(ids[:, 120:125], attention_mask=everything, past_key_values=cache)
        with pytest.raises(CacheError, match="keeps the newest tokens alone"):
            mixed.resident(ids[:, 120:125], past_key_values=cache)
        assert cache.length == cache.session.length == 120
        found = mixed.forward(ids[:, 120:], cache, 5)
    want = mixed.forward(ids, mixed.resident_cache(), 130)[:, 120:]
    assert float((found - want).abs().max()) <= 1e-4


def test_a_materialised_layer_keeps_everything(seed: int) -> None:
    """A layer that falls back reads all of its K and V, so nothing of it is given up."""
    m = CompiledModel(tiny_mixed(seed), attention=register_unknown_attention())
    ids, oracle = m.prompt(seed, 120, 12)
    with m.cache() as cache:
        assert_same(generate(m.model, ids, cache, 12, prefill_chunk_size=40), oracle)
        assert cache.stats().materialised_layers == 3
        assert kept_tokens(cache, 0) >= cache.length - 8


CALLS = (40, 30, 30, *[1] * 22, 30, -9, *[1] * 12, 0, 50, 50, *[1] * 20)


@pytest.mark.parametrize(
    "options",
    [{"cpu_attention": 0.5}, pytest.param({"num_slots": 2}, marks=pytest.mark.slow)],
)
def test_any_order_of_the_streams(mixed: CompiledModel, options: dict[str, Any], seed: int) -> None:
    mixed.use(**options)
    sizes: dict[str, Any] = {"tail_tokens": 4, "page_tokens": 8}
    with mixed.cache(**sizes) as cache:
        want = play(mixed, cache, CALLS, seed)
        assert retention.given_up_tokens(cache.session.table, cache.length)
    for order in range(2):
        with mixed.cache(**sizes) as cache:
            with simulated(cache, seed=seed + order, synchronize=bool(order % 2)) as simulation:
                found = play(mixed, cache, CALLS, seed)
            simulation.log.check()
        assert all(map(torch.equal, found, want))
    mixed.use()


@pytest.mark.parametrize("waits", [True, False])
def test_no_copy_is_under_way_when_pages_are_given_up(
    mixed: CompiledModel, monkeypatch: pytest.MonkeyPatch, waits: bool, seed: int
) -> None:
    """Their memory may be unmapped. Without the waits some of the work is under way."""
    mixed.use(num_slots=2)

    def give_up_at_once(session: Session, *where: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "drain", lambda: None)
            patch.setattr(session.streams, "drain", lambda: None)
            retention.give_up_pages(session, *where)

    if not waits:
        monkeypatch.setattr("headinfer_compile.runtime.session.give_up_pages", give_up_at_once)
    pending = []
    with (
        mixed.cache(tail_tokens=4, page_tokens=8) as cache,
        simulated(cache, seed=seed) as simulation,
    ):
        give_up = BlockTable.give_up

        def observed(table: BlockTable, block: TokenBlock, window: int | None) -> None:
            pending.append(sum(map(len, simulation._queues.values())))
            give_up(table, block, window)

        monkeypatch.setattr(BlockTable, "give_up", observed)
        play(mixed, cache, CALLS, seed)
    mixed.use()
    assert len(pending) > 10
    assert (max(pending) == 0) == waits


@pytest.mark.parametrize("place", ["before", "within", "after"])
def test_an_interrupt_while_pages_are_given_up(mixed: CompiledModel, place: str, seed: int) -> None:
    """The next call finishes what was begun."""
    ids = random_ids(seed, 160)
    want = mixed.forward(ids, mixed.resident_cache(), 160)[:, 128:]

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    def stop_after(table: BlockTable, block: TokenBlock, window: int | None) -> None:
        give_up(table, block, window)
        raise KeyboardInterrupt

    give_up = BlockTable.give_up
    with mixed.cache() as cache:
        mixed.forward(ids[:, :128], cache, 32)
        with pytest.MonkeyPatch.context() as patch:
            if place == "within":
                patch.setattr(SlabAllocator, "give_back", stopped)
            else:
                patch.setattr(BlockTable, "give_up", stopped if place == "before" else stop_after)
            with pytest.raises(KeyboardInterrupt):
                mixed.forward(ids[:, 128:], cache, 32)
        assert cache.length == cache.session.length == 128
        found = mixed.forward(ids[:, 128:], cache, 32)
        assert float((found - want).abs().max()) <= 1e-4
        assert kept_tokens(cache, 0) <= most(32)
        mixed.assert_streamed(cache)


def test_beams_after_pages_were_given_up(mixed: CompiledModel, seed: int) -> None:
    ids, _ = mixed.prompt(seed, 120, 1)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 30, "do_sample": False}
    resident: Any = mixed.resident
    want = resident.generate(
        ids, past_key_values=mixed.resident_cache(), pad_token_id=VOCAB, **options
    )
    with mixed.cache() as cache:
        found = mixed.model.generate(
            ids, past_key_values=cache, prefill_chunk_size=40, pad_token_id=VOCAB, **options
        )
        assert retention.given_up_tokens(cache.session.table, cache.session.length)
    assert torch.equal(found, want)


def test_reserve_counts_what_is_kept(mixed: CompiledModel, seed: int) -> None:
    """A budget that the windows make enough for, before and after the first chunk."""
    per_layer = mixed.token_bytes // 3
    budget = (400 + 2 * most(32) + 3 * PAGE) * per_layer
    assert 400 * mixed.token_bytes > budget
    with mixed.cache(host_budget=budget) as cache:
        cache.reserve(390)
        generate(mixed.model, random_ids(seed, 360), cache, 30, prefill_chunk_size=32)
        assert cache.stats().host_bytes <= budget
        with pytest.raises(DoesNotFitError, match="a context of at most"):
            cache.reserve(2000)
    refused = pytest.raises(DoesNotFitError, match="a context of at most")
    ids = random_ids(seed, 390)
    with mixed.cache(host_budget=budget) as cache, torch.no_grad():
        found = []
        for _ in range(2):
            found.append(mixed.forward(ids, cache, 32))
            assert cache.stats().host_bytes <= budget
            cache.reset()
        assert torch.equal(*found)
        with refused:
            mixed.model(ids, past_key_values=cache)
        assert cache.stats().host_bytes <= budget
        assert torch.equal(mixed.forward(ids, cache, 32), found[0])
    with mixed.cache(host_budget=budget) as cache, refused:
        cache.reserve(2000)


def _check_resident(plan: BlockPlan, tokens: int, chunk: int) -> None:
    """Without a host: at each chunk, resident blocks less what the windows give up before it."""
    plan.gpu_budget = 1 << 40
    plan.place(tokens, chunk)
    assert not plan.on_host and plan.gpu_tokens == plan.capacity >= tokens
    layers, most_bytes = plan.num_layers, 0
    for past in range(0, tokens, chunk):
        made = [run for run in plan.gpu_runs if run[0] < min(past + chunk, tokens)]
        end = first_kept(past, plan.windows[0])
        kept = sum(size for start, size in made if start + size > end)
        held = sum(size for _, size in made)
        most_bytes = max(most_bytes, 100 * ((layers - 2) * held + 2 * kept))
    assert plan.gpu_peak_bytes == most_bytes


@settings(deadline=None, max_examples=60)
@given(
    chunk=st.integers(1, 70), tokens=st.integers(1, 400), window=st.integers(1, 60),
    page=st.sampled_from([8, 16, 64]), full=st.integers(0, 3),
)  # fmt: skip
def test_the_plan_predicts_the_bytes(
    chunk: int, tokens: int, window: int, page: int, full: int
) -> None:
    """Against the definition: host blocks that end before what is kept at the last chunk."""
    plan = BlockPlan(100, full + 2, page, 0, windows=(window, window), chunk=chunk)
    plan.place(tokens, chunk)
    blocks = [(start, start + page) for start in range(0, plan.capacity, page)]
    end = first_kept(max(0, tokens - chunk), window)
    kept = sum(page for _, stop in blocks if stop > end)
    assert plan.host_bytes == len(blocks) * page * 100 * (full + 2)
    want = 100 * (full * len(blocks) * page + 2 * kept)
    assert plan.host_bytes - plan.given_up_bytes(tokens) == want
    _check_resident(BlockPlan(100, full + 2, page, 0, windows=(window, window)), tokens, chunk)
    longest = BlockPlan(100, full + 2, page, 0, windows=(window, window), chunk=chunk)
    if full:
        assert longest.longest(want) >= tokens
        held = longest.longest(want)
        probe = BlockPlan(100, full + 2, page, 0, windows=(window, window), chunk=chunk)
        probe.place(held, chunk)
        assert probe.host_bytes - probe.given_up_bytes(held) <= want
