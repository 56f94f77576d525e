"""What only a GPU can show: streams, the resident kernel, captured steps, memory, no host syncs."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import clean_dynamo, tiny_llama
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.errors import HeadInferError
from headinfer_compile.machine import MachineProfile, Rates
from headinfer_compile.models import demo_source, load_model, load_tokenizer
from headinfer_compile.runtime.sizes import Layout
from headinfer_compile.runtime.spec import Geometry, kv_views

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles its own model."""
    with clean_dynamo():
        yield


def model_on_gpu(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Three layers with head_dim 64, which every kernel supports."""
    model: Any = tiny_llama(seed, layers=3, heads=8, kv_heads=2, head_dim=64)
    return model.to(DEVICE, dtype)


def prompt(seed: int, tokens: int) -> Tensor:
    """Random ids ``[1, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (1, tokens), generator=generator).to(DEVICE)


def decode(model: Any, cache: HeadInferCache, ids: Tensor) -> Tensor:
    """Logits of one forward with position_ids, as ``generate`` calls the model."""
    past = cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1], device=DEVICE)[None]
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("budget", [0, "400KiB", "1GiB"])
@pytest.mark.parametrize(("num_slots", "graphs"), [(2, False), (3, True)])
def test_tokens_equal_the_resident_run(budget: int | str, num_slots: int, graphs: bool) -> None:
    seed = torch.seed() % 2**31
    model, ids = model_on_gpu(seed), prompt(seed, 700)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)
    options = {"lowering": "eager", "num_slots": num_slots, "cuda_graphs": graphs}
    model.compile(backend=headinfer, options=options)
    cache = HeadInferCache(model.config, gpu_budget=budget, page_tokens=64, tail_tokens=16)
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=60, do_sample=False, prefill_chunk_size=200
    )
    stats = cache.stats()
    assert torch.equal(found, expected), f"seed {seed}"
    assert (stats.sites_rewritten, stats.eager_updates, stats.materialised_layers) == (3, 0, 0)
    assert (stats.h2d_bytes > 0) == (stats.host_bytes > 0)
    assert ("replay" in stats.op_calls) == (graphs and budget == "1GiB")


def test_head_groups_change_within_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks that cost the host a second each: fewer of them are faster, whatever they move.
    profile = MachineProfile("test", Rates(block_seconds=1.0), 0, 0, 1 << 34, 0.0, 0.0, "")
    monkeypatch.setattr("headinfer_compile.auto_settings.load_profile", lambda: profile)
    seed = torch.seed() % 2**31
    model, ids = model_on_gpu(seed), prompt(seed, 900)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.compile(backend=headinfer, options={"lowering": "eager"})
    cache = HeadInferCache(model.config, gpu_budget=0, page_tokens=64, tail_tokens=16)
    groups: set[int] = set()
    layout = cache.session.layout
    monkeypatch.setattr(cache.session, "layout", lambda phase: _seen(layout(phase), phase, groups))
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=8, do_sample=False, prefill_chunk_size=160
    )
    stats = cache.stats()
    assert torch.equal(found, expected), f"seed {seed}"
    assert (stats.sites_rewritten, stats.eager_updates, stats.materialised_layers) == (3, 0, 0)
    assert stats.h2d_bytes > 0 and groups == {1, 2}
    # Room for both numbers of slots, so nothing speaks for two.
    assert cache.session.config.slots == 3


def _seen(layout: Layout, phase: str, groups: set[int]) -> Layout:
    if phase == "prefill":
        groups.add(layout.head_group)
    return layout


