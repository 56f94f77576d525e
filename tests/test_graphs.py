"""How often Dynamo compiles: at most once per kind of step, and never because a length changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import (
    CHUNKED_TURNS,
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    assert_same,
    clean_dynamo,
    dynamo_graphs,
    generate,
    random_ids,
    tiny_llama,
    tiny_mistral,
)
from headinfer_compile import HeadInferCache
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.errors import CacheError

pytestmark = pytest.mark.oldest

NEW = 4


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    with clean_dynamo():
        yield


def check(m: CompiledModel, seed: int, tokens: int, chunk: int | None, **options: Any) -> Tensor:
    """Generate after a new prompt with a new cache, compare with the oracle; returns all tokens."""
    batch = options.pop("batch", 1)
    inputs = {name: value for name, value in options.items() if name == "attention_mask"}
    ids, oracle = m.prompt(seed, tokens, NEW, batch, **inputs)
    cache = m.cache()
    if chunk is not None:
        options["prefill_chunk_size"] = chunk
    run = generate(m.model, ids, cache, NEW, **options)
    assert_same(run, oracle)
    m.assert_streamed(cache)
    windows = {site.mask.window for graph in m.graphs for site in graph.report.sites if site.mask}
    if windows == {None} and (
        "attention_mask" not in inputs or bool(inputs["attention_mask"].all())
    ):
        assert_causal(cache)
    return run.tokens


def assert_causal(cache: HeadInferCache) -> None:
    """Assert that nothing was masked beyond what causal kernels and block limits do."""
    many = [request for request in cache.session.kernels if request.query == "many"]
    assert any(request.causal for request in many)
    assert not any(request.masked for request in many)


def assert_regions(m: CompiledModel) -> None:
    """Every graph of a model of equal layers has three regions of its own: ends and middle."""
    assert m.graphs
    for graph in m.graphs:
        regions = graph.report.regions
        assert (regions.num_regions, regions.num_unique) == (m.layers + 1, 3)
        assert not graph.report.declines


def test_chunked_generate_compiles_once(seed: int) -> None:
    m = CompiledModel(tiny_llama(seed))
    check(m, seed, 65, 30)
    assert dynamo_graphs() <= 3
    check(m, seed + 1, 61, 30)
    assert dynamo_graphs() <= 4, "a last chunk of one token takes one graph more"
    check(m, seed + 2, 65, None)
    compiled = dynamo_graphs()
    assert compiled <= 5, "a prompt in one piece takes one graph more"

    for number, tokens in enumerate((31, 45, 60, 91, 33, 80, 121, 170)):
        check(m, seed + number, tokens, 30)
        assert dynamo_graphs() == compiled, f"a prompt of {tokens} tokens compiled again"
    for chunk in (40, 16, None):
        alone = check(m, seed, 65, chunk)
        assert dynamo_graphs() == compiled, f"chunks of {chunk} tokens compiled again"
        mask = {"attention_mask": torch.ones(1, 65, dtype=torch.int64)}
        assert torch.equal(check(m, seed, 65, chunk, **mask), alone)
        assert dynamo_graphs() == compiled, "a mask of ones compiled again"
    assert len(m.graphs) == compiled
    assert_regions(m)


def test_turns_and_growth_compile_nothing(seed: int) -> None:
    """Later turns, and a context that grows over many pages and plans, on another cache."""
    m = CompiledModel(tiny_llama(seed))
    check(m, seed, 61, 30)
    ids, oracle = m.prompt(seed, 65, NEW)
    cache = m.cache()
    assert_same(generate(m.model, ids, cache, NEW), oracle)
    ids, oracle = m.prompt(seed, 20, NEW, after=oracle.tokens)
    assert_same(generate(m.model, ids, cache, NEW), oracle)
    # First and later chunk, a chunk of one token, decode; a prompt or a turn in one piece.
    compiled = dynamo_graphs()
    assert compiled <= 5

    cache = m.cache(gpu_budget=48 * m.token_bytes)
    ids, oracle = m.prompt(seed, 70, NEW)
    assert_same(generate(m.model, ids, cache, NEW, prefill_chunk_size=20), oracle)
    chunk = {"prefill_chunk_size": 25} if CHUNKED_TURNS else {}
    for turn, options in enumerate((chunk, {}, chunk)):
        ids, oracle = m.prompt(seed + turn, 40 + turn, NEW, after=oracle.tokens)
        assert_same(generate(m.model, ids, cache, NEW, **options), oracle)
        assert dynamo_graphs() == compiled, f"turn {turn} compiled again"
    ids, oracle = m.prompt(seed, 30, 40, after=oracle.tokens)
    assert_same(generate(m.model, ids, cache, 40), oracle)
    stats = m.assert_streamed(cache)
    assert stats.blocks_by_tier["gpu"] == 3
    assert stats.blocks_by_tier["host"] > 10
    assert sum(len(graph.schedules) for graph in m.graphs) > 10
    assert dynamo_graphs() == compiled


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_direct_calls_of_any_length(seed: int, older: bool) -> None:
    """The cache by the name of its argument, and by the name it had before transformers 5.24."""
    m = CompiledModel(tiny_llama(seed, layers=1))
    name = "past_key_values" if older else cache_argument(m.resident)
    ids = random_ids(seed, 90)
    want = m.forward(ids, m.resident_cache(), 90)
    for graphs, lengths in ((1, (30,)), (2, (45, 20)), (3, (52, 17, 1, 1, 9, 1)), (3, (9, 81))):
        cache, start = m.cache(), 0
        for new in lengths:
            with torch.no_grad():
                got = m.model(ids[:, start : start + new], **{name: cache}).logits
            difference = float((got - want[:, start : start + new]).abs().max())
            assert difference <= MAX_LOGIT_DIFFERENCE
            start += new
        # The first chunk, the later ones, decode; the oldest transformers needs fewer.
        assert dynamo_graphs() <= graphs, f"calls of {lengths} tokens"
    m.assert_streamed(cache)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mask_of_ones_runs_the_causal_kernels(seed: int, batch: int) -> None:
    """Direct calls with a mask: its form holds padding, and the fact is that there is none."""
    m = CompiledModel(tiny_llama(seed))
    ids = random_ids(seed, 62, batch)
    cache, resident = m.cache(), m.resident_cache()
    for start, stop in ((0, 30), (30, 60), (60, 61), (61, 62)):
        mask = torch.ones(batch, stop, dtype=torch.int64)
        part = ids[:, start:stop]
        got = m.forward(part, cache, 70, attention_mask=mask)
        want = m.forward(part, resident, 70, attention_mask=mask)
        assert float((got - want).abs().max()) <= MAX_LOGIT_DIFFERENCE
    m.assert_streamed(cache)
    assert_causal(cache)
    assert {site.mask.padding for g in m.graphs for site in g.report.sites if site.mask} <= {
        0,
        None,
    }
    assert dynamo_graphs() <= 4


def test_batch(seed: int) -> None:
    """One set of graphs serves every batch size from 2 on."""
    m = CompiledModel(tiny_llama(seed))
    check(m, seed, 65, 30, batch=2)
    assert dynamo_graphs() <= 3
    check(m, seed, 61, 30, batch=2)
    check(m, seed, 65, None, batch=2)
    compiled = dynamo_graphs()
    assert compiled <= 5
    for batch, tokens, chunk in ((2, 90, 40), (3, 65, 30), (5, 61, 30), (4, 37, None)):
        check(m, seed, tokens, chunk, batch=batch)
        assert dynamo_graphs() == compiled
    assert_regions(m)


def test_padding(seed: int) -> None:
    m = CompiledModel(tiny_llama(seed))

    def padded(tokens: int, chunk: int | None, *padding: int) -> None:
        mask = torch.ones(len(padding), tokens, dtype=torch.int64)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        check(m, seed, tokens, chunk, batch=len(padding), attention_mask=mask)

    padded(65, 30, 40, 3)
    assert dynamo_graphs() <= 3
    padded(61, 30, 0, 31)
    padded(65, None, 17, 0)
    compiled = dynamo_graphs()
    assert compiled <= 5
    padded(90, 40, 3, 85, 0)
    assert dynamo_graphs() == compiled
    assert_regions(m)
    forms = {site.mask.padding for graph in m.graphs for site in graph.report.sites if site.mask}
    assert forms == {0}


def test_windows(seed: int) -> None:
    """Below its window a model emits no band, so prompts on both sides of it have graphs each."""
    window = 20
    m = CompiledModel(tiny_mistral(seed, window))
    check(m, seed, 65, 30)
    assert dynamo_graphs() <= 3
    check(m, seed, 61, 30)
    check(m, seed, 65, None)
    check(m, seed, 13, 6)
    check(m, seed, 13, None)
    check(m, seed, 23, 6)
    compiled = dynamo_graphs()
    assert compiled <= 9
    for tokens, chunk in ((90, 40), (170, 30), (15, 7), (50, 10), (40, None), (11, None)):
        check(m, seed, tokens, chunk)
        assert dynamo_graphs() == compiled, f"{tokens} tokens in chunks of {chunk}"
    assert_regions(m)
    windows = {site.mask.window for graph in m.graphs for site in graph.report.sites if site.mask}
    assert windows <= {window, None}
    assert window in windows


def test_window_reads_only_the_pages_it_sees(seed: int) -> None:
    window, new, layers = 40, 12, 2
    m = CompiledModel(tiny_mistral(seed, window, layers))
    ids, oracle = m.prompt(seed, 200, new)
    m.use(disable_passes=("hoist_prefetch",))
    cache = m.cache()
    assert_same(generate(m.model, ids, cache, new), oracle)
    stats = m.assert_streamed(cache)
    # A band of 40 tokens touches at most 4 pages of 16.
    assert stats.h2d_bytes <= (new - 1) * 4 * 16 * m.token_bytes
    assert stats.h2d_bytes < (new - 1) * 200 * m.token_bytes / 2


def test_inference_mode(seed: int) -> None:
    """Another set of the same size as without it, and caches go from one to the other."""
    m = CompiledModel(tiny_llama(seed))
    with torch.inference_mode():
        check(m, seed, 65, 30)
    assert dynamo_graphs() <= 3
    check(m, seed, 65, 30)
    assert dynamo_graphs() <= 6
    ids, oracle = m.prompt(seed, 50, NEW)
    cache = m.cache()
    with torch.inference_mode():
        run = generate(m.model, ids, cache, NEW, prefill_chunk_size=35)
    assert_same(run, oracle)
    ids, oracle = m.prompt(seed, 20, NEW, after=run.tokens.clone())
    assert_same(generate(m.model, ids, cache, NEW), oracle)
    with torch.inference_mode():
        ids, oracle = m.prompt(seed, 30, NEW, after=oracle.tokens)
        assert_same(generate(m.model, ids, cache, NEW), oracle)
    m.assert_streamed(cache)
    assert dynamo_graphs() <= 8, "a turn in one piece takes one graph more in each mode"
    assert_regions(m)


def test_three_models_in_one_process(seed: int) -> None:
    """All models share one code object of transformers; each is compiled all the same."""
    shapes = ((6, 3, 8), (6, 2, 16), (6, 3, 8))
    models = [CompiledModel(tiny_llama(seed + i, 2, *shape)) for i, shape in enumerate(shapes)]
    for number, m in enumerate(models):
        check(m, seed + number, 65, 30)
    compiled = dynamo_graphs()
    assert compiled <= 3 * len(models)
    for number, m in enumerate(models):
        check(m, seed - number, 90, 40)
    assert dynamo_graphs() == compiled


def test_three_unique_regions_at_any_depth(seed: int) -> None:
    m = CompiledModel(tiny_llama(seed, layers=5))
    m.forward(random_ids(seed, 20), m.cache(), 20)
    assert_regions(m)


def gave_up(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What caches said about compiled models that ran eagerly."""
    messages = [r.message for r in caplog.records if r.name == "headinfer_compile.cache"]
    assert all("the model is compiled" in message for message in messages)
    assert all("TORCH_LOGS=recompiles" in message for message in messages)
    return messages


