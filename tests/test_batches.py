"""Several rows at once: prompts of unequal length, padded on the left, and rows that end early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import (
    CompiledModel,
    assert_same,
    clean_dynamo,
    generate,
    random_ids,
    tiny_llama,
)

NEW = 8


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Iterator[CompiledModel]:
    """One compiled model with 3 KV heads for all tests of this module."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed))


def padded(lengths: Sequence[int]) -> Tensor:
    """The mask ``[B, longest]`` of prompts padded on the left."""
    longest = max(lengths)
    return torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])


def test_reset_for_another_batch(llama: CompiledModel, seed: int) -> None:
    cache = llama.cache()
    for batch in (1, 2, 1):
        ids, oracle = llama.prompt(seed, 50, NEW, batch)
        assert_same(generate(llama.model, ids, cache, NEW), oracle)
        assert llama.assert_streamed(cache).kv_bytes == batch * 57 * llama.token_bytes
        cache.reset()


def test_whole_rows_of_padding(llama: CompiledModel, seed: int) -> None:
    """A row whose first chunks are padding throughout; its K and V must not leak."""
    mask = padded((13, 89, 90))[:2]
    ids, oracle = llama.prompt(seed, 90, NEW, 2, attention_mask=mask)
    for chunk in (35, 90):
        cache = llama.cache()
        run = generate(llama.model, ids, cache, NEW, prefill_chunk_size=chunk, attention_mask=mask)
        assert_same(run, oracle)
        llama.assert_streamed(cache)
    alone = generate(llama.resident, ids[:1, 77:], llama.resident_cache(), NEW)
    assert torch.equal(alone.tokens[:, -NEW:], oracle.tokens[:1, -NEW:])


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"workspace_bytes": 8000, "num_slots": 3}, marks=pytest.mark.slow)]
)
def test_turns_of_prompts_of_unequal_length(
    llama: CompiledModel, seed: int, options: dict[str, Any]
) -> None:
    """Each row of a padded batch goes on as it would alone, over two turns and many pages."""
    llama.use(**options)
    lengths = (70, 23, 1, 64)
    mask = padded(lengths)
    ids, oracle = llama.prompt(seed, 70, 20, 4, attention_mask=mask)
    cache = llama.cache()
    run = generate(llama.model, ids, cache, 20, prefill_chunk_size=32, attention_mask=mask)
    assert_same(run, oracle)
    mask = torch.cat([mask, torch.ones(4, 20 + 11, dtype=torch.int64)], 1)
    ids, second = llama.prompt(seed + 1, 11, NEW, 4, after=oracle.tokens, attention_mask=mask)
    assert_same(generate(llama.model, ids, cache, NEW, attention_mask=mask), second)
    llama.assert_streamed(cache)
    for row, length in enumerate(lengths):
        alone = generate(llama.resident, ids[row : row + 1, 70 - length :], None, NEW)
        assert torch.equal(alone.tokens[0, -NEW:], second.tokens[row, -NEW:])
    llama.use()


def test_rows_that_end_early(llama: CompiledModel, seed: int) -> None:
    """After its end-of-sequence token a row is filled up while the others go on."""
    ids = random_ids(seed, 60, 3)
    free = generate(llama.resident, ids, llama.resident_cache(), 20).tokens[:, 60:]
    ends = [int(free[0, 3]), int(free[1, 9])]

    def run(model: Any, cache: Any) -> Tensor:
        out: Tensor = model.generate(
            ids, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=ends,
            pad_token_id=96, attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        return out

    cache = llama.cache()
    tokens = run(llama.model, cache)
    assert torch.equal(tokens, run(llama.resident, llama.resident_cache()))
    assert (tokens[0, 64:] == 96).all()
    llama.assert_streamed(cache)
