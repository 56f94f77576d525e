"""The compiled model gives the resident model's tokens, whatever is streamed, split or resident."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    Expected,
    assert_same,
    assert_written_once,
    clean_dynamo,
    generate,
    random_ids,
    tiny_llama,
)
from headinfer_compile import HeadInferCache

# More than 64 new tokens are prefill to the runtime, fewer are decode: the chunks below are both.
PROMPT, NEW = 161, 10
AXES: Mapping[str, Sequence[Any]] = {
    # One piece; an uneven last chunk; a last chunk of one token.
    "chunk": (PROMPT, 70, 80),
    "page_tokens": (16, 64, "auto"),
    "head_group": (1, 2, 3, "auto", {"prefill": 2, "decode": 1}),
    "num_slots": (2, 3),
    "budget": ("none", "third", "all"),
}


def covering(axes: Mapping[str, Sequence[Any]]) -> list[Any]:
    """All combinations; those outside a subset that covers every pair of values are slow."""
    combinations = list(itertools.product(*axes.values()))
    missing = {
        pair
        for combination in combinations
        for pair in itertools.combinations(_items(combination), 2)
    }
    default = set()
    while missing:
        best = max(
            combinations,
            key=lambda c: sum(pair in missing for pair in itertools.combinations(_items(c), 2)),
        )
        missing -= set(itertools.combinations(_items(best), 2))
        default.add(str(best))
    slow = (pytest.mark.slow,)
    return [pytest.param(*c, marks=() if str(c) in default else slow) for c in combinations]


def _items(combination: Sequence[Any]) -> list[tuple[int, str]]:
    return [(axis, str(value)) for axis, value in enumerate(combination)]


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Iterator[CompiledModel]:
    """One compiled model with 3 KV heads for all tests of this module."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed))


@pytest.mark.parametrize(tuple(AXES), covering(AXES))
def test_layouts(
    llama: CompiledModel, seed: int, chunk: int, page_tokens: int | str, head_group: Any,
    num_slots: int, budget: str,
) -> None:  # fmt: skip
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    llama.use(head_group=head_group, num_slots=num_slots)
    kv_bytes = (PROMPT + NEW - 1) * llama.token_bytes
    gpu_budget = {"none": 0, "third": kv_bytes // 3, "all": 1 << 30}[budget]
    cache = llama.cache(page_tokens=page_tokens, gpu_budget=gpu_budget)
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=chunk), oracle)
    stats = llama.assert_streamed(cache, resident=budget == "all")
    assert stats.kv_bytes == kv_bytes
    assert_written_once(stats)
    if budget == "third" and page_tokens == 16:
        assert stats.blocks_by_tier == {"gpu": 3, "host": 8}
        assert 0 < stats.resident_bytes <= gpu_budget


@pytest.mark.oldest
@pytest.mark.parametrize("chunk", [PROMPT, 70, 80])
def test_default_options(llama: CompiledModel, seed: int, chunk: int) -> None:
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    llama.use()
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=chunk), oracle)
    assert_written_once(llama.assert_streamed(cache))


@pytest.mark.parametrize(
    ("chunk", "hoist", "resident"),
    [(PROMPT, True, 0), (70, True, 2), (70, False, 0), (80, False, 2), (30, True, 0)],
)
def test_bytes_moved(
    llama: CompiledModel, seed: int, chunk: int, hoist: bool, resident: int
) -> None:
    """Each host row is read once a layer and step, and written once in all."""
    new = 20
    ids, oracle = llama.prompt(seed, PROMPT, new)
    llama.use(disable_passes=() if hoist else ("hoist_prefetch",))
    cache = llama.cache(gpu_budget=resident * 16 * llama.token_bytes)
    assert_same(generate(llama.model, ids, cache, new, prefill_chunk_size=chunk), oracle)
    stats = llama.assert_streamed(cache)
    expected = Expected(llama.token_bytes, 16, 8, resident, distance=2 if hoist else 0)
    expected.run(PROMPT, chunk, new, llama.layers)
    assert stats.h2d_bytes == expected.h2d_bytes
    assert stats.d2h_bytes == expected.d2h_bytes


