"""Rows that share, on a GPU: beams, samples and changes of the batch, streamed and resident."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import clean_dynamo, tiny_llama
from headinfer_compile import HeadInferCache, headinfer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROMPT, NEW = 704, 40


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles its own model."""
    with clean_dynamo():
        yield


def compiled(seed: int, dtype: torch.dtype, **options: Any) -> tuple[Any, Any, Tensor]:
    """A resident model, its compiled twin and a prompt ``[1, PROMPT]``."""
    resident: Any = tiny_llama(seed, layers=3, heads=8, kv_heads=2, head_dim=64)
    resident = resident.to(DEVICE, dtype)
    model: Any = type(resident)(resident.config).to(DEVICE, dtype).eval()
    model.load_state_dict(resident.state_dict())
    model.compile(backend=headinfer, options={"lowering": "eager", **options})
    generator = torch.Generator().manual_seed(seed)
    return resident, model, torch.randint(0, 97, (1, PROMPT), generator=generator).to(DEVICE)


def check(cache: HeadInferCache) -> None:
    """Assert that schedules served the cache, and no fallback."""
    stats = cache.stats()
    assert (stats.sites_rewritten, stats.eager_updates, stats.materialised_layers) == (3, 0, 0)
    assert (stats.h2d_bytes > 0) == (stats.host_bytes > 0)


@pytest.mark.parametrize("budget", [0, "400KiB", "1GiB"])
@pytest.mark.parametrize("graphs", [False, True])
def test_beams(budget: int | str, graphs: bool) -> None:
    seed = torch.seed() % 2**31
    resident, model, ids = compiled(seed, torch.float32, cuda_graphs=graphs)
    options: dict[str, Any] = {"max_new_tokens": NEW, "num_beams": 4, "do_sample": False}
    options["pad_token_id"] = 97
    cache = HeadInferCache(model.config, gpu_budget=budget, page_tokens=64, tail_tokens=16)
    found = model.generate(ids, past_key_values=cache, prefill_chunk_size=200, **options)
    assert torch.equal(found, resident.generate(ids, **options)), f"seed {seed}"
    check(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_share_the_prompt(dtype: torch.dtype) -> None:
    """Equal rows are taken for equal, whatever the order in which a GPU adds up their products."""
    seed = torch.seed() % 2**31
    _, model, ids = compiled(seed, dtype, disable_passes=("hoist_prefetch",))
    cache = HeadInferCache(model.config, gpu_budget=0, page_tokens=64, tail_tokens=64)
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW, do_sample=True, num_return_sequences=4,
        prefill_chunk_size=352, pad_token_id=97,
    )  # fmt: skip
    check(cache)
    stats, token = cache.stats(), 3 * 2 * 2 * 64 * dtype.itemsize
    assert stats.host_bytes == stats.d2h_bytes == PROMPT * token, f"seed {seed}"
    steps = found.shape[1] - PROMPT - 1
    assert stats.h2d_bytes == (PROMPT // 2 + steps * PROMPT) * token


@pytest.mark.parametrize("budget", [0, "1GiB"])
def test_changes_of_the_batch(budget: int | str) -> None:
    """Reorder, select and repeat between steps; logits as of a run over each conversation."""
    seed = torch.seed() % 2**31
    resident, model, prompt = compiled(seed, torch.float32)
    cache = HeadInferCache(model.config, gpu_budget=budget, page_tokens=64, tail_tokens=4)
    ids = torch.cat([prompt, prompt, prompt.flip(1)])
    new = ids
    changes: list[tuple[str, Any, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 2], device=DEVICE), [2, 0, 2]),
        ("batch_select_indices", torch.tensor([1, 0], device=DEVICE), [1, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("reorder_cache", torch.tensor([3, 0, 1, 2], device=DEVICE), [3, 0, 1, 2]),
    ]
    with torch.no_grad():
        for step, (method, argument, rows) in enumerate([*changes, *changes[-1:] * 6]):
            got = model(new, past_key_values=cache, use_cache=True).logits[:, -1]
            want = resident(ids).logits[:, -1]
            assert float((got - want).abs().max()) <= 1e-3, f"seed {seed}, step {step}"
            getattr(cache, method)(argument)
            new = torch.randint(0, 97, (len(rows), 1), device=DEVICE)
            ids = torch.cat([ids[rows], new], 1)
    check(cache)
