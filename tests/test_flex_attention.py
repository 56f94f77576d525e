"""``flex_attention``: read with its functions of score and mask, equal to the same by sdpa.

Legend: B batch, Hq query heads, n new tokens, S all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionMaskInterface, AutoModelForCausalLM, Gemma2Config
from transformers.masking_utils import flex_attention_mask

from attention_harness import (
    DIM,
    HEADS,
    LargestTensor,
    Program,
    ResidentCache,
    called,
    found,
    inputs,
    offloaded,
)
from harness import (
    VOCAB,
    CompiledModel,
    assert_same,
    clean_dynamo,
    dynamo_graphs,
    generate,
    tiny_llama,
    tiny_mistral,
)
from headinfer_compile import flex_masks, headinfer
from headinfer_compile.flex_masks import block_mask, register_block_masks
from headinfer_compile.passes.graph_utils import in_vmap_machinery

ATTENTION = torch.ops.headinfer.attention.default
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_dynamo(), torch.no_grad():
        yield


def tiny_gemma2(seed: int, window: int) -> Any:
    """A random model with a soft cap and a window in its first layer; sdpa has no soft cap."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        max_position_embeddings=2048, initializer_range=0.25, sliding_window=window,
        attn_logit_softcapping=3.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


SLOW = pytest.mark.slow
CAUSAL = "kv <= q + past"
MODELS: dict[str, tuple[Callable[[int], Any], list[str]]] = {
    "llama": (lambda seed: tiny_llama(seed, heads=4, kv_heads=2), [CAUSAL, CAUSAL]),
    "mistral": (lambda seed: tiny_mistral(seed, 11), [f"{CAUSAL} and kv > q + past - 11"] * 2),
    "gemma2": (lambda seed: tiny_gemma2(seed, 11), [f"{CAUSAL} and kv > q + past - 11", CAUSAL]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gemma2" else SLOW) for name in MODELS]
)
def test_models_by_flex_equal_resident_ones(name: str, seed: int) -> None:
    make, formulas = MODELS[name]
    compiled = CompiledModel(make(seed), attention="flex_attention")
    ids, oracle = compiled.prompt(seed, 53, 12)
    cache = compiled.cache()
    assert_same(generate(compiled.model, ids, cache, 12, prefill_chunk_size=24), oracle)
    compiled.assert_streamed(cache)
    # Chunks, decode: the block masks of transformers are traced with lengths as symbols.
    assert dynamo_graphs() == 2
    for graph in compiled.graphs:
        assert not graph.report.declines
        forms = [site.mask.formula for site in graph.sites if site.mask is not None]
        # transformers 5.17 passes a padding mask of ones to the model.
        assert [form.removesuffix(" and m0[b, kv]") for form in forms] == formulas
        # Nothing is left of the block masks, which hold a mask of new x all tokens.
        for module in graph.graph_module.modules():
            nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
            assert not any(in_vmap_machinery(node) for node in nodes)
            assert not any("argsort" in str(node.target) for node in nodes)


@SLOW
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padded_rows_by_flex_equal_resident_ones(options: dict[str, Any], seed: int) -> None:
    compiled = CompiledModel(tiny_llama(seed, heads=4, kv_heads=2), attention="flex_attention")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    ids, oracle = compiled.prompt(seed, 40, 10, batch=2, attention_mask=mask, **options)
    cache = compiled.cache()
    run = generate(compiled.model, ids, cache, 10, attention_mask=mask, **options)
    assert_same(run, oracle)
    compiled.assert_streamed(cache)
    assert not any(graph.report.declines for graph in compiled.graphs)


def test_block_masks_are_registered_and_restored() -> None:
    assert AttentionMaskInterface()["flex_attention"] is block_mask
    AttentionMaskInterface.register("flex_attention", flex_attention_mask)
    restore = register_block_masks()
    assert AttentionMaskInterface()["flex_attention"] is block_mask
    restore()
    assert AttentionMaskInterface()["flex_attention"] is flex_attention_mask
    register_block_masks()


def test_outside_a_trace_transformers_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(flex_masks, "flex_attention_mask", lambda *args, **_: calls.append(args))
    block_mask(2, 3, 8, q_offset=5)
    assert calls[0][:4] == (2, 3, 8, 5)


# -- the operator, without a model --------------------------------------------------------------


def causal(q: Tensor, keys: Tensor) -> MaskMod:
    past = keys.shape[2] - q.shape[2]
    return lambda b, h, i, j: j <= i + past


def attend(
    score_mod: Any = None, mask_mod: Callable[[Tensor, Tensor], MaskMod] | None = causal,
    result: Callable[[Any], Any] = lambda out: out, **options: Any,
) -> Program:  # fmt: skip
    """A program with one ``flex_attention`` over the cache."""

    def program(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = cache.update(k, v, 0)
        mask = options.get("block_mask")
        if mask_mod is not None:
            sizes = (q.shape[0], HEADS, q.shape[2], keys.shape[2])
            mask = create_block_mask(mask_mod(q, keys), *sizes, device="cpu")
        given = {**options, "block_mask": mask, "score_mod": score_mod, "enable_gqa": True}
        return result(flex_attention(q, keys, values, **given))

    return program


@pytest.mark.parametrize(
    ("score_mod", "factor", "soft_cap"),
    [
        (None, 1.0, None),
        (lambda s, b, h, i, j: s, 1.0, None),
        (lambda s, b, h, i, j: 0.5 * s * 3.0, 1.5, None),
        (lambda s, b, h, i, j: 7.0 * torch.tanh(s / 7.0), 1.0, 7.0),
        (lambda s, b, h, i, j: torch.tanh(s * 0.25) * 8.0, 2.0, 8.0),
    ],
)
def test_a_score_may_have_a_factor_and_a_soft_cap(
    score_mod: Any, factor: float, soft_cap: float | None
) -> None:
    gm, ctx = found(attend(score_mod, mask_mod=None))
    assert not ctx.declines
    assert len(called(gm, ATTENTION)) == 1
    (site,) = ctx.sites
    assert site.soft_cap == soft_cap
    assert site.scale == pytest.approx(factor * DIM**-0.5, rel=1e-12)


def test_without_a_block_mask_every_key_is_seen() -> None:
    gm, ctx = found(attend(mask_mod=None, scale=0.5))
    (node,) = called(gm, ATTENTION)
    assert node.args[4] is None
    assert (ctx.sites[0].scale, ctx.sites[0].is_causal) == (0.5, False)


def test_an_lse_that_nothing_reads_is_no_hindrance() -> None:
    """As on CUDA, where transformers asks for it always and drops it."""
    program = attend(mask_mod=None, result=lambda out: (out[0], out[1].half())[0], return_lse=True)
    gm, ctx = found(program)
    assert not ctx.declines
    assert len(called(gm, ATTENTION)) == 1


def _reads_rows(q: Tensor, keys: Tensor) -> MaskMod:
    table = torch.ones(2, 5, dtype=torch.bool)
    return lambda b, h, i, j: (j <= i) & table[b].any()


def _listed_blocks() -> BlockMask:
    count, first = (
        torch.ones(1, 1, 1, dtype=torch.int32),
        torch.zeros(1, 1, 1, 1, dtype=torch.int32),
    )
    return BlockMask.from_kv_blocks(count, first, seq_lengths=(7, 7))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            attend(lambda s, b, h, i, j: s + 0.1 * j, None),
            "changes the scores by add",
        ),
        (attend(lambda s, b, h, i, j: -2.0 * torch.tanh(s), None), "its soft cap is -2.0"),
        (attend(mask_mod=_reads_rows), "its mask_mod calls getitem"),
        (attend(mask_mod=None, block_mask=_listed_blocks()), "without a function of the indices"),
        (attend(result=lambda out: out[0] * out[1][..., None], return_lse=True), "its LSE is used"),
    ],
    ids=["bias", "negative cap", "rows", "listed blocks", "lse"],
)
def test_what_else_it_may_do_is_declined(program: Program, reason: str) -> None:
    gm, ctx = found(program)
    assert not called(gm, ATTENTION)
    assert len(ctx.declines) == 1
    assert reason in ctx.declines[0].reason
    assert len(called(gm, torch.ops.headinfer.update_kv.default)) == 1


