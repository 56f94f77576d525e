"""What only a GPU shows: peaks as planned, and budgets beside other allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.machine import assumed_rates
from headinfer_compile.model_facts import facts_of
from headinfer_compile.plan_memory import Request, Settings
from headinfer_compile.planner import Plan, make_plan
from headinfer_compile.probe import this_machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CHUNK = 4096


@pytest.fixture(scope="module")
def model() -> Any:
    """Four layers of an 8B model's widths, so that activations are a visible part of the peak."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    with torch.device("cuda"):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.eval().compile(backend=headinfer)
    # Compile, and let libraries take what they keep.
    with HeadInferCache(config, gpu_budget=0) as cache, torch.no_grad():
        for tokens in (CHUNK, CHUNK, 1, 1):
            forward(made, cache, tokens)
    return made


def forward(model: Any, cache: HeadInferCache, tokens: int) -> None:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
    past = cache.get_seq_length()
    positions = torch.arange(past, past + tokens, device="cuda")[None]
    model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)


def planned(model: Any, context: int, budget: int | None) -> Plan:
    # What the backend takes where no probe is known to it, as in all tests.
    config = HeadInferConfig(head_group={"prefill": 1, "decode": 8})
    machine = this_machine(measure=False, model=model)
    assert machine.rates == assumed_rates() or machine.source.startswith("measured")
    request = Request(context, CHUNK, gpu_budget=budget, config=config)
    return make_plan(facts_of(model), machine, request, Settings(CHUNK, config))


@pytest.mark.parametrize("budget", [0, 1 << 28, None])
def test_the_peak_is_the_planned_one(model: Any, budget: int | None) -> None:
    context = 8 * CHUNK
    made = planned(model, context, budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = "auto" if budget is None else budget
    with HeadInferCache(model.config, gpu_budget=kept) as cache, torch.no_grad():
        for _ in range(8):
            forward(model, cache, CHUNK)
        torch.cuda.synchronize()
        peak, stats = torch.cuda.max_memory_allocated(), cache.stats()
    print(f"planned {made.gpu_bytes:,}, measured {peak:,}: {made.gpu_bytes / peak - 1:+.2%}")
    assert stats.sites_rewritten == 4 and stats.eager_updates == 0
    assert stats.host_bytes == made.host_bytes
    assert stats.resident_bytes == made.resident_bytes
    assert abs(made.gpu_bytes / peak - 1) < 0.03


def test_auto_survives_what_others_allocate(model: Any) -> None:
    """Half of the prompt is resident; then somebody takes nearly all that is free."""
    with HeadInferCache(model.config) as cache, torch.no_grad():
        forward(model, cache, CHUNK)
        forward(model, cache, CHUNK)
        assert cache.stats().host_bytes == 0
        free = torch.cuda.mem_get_info()[0]
        others = torch.empty(free - (2 << 30), dtype=torch.uint8, device="cuda")
        try:
            for _ in range(14):
                forward(model, cache, CHUNK)
            forward(model, cache, 1)
            torch.cuda.synchronize()
        finally:
            del others
            torch.cuda.empty_cache()
        stats = cache.stats()
        assert stats.tokens == 16 * CHUNK + 1
        assert stats.resident_bytes > 0 and stats.eager_updates == 0


def test_auto_on_a_small_card_fits(model: Any) -> None:
    """On an emulated card that leaves 3 GiB, a long prompt fits and partly stays on the GPU."""
    weights = sum(p.nbytes for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((weights + (3 << 30)) / total)
    try:
        made = planned(model, 40 * CHUNK, None)
        with HeadInferCache(model.config) as cache, torch.no_grad():
            for _ in range(40):
                forward(model, cache, CHUNK)
            for _ in range(4):
                forward(model, cache, 1)
            torch.cuda.synchronize()
            stats = cache.stats()
        assert stats.resident_bytes > 0 and stats.host_bytes > 0
        assert abs(stats.resident_bytes - made.resident_bytes) <= 0.1 * made.resident_bytes
        assert stats.h2d_bytes > 0 and stats.materialised_layers == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
