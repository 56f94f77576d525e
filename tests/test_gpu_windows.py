"""Layers with a window on a GPU: pinned slabs are unmapped or reused while decoding goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harness import VOCAB, CompiledModel, assert_same, clean_dynamo, generate, tiny_mistral
from headinfer_compile.runtime.block_plan import KEPT_TOKENS
from headinfer_compile.runtime.slab import HostSlab

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WINDOW, CHUNK, PAGE, PROMPT, NEW = 100, 256, 128, 1900, 140


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles its own model."""
    with clean_dynamo():
        yield


@pytest.mark.parametrize("cpu_attention", ["off", 0.5])
@pytest.mark.parametrize("budget", [0, "300KiB"])
def test_windows_in_bounded_host_memory(
    cpu_attention: str | float, budget: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = torch.seed() % 2**31
    made: list[HostSlab] = []
    build = HostSlab.__init__

    def counted(slab: HostSlab, *args: Any, **how: Any) -> None:
        made.append(slab)
        build(slab, *args, **how)

    monkeypatch.setattr(HostSlab, "__init__", counted)
    resident: Any = tiny_mistral(seed, WINDOW, layers=3)
    m = CompiledModel(resident.to(DEVICE), cpu_attention=cpu_attention)
    m.model.to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (1, PROMPT), generator=generator).to(DEVICE)
    oracle = generate(m.resident, ids, m.resident_cache(), NEW)
    with m.cache(page_tokens=PAGE, tail_tokens=16, gpu_budget=budget) as cache:
        run = generate(m.model, ids, cache, NEW, prefill_chunk_size=CHUNK)
        if not oracle.tied:
            assert_same(run, oracle)
        stats = m.assert_streamed(cache)
        most = WINDOW + KEPT_TOKENS + CHUNK + 3 * PAGE
        assert stats.host_bytes <= most * m.token_bytes < PROMPT * m.token_bytes
        assert len(made) * PAGE <= most + PAGE, f"seed {seed}: given up slabs were not reused"
