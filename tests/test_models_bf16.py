"""The default families in bf16: as close to fp32 as the resident model is, on the kernels of a GPU.

bf16 rounds what it computes, and a rounded router may choose another expert: errors are compared in
the mean, against those of the same model with a resident cache.
"""

from __future__ import annotations

import copy

import pytest
import torch

from harness import CompiledModel, clean_dynamo, random_ids
from headinfer_compile import HeadInferCache
from model_zoo import FAMILIES, Family

PROMPT, CHUNK, DECODE = 161, 70, 6
DEFAULT = [family for family in FAMILIES if family.default]


def check(family: Family, device: str, seed: int, gpu_budget: int) -> HeadInferCache:
    """Compare teacher-forced logits of chunks and single tokens; the cache that served them."""
    missing = family.missing()
    if missing:
        pytest.skip(missing)
    with clean_dynamo():
        resident = family.make(seed)
        resident.bfloat16()
        torch.nn.Module.to(resident, device)
        exact = copy.deepcopy(resident).float()
        model = CompiledModel(resident)
        model.model.bfloat16()
        torch.nn.Module.to(model.model, device)
        ids = random_ids(seed, PROMPT + DECODE).to(device)
        cache = model.cache(gpu_budget=gpu_budget)
        logits = []
        for cached, chunks in ((cache, True), (model.resident_cache(), False)):
            prompt = model.forward(ids[:, :PROMPT], cached, CHUNK if chunks else PROMPT)
            rest = model.forward(ids[:, PROMPT:], cached, 1)
            logits.append(torch.cat([prompt, rest], dim=1).float())
        with torch.no_grad():
            want = exact(ids, use_cache=False).logits
    ours, theirs = ((got - want).abs().mean().item() for got in logits)
    print(f"mean error {ours:.4f}, of the resident model {theirs:.4f}")
    assert ours <= 1.3 * theirs + 1e-3
    stats = cache.stats()
    assert stats.sites_rewritten == model.layers
    assert stats.eager_updates == stats.materialised_layers == 0
    return cache


@pytest.mark.gpu
@pytest.mark.parametrize("family", DEFAULT, ids=[family.id for family in DEFAULT])
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["streamed", "resident"])
def test_family_on_a_gpu(family: Family, seed: int, budget: int) -> None:
    stats = check(family, "cuda", seed, budget).stats()
    assert (stats.h2d_bytes == 0) == (budget > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama 3", "gpt-oss", "Gemma 2"])
def test_the_decode_kernel_serves_plain_sites_only(name: str, seed: int) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    cache = check(family, "cuda", seed, 1 << 30)
    # Where transformers takes sdpa for Gemma 2, it leaves the soft cap out.
    plain = [
        spec.soft_cap is spec.sinks is spec.mask.window is None for spec in cache.session.specs
    ]
    assert name == "Gemma 2" or any(plain) == (name == "Llama 3")
    assert ("attend_resident" in cache.stats().op_calls) == any(plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3", "gpt-oss", "Gemma 2", "DeepSeek-V3"])
def test_family_on_a_cpu(name: str, seed: int) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    assert check(family, "cpu", seed, 0).stats().h2d_bytes > 0