def test_queries_split_by_workspace(llama: CompiledModel, seed: int) -> None:
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    llama.use()
    whole = llama.cache()
    generate(llama.model, ids, whole, NEW, prefill_chunk_size=100)
    workspace = 8000
    llama.use(workspace_bytes=workspace)
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=100), oracle)
    stats = llama.assert_streamed(cache)
    assert stats.workspace_bytes <= workspace < whole.stats().workspace_bytes
    # 144 bytes a query of one KV head. 100 queries one head at a time: 3 pieces of 48; 61 queries
    # all heads at once: 4 pieces of 16.
    assert stats.op_calls["store"] - whole.stats().op_calls["store"] == (2 * 3 + 3) * llama.layers
    # Each piece of the second chunk streams the 100 old tokens.
    again = 3 * 100 * llama.token_bytes
    assert stats.h2d_bytes == whole.stats().h2d_bytes + again


@pytest.mark.parametrize(
    "options", [{}, {"num_slots": 2, "head_group": 2}, {"workspace_bytes": 8000}]
)
@pytest.mark.parametrize("chunk", [33, 65])
def test_logits_of_direct_calls(
    llama: CompiledModel, seed: int, chunk: int, options: dict[str, Any]
) -> None:
    ids = random_ids(seed, 130)
    llama.use(**options)
    cache = llama.cache()
    got = llama.forward(ids, cache, chunk)
    want = llama.forward(ids, llama.resident_cache(), 130)
    assert float((got - want).abs().max()) <= MAX_LOGIT_DIFFERENCE
    llama.assert_streamed(cache)
    # The oracle would notice one lost token: far from the newest, it moves the last logits.
    lost = llama.forward(torch.cat([ids[:, :3], ids[:, 4:]], 1), llama.resident_cache(), 130)
    assert float((want[:, -1] - lost[:, -1]).abs().max()) > 100 * MAX_LOGIT_DIFFERENCE


@pytest.mark.oldest
def test_batch_of_equal_length(llama: CompiledModel, seed: int) -> None:
    ids, oracle = llama.prompt(seed, PROMPT, NEW, batch=2)
    llama.use()
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=70), oracle)
    assert llama.assert_streamed(cache).kv_bytes == 2 * (PROMPT + NEW - 1) * llama.token_bytes


def test_smallest_tail_and_longest_decode(llama: CompiledModel, seed: int) -> None:
    """Every token is flushed on its own, and decode crosses several pages."""
    ids, oracle = llama.prompt(seed, 20, 40)
    llama.use()
    cache = llama.cache(tail_tokens=1)
    assert_same(generate(llama.model, ids, cache, 40), oracle)
    assert llama.assert_streamed(cache).d2h_bytes == cache.stats().kv_bytes


def test_prompt_that_fits_the_tail(llama: CompiledModel, seed: int) -> None:
    """Short prompts and turns append to the tail and reach host pages when it fills."""
    ids, oracle = llama.prompt(seed, 5, 30)
    llama.use()
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, 30), oracle)
    llama.assert_streamed(cache)


@pytest.mark.parametrize("slot_tokens", [32, {"prefill": 48, "decode": 16}])
def test_slots_of_several_pages(llama: CompiledModel, seed: int, slot_tokens: Any) -> None:
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    llama.use(slot_tokens=slot_tokens, head_group=3)
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=70), oracle)
    stats = llama.assert_streamed(cache)
    tokens = max(slot_tokens.values()) if isinstance(slot_tokens, dict) else slot_tokens
    assert stats.slot_bytes == 3 * tokens * 2 * 3 * 8 * 4


def test_fixed_bytes_do_not_grow(llama: CompiledModel, seed: int) -> None:
    llama.use()

    def fixed_bytes(tokens: int) -> int:
        cache: HeadInferCache = llama.cache()
        llama.forward(random_ids(seed, tokens), cache, 40)
        return llama.assert_streamed(cache).fixed_bytes

    assert fixed_bytes(80) == fixed_bytes(400)