def _documents(q: Tensor, keys: Tensor) -> MaskMod:
    past = keys.shape[2] - q.shape[2]
    number = torch.arange(keys.shape[2]) // 13
    return lambda b, h, i, j: (j <= i + past) & ((number[i + past] == number[j]) | (j < 5 + b + h))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score_mod", "bias", "rewritten"),
    [(None, 0.0, True), (lambda s, b, h, i, j: s + 0.1 * j, 0.1, False)],
    ids=["site", "declined"],
)
def test_any_mask_function_is_exact(
    score_mod: Any, bias: float, rewritten: bool, seed: int
) -> None:
    compiled = torch.compile(
        attend(score_mod, _documents), backend=headinfer, options={"lowering": "eager"}
    )
    cache, resident = offloaded(), ResidentCache()
    for step, new in enumerate((40, 30, 1) if rewritten else (40, 1)):
        q, k, v = inputs(seed + step, new)
        keys, values = resident.update(k, v, 0)
        sizes = (q.shape[0], HEADS, new, keys.shape[2])
        indices = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        mask = torch.zeros(sizes).masked_fill(~_documents(q, keys)(*indices), -math.inf)
        mask = mask + bias * torch.arange(keys.shape[2])
        want = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(compiled(cache, q, k, v), want, rtol=1e-5, atol=1e-5)
    stats = cache.stats()
    assert stats.eager_updates == 0
    assert (stats.sites_rewritten, stats.materialised_layers) == (rewritten, not rewritten)
    assert stats.h2d_bytes > 0


def test_no_tensor_of_new_times_all_tokens_is_made(seed: int) -> None:
    def local(q: Tensor, keys: Tensor) -> MaskMod:
        past = keys.shape[2] - q.shape[2]
        return lambda b, h, i, j: (j <= i + past) & (j > i + past - 20)

    compiled = torch.compile(attend(None, local), backend=headinfer, options={"lowering": "eager"})
    cache = offloaded()
    qkv = inputs(seed, 256)
    for _ in range(2):
        compiled(cache, *qkv)
    largest = LargestTensor()
    # Within the call: Dynamo runs nothing that it compiled under a dispatch mode of the caller.
    cache.session.around_call = lambda: largest
    compiled(cache, *qkv)
    assert cache.stats().eager_updates == 0
    # In fp32 elements, of which a bool is a quarter.
    assert 0 < largest.elements < 256 * 768 // 4
