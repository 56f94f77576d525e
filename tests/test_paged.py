"""Tables of the fused decode kernel: addresses, rows, and what tells one block from another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness import CompiledModel, clean_dynamo, one_thread, random_ids
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError
from headinfer_compile.runtime import block_plan, retention
from headinfer_compile.runtime.paged import PagedTables
from headinfer_compile.runtime.token_block import TokenBlock
from test_kept_windows import tiny_mixed

PAGE = 16


@pytest.fixture(autouse=True)
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_plan, "KEPT_TOKENS", 12)
    monkeypatch.setattr(retention, "KEPT_TOKENS", 12)


@pytest.fixture(scope="module")
def mixed() -> Iterator[CompiledModel]:
    """Windows in the layers 0 and 2 of three."""
    with one_thread(), clean_dynamo():
        yield CompiledModel(tiny_mixed(0))


def blocks_with_rows(cache: HeadInferCache) -> list[tuple[TokenBlock, int]]:
    session = cache.session
    stored = session.length - session.tail_rows
    return [
        (block, min(block.tokens, stored - block.start))
        for block in session.table.blocks
        if block.start < stored
    ]


def check(tables: PagedTables, cache: HeadInferCache, layers: set[int]) -> None:
    blocks = blocks_with_rows(cache)
    session = cache.session
    tables.sync(blocks, session.tail_rows + 1, None, session.length - session.tail_rows)
    for layer in layers:
        pages = [*(block.pages[layer] for block, _ in blocks), session.tail.layers[layer]]
        wanted = [[k.data_ptr(), v.data_ptr()] for k, v in pages]
        assert tables.of(layer).tolist() == wanted
    assert tables.rows.tolist() == [*(rows for _, rows in blocks), session.tail_rows + 1]
    assert tables.capacity.tolist() == [*(b.tokens for b, _ in blocks), session.tail.tokens]


def test_the_tables_follow_the_blocks(mixed: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 200)
    with mixed.cache(gpu_budget="1GiB", page_tokens=PAGE) as cache, torch.no_grad():
        mixed.forward(ids[:, :30], cache, 30)
        session = cache.session
        tables = PagedTables(session.geometry, session.tail)  # type: ignore[arg-type]
        check(tables, cache, {0, 1, 2})
        version = tables.version
        check(tables, cache, {0, 1, 2})
        assert tables.version == version
        mixed.forward(ids[:, 30:], cache, 30)
        assert session.table.lacks_resident
        check(tables, cache, {1})
        assert tables.version > version
        for layer in (0, 2):
            with pytest.raises(CacheError, match=f"layer {layer} keeps the newest tokens alone"):
                tables.of(layer)
        # The next conversation's blocks have the same numbers and other memory.
        numbers = [block.index for block, _ in blocks_with_rows(cache)]
        cache.reset()
        mixed.forward(ids[:, :30], cache, 30)
        again = [block.index for block, _ in blocks_with_rows(cache)]
        assert again == numbers[: len(again)]
        check(tables, cache, {0, 1, 2})


def test_blocks_placed_anew_are_told_from_those_before(mixed: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 30)
    with mixed.cache(gpu_budget="1GiB", page_tokens=PAGE) as cache, torch.no_grad():
        mixed.forward(ids, cache, 30)
        session = cache.session
        tables = PagedTables(session.geometry, session.tail)  # type: ignore[arg-type]
        check(tables, cache, {0, 1, 2})
        before = tables.version
        # Pages are held, so that their memory is not given again.
        held = [(block.index, dict(block.pages)) for block in session.table.blocks]
        cache.reset()
        session.table.truncate(0, 0)
        mixed.forward(ids, cache, 30)
        assert [b.index for b in session.table.blocks] == [index for index, _ in held]
        check(tables, cache, {0, 1, 2})
        assert tables.version > before