@pytest.mark.parametrize("heads", [(8, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("dims", [(128, 128), (80, 48)])
@pytest.mark.parametrize("hidden", [False, True])
def test_one_kernel_attends_tail_and_resident_blocks(
    heads: tuple[int, int], dims: tuple[int, int], hidden: bool
) -> None:
    from headinfer_compile.runtime.paged_triton import attend_paged

    torch.manual_seed(torch.seed() % 2**31)
    (num_heads, kv_heads), (dim, v_dim), batch = heads, dims, 2
    geometry = Geometry(1, batch, kv_heads, dim, v_dim, torch.float32, torch.device(DEVICE))
    capacity, rows = [128, 64, 512], [128, 37, 301]
    pages = [
        kv_views(torch.randn(kv_heads * batch * t * (dim + v_dim), device=DEVICE), geometry,
                 kv_heads, t)
        for t in capacity
    ]  # fmt: skip
    visible = torch.ones(batch, 512, dtype=torch.int8, device=DEVICE)
    visible[0, 3:200] = 0
    q = torch.randn(batch, num_heads, 1, dim, device=DEVICE)
    out, lse = attend_paged(
        q,
        torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in pages], device=DEVICE),
        torch.tensor(capacity, dtype=torch.int32, device=DEVICE),
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        visible if hidden else None,
        num_kv_heads=kv_heads,
        v_head_dim=v_dim,
        scale=dim**-0.5,
        dtype=torch.float32,
    )
    k, v = (
        torch.cat(
            [page[i][:, :, :r].transpose(0, 1) for page, r in zip(pages, rows, strict=True)], 2
        )
        .repeat_interleave(num_heads // kv_heads, 1)
        .double()
        for i in (0, 1)
    )
    scores = q.double() @ k.transpose(2, 3) * dim**-0.5
    if hidden:
        scores[..., 165:] += torch.log(visible[:, None, None, :301].double())
    expected = scores.softmax(-1) @ v
    assert (out - expected).norm() / expected.norm() < 1e-5
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [0, "1GiB"])
def test_a_decode_step_never_waits_for_the_device(budget: int | str) -> None:
    seed = torch.seed() % 2**31
    model, ids = model_on_gpu(seed), prompt(seed, 520)
    model.compile(backend=headinfer, options={"lowering": "eager"})
    cache = HeadInferCache(model.config, gpu_budget=budget, page_tokens=64, tail_tokens=32)
    decode(model, cache, ids[:, :500])
    for at in range(500, 510):
        decode(model, cache, ids[:, at : at + 1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(510, 515):
            decode(model, cache, ids[:, at : at + 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_device_memory_does_not_grow_with_the_context() -> None:
    model = model_on_gpu(3, torch.bfloat16)
    model.compile(backend=headinfer, options={"lowering": "eager"})
    fixed, held = [], []
    # The first run also allocates what kernels keep, such as the workspace of cuBLAS.
    for tokens in (1024, 1024, 65536):
        cache = HeadInferCache(model.config, gpu_budget=0)
        before = torch.cuda.memory_allocated()
        ids = prompt(tokens, tokens)
        for start in range(0, tokens, 1024):
            decode(model, cache, ids[:, start : start + 1024])
        decode(model, cache, ids[:, :1])
        held.append(torch.cuda.memory_allocated() - before - ids.nbytes)
        fixed.append(cache.stats().fixed_bytes)
        cache.close()
        del cache, ids
    assert fixed[1] == fixed[2]
    assert abs(held[1] - held[2]) < 2**20, held


def test_a_mask_of_ones_runs_the_causal_kernels() -> None:
    model, ids = model_on_gpu(5, torch.bfloat16), prompt(5, 400)
    model.compile(backend=headinfer, options={"lowering": "eager"})
    cache = HeadInferCache(model.config, gpu_budget=0, page_tokens=64, tail_tokens=16)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        prefill_chunk_size=128,
    )
    chosen = cache.session.kernels
    assert chosen
    assert not any(request.masked for request in chosen if request.query == "many")


def test_bf16_is_as_close_to_fp32_as_resident_kernels_are() -> None:
    seed = torch.seed() % 2**31
    exact, ids = model_on_gpu(seed), prompt(seed, 600)
    with torch.no_grad():
        reference = exact(input_ids=ids).logits
        model = exact.to(torch.bfloat16)
        spread = []
        for kernel in ("flash_attention", "math"):
            backend = torch.nn.attention.SDPBackend.__members__[kernel.upper()]
            with torch.nn.attention.sdpa_kernel(backend):
                spread.append((model(input_ids=ids).logits.float() - reference).norm())
    model.compile(backend=headinfer, options={"lowering": "eager"})
    cache = HeadInferCache(model.config, gpu_budget=0, page_tokens=64, tail_tokens=16)
    parts = [decode(model, cache, ids[:, at : at + 150]) for at in range(0, 600, 150)]
    error = (torch.cat(parts, 1).float() - reference).norm()
    assert error <= 1.1 * max(spread), f"seed {seed}: {error} against {spread}"


def test_a_real_model_gives_the_resident_tokens() -> None:
    """SmolLM2-135M in fp32: 64 greedy tokens after 2,000 tokens of English."""
    try:
        source = demo_source()
    except HeadInferError as error:
        pytest.skip(str(error))
    model: Any = load_model(source, dtype="float32", device=DEVICE)
    text = "\n".join(topics[name] for name in ("execmodel", "import", "naming", "objects"))
    ids = load_tokenizer(source)(text, return_tensors="pt")["input_ids"][:, :2000].to(DEVICE)
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = model.generate(ids, **how)
    for chunk, budget, options in (
        (1000, 0, {}),
        (256, 0, {"lowering": "eager", "num_slots": 2}),
        (2000, "60MB", {"lowering": "eager", "head_group": 2}),
        (1000, "1GiB", {"lowering": "eager", "cuda_graphs": True}),
    ):
        torch._dynamo.reset()
        model.compile(backend=headinfer, options=options)
        with HeadInferCache(model.config, gpu_budget=budget, tail_tokens=64) as cache:
            found = model.generate(ids, past_key_values=cache, prefill_chunk_size=chunk, **how)
            stats = cache.stats()
        assert torch.equal(found, expected), (chunk, budget, options)
        assert (stats.sites_rewritten, stats.eager_updates) == (30, 0)
        assert stats.materialised_layers == 0
        assert (stats.h2d_bytes > 0) == (budget != "1GiB")


def test_autocast_gives_what_a_resident_run_under_autocast_gives() -> None:
    seed = torch.seed() % 2**31
    model, ids = model_on_gpu(seed), prompt(seed, 600)
    with torch.no_grad():
        exact = model(input_ids=ids).logits
    runs = []
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.__members__[name]):
                runs.append(model(input_ids=ids).logits.float())
    model.compile(backend=headinfer, options={"lowering": "eager"})
    cache = HeadInferCache(model.config, gpu_budget=0, page_tokens=64, tail_tokens=16)
    with torch.autocast("cuda", torch.bfloat16):
        parts = [decode(model, cache, ids[:, at : at + 150]) for at in range(0, 600, 150)]
    error = (torch.cat(parts, 1).float() - exact).norm()
    assert error <= 1.1 * max((run - exact).norm() for run in runs), f"seed {seed}"
    assert cache.session.geometry is not None
    assert cache.session.geometry.dtype == torch.bfloat16
    assert cache.stats().materialised_layers == 0