def test_giving_up_is_not_silent(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    m = CompiledModel(tiny_llama(seed))
    ids, oracle = m.prompt(seed, 30, NEW)
    cache = m.cache()
    with torch.compiler.set_stance("force_eager"), caplog.at_level(logging.WARNING):
        assert_same(generate(m.model, ids, cache, NEW), oracle)
        assert cache.stats().eager_updates == NEW * m.layers
        assert len(gave_up(caplog)) == 1
        with pytest.raises(CacheError, match=r"Dynamo gave up.*strict=True"):
            generate(m.model, ids, m.cache(strict=True), NEW)
    # The cache goes on when the model is compiled again.
    ids, oracle = m.prompt(seed, 9, NEW, after=oracle.tokens)
    assert_same(generate(m.model, ids, cache, NEW), oracle)
    assert cache.stats().sites_rewritten == m.layers


def test_running_out_of_recompiles_is_not_silent(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    m = CompiledModel(tiny_llama(seed))
    eager = []
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING):
        for batch, chunk in ((1, 30), (2, 30), (1, None)):
            ids, oracle = m.prompt(seed, 50, NEW, batch)
            options = {} if chunk is None else {"prefill_chunk_size": chunk}
            cache = m.cache()
            assert_same(generate(m.model, ids, cache, NEW, **options), oracle)
            eager.append(cache.stats().eager_updates > 0)
    assert len(gave_up(caplog)) == sum(eager)
    if not any(eager):
        pytest.skip("with this transformers Dynamo does not count these graphs as recompiles")
