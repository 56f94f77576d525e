"""The backend does what was planned, and refuses what cannot be before it is computed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from headinfer_compile import HeadInferCache, explain, headinfer, plan
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import DoesNotFitError, HeadInferError
from headinfer_compile.machine import Machine, Rates
from headinfer_compile.model_facts import facts_of
from headinfer_compile.plan_memory import Request, Settings
from headinfer_compile.planner import make_plan
from model_zoo import FAMILIES

PAGE, TAIL = 48, 8
LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * DIM * 4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
        max_position_embeddings=4096,
    )  # fmt: skip
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.eval()
    return made


def compiled(model: PreTrainedModel, **options: Any) -> Any:
    model.compile(backend=headinfer, options={"lowering": "eager", **options})
    return model


def cache_for(model: PreTrainedModel, **sizes: Any) -> HeadInferCache:
    return HeadInferCache(model.config, page_tokens=PAGE, tail_tokens=TAIL, **sizes)


@pytest.mark.parametrize(
    ("gpu_tokens", "group"),
    [pytest.param(0, 1, marks=pytest.mark.slow), (3 * PAGE, 2), (1000, 1)],
)
def test_planned_bytes_are_those_of_the_cache(
    model: PreTrainedModel, gpu_tokens: int, group: int
) -> None:
    context, chunk = 270, 96
    budget = gpu_tokens * TOKEN_BYTES
    config = HeadInferConfig(
        head_group={"prefill": group, "decode": KV_HEADS}, num_slots=2, workspace_bytes="64KiB"
    )
    request = Request(
        context, chunk, gpu_budget=budget, config=config, page_tokens=PAGE, tail_tokens=TAIL
    )
    machine = Machine("test", 1 << 33, 1 << 33, Rates())
    made = make_plan(facts_of(model), machine, request, Settings(chunk, config))
    options = {**made.options, "workspace_bytes": "64KiB"}
    with cache_for(model, gpu_budget=budget, host_budget=1 << 30) as cache, torch.no_grad():
        ids = torch.randint(0, 64, (1, context))
        for part in ids.split(chunk, dim=1):
            compiled(model, **options)(part, past_key_values=cache)
        stats = cache.stats()
        assert stats.sites_rewritten == LAYERS and stats.eager_updates == 0
        memory = made.choice.memory
        assert stats.resident_bytes == made.resident_bytes
        assert stats.host_bytes == made.host_bytes
        assert stats.staging_bytes == memory.staging_bytes
        assert stats.tail_bytes == memory.tail_bytes
        assert stats.slot_bytes == memory.slot_bytes
        assert stats.workspace_bytes == memory.workspace_bytes
        if gpu_tokens == 1000:
            assert stats.host_bytes == stats.h2d_bytes == 0
        else:
            assert stats.h2d_bytes > 0


@pytest.mark.parametrize(
    "name", [pytest.param("DeepSeek-V2", marks=pytest.mark.slow), "DeepSeek-V3"]
)
def test_latent_attention_is_planned_with_the_bytes_that_it_stores(name: str, seed: int) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    latent = family.make(seed)
    context, chunk = 270, 96
    request = Request(context, chunk, gpu_budget=0, page_tokens=PAGE, tail_tokens=TAIL)
    facts = facts_of(latent, dtype=torch.float32)
    settings = Settings(chunk, HeadInferConfig(workspace_bytes="64KiB"))
    made = make_plan(facts, Machine("test", 1 << 33, 1 << 33, Rates()), request, settings)
    with cache_for(latent, gpu_budget=0, host_budget=1 << 30) as cache, torch.no_grad():
        model = compiled(latent, **{**made.options, "workspace_bytes": "64KiB"})
        for part in torch.randint(0, 64, (1, context)).split(chunk, dim=1):
            model(part, past_key_values=cache)
        stats = cache.stats()
    assert stats.sites_rewritten == facts.num_layers and stats.eager_updates == 0
    assert made.kv_bytes == stats.kv_bytes == context * facts.token_bytes
    memory = made.choice.memory
    for part in ("slot", "staging", "tail", "resident", "host"):
        assert getattr(memory, f"{part}_bytes") == getattr(stats, f"{part}_bytes"), part


def test_a_chunked_prompt_is_refused_before_its_first_chunk(model: PreTrainedModel) -> None:
    host = 10 * PAGE * TOKEN_BYTES
    ids = torch.randint(0, 64, (1, 12 * PAGE))
    with cache_for(model, gpu_budget=0, host_budget=host) as cache:
        with pytest.raises(DoesNotFitError, match=f"at most {10 * PAGE} tokens") as info:
            compiled(model).generate(
                ids, past_key_values=cache, prefill_chunk_size=2 * PAGE, max_new_tokens=2,
                attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert cache.get_seq_length() == 0 and cache.session.length == 0
        assert cache.stats().host_bytes == 0
        text = str(info.value)
        for way in ("host_budget=", "gpu_budget=", "at most"):
            assert way in text
        out = compiled(model).generate(
            ids[:, : 9 * PAGE], past_key_values=cache, prefill_chunk_size=2 * PAGE,
            max_new_tokens=2, attention_mask=torch.ones(1, 9 * PAGE), do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == 9 * PAGE + 2


def test_the_settings_that_a_refusal_names_do_work(model: PreTrainedModel) -> None:
    host, context = 4 * PAGE * TOKEN_BYTES, 7 * PAGE
    with cache_for(model, gpu_budget=0, host_budget=host) as cache, torch.no_grad():
        ids = torch.zeros(1, context, dtype=torch.int64)
        with pytest.raises(DoesNotFitError) as info:
            compiled(model)(ids, past_key_values=cache)
    words = str(info.value).replace(";", "").replace(",", "").split()
    named = dict(word.split("=") for word in words if "=" in word)
    budgets = [
        {"gpu_budget": 0, "host_budget": int(named["host_budget"])},
        {"gpu_budget": int(named["gpu_budget"]), "host_budget": host},
    ]
    for sizes in budgets:
        with cache_for(model, **sizes) as cache, torch.no_grad():
            compiled(model)(ids, past_key_values=cache)
            assert cache.get_seq_length() == context


def test_a_chunk_that_cannot_be_followed_is_announced(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    host = 5 * PAGE * TOKEN_BYTES
    ids = torch.zeros(1, 2 * PAGE, dtype=torch.int64)
    with cache_for(model, gpu_budget=0, host_budget=host) as cache, torch.no_grad():
        network = compiled(model)
        with caplog.at_level(logging.WARNING):
            network(ids, past_key_values=cache)
            assert "does not fit" not in caplog.text
            network(ids, past_key_values=cache)
            assert f"there is room for {5 * PAGE} tokens" in caplog.text
        with pytest.raises(DoesNotFitError):
            network(ids, past_key_values=cache)
        assert cache.get_seq_length() == 4 * PAGE
        network(ids[:, :PAGE], past_key_values=cache)
        assert cache.get_seq_length() == 5 * PAGE


def test_reserve_refuses_and_keeps_nothing(model: PreTrainedModel) -> None:
    with cache_for(model, gpu_budget=0, host_budget=100 * TOKEN_BYTES) as cache:
        with pytest.raises(DoesNotFitError, match="at most 100 tokens"):
            cache.reserve(101)
        cache.reserve(100)
        assert cache.session.reserved == 100


def test_a_split_model_is_refused(model: PreTrainedModel) -> None:
    """As with ``device_map="auto"`` over two devices; here the second one is meta."""

    def backend(gm: Any, example_inputs: Any) -> Any:
        split = list(example_inputs)
        last = max(i for i, value in enumerate(split) if isinstance(value, torch.nn.Parameter))
        split[last] = torch.nn.Parameter(split[last].to("meta"), requires_grad=False)
        return headinfer(gm, split, options={"lowering": "eager"})

    model.compile(backend=backend)
    network: Any = model
    with (
        cache_for(model, gpu_budget=0, host_budget=1 << 30) as cache,
        torch.no_grad(),
        pytest.raises(HeadInferError, match=r"weights are on cpu, meta.*device_map.*--gpus"),
    ):
        network(torch.zeros(1, 100, dtype=torch.int64), past_key_values=cache)


def test_explain_has_a_plan(model: PreTrainedModel) -> None:
    found = explain(model.config, context=256, chunk=128, gpu_budget=0, page_tokens=PAGE)
    assert found.plan is not None
    assert found.plan.chunk == 128 and found.plan.host_bytes == found.storage.host_bytes
    assert "== plan ==" in str(found) and "largest context" in str(found)
    assert found.to_json()["plan"]["context"] == 256


def test_a_live_model_is_planned_with_its_own_weights(model: PreTrainedModel) -> None:
    made = plan(model, context=256, gpu_memory="8GiB", host_memory="8GiB", link="10GB/s", tflops=10)
    assert made.facts.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert made.facts.footprint.traced
    assert made.kv_bytes == 256 * TOKEN_BYTES
