"""find_attention on small programs: what becomes a site, with which numbers, and what is declined.

Legend: B batch, Hq query heads, Hkv KV heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attention_harness import (
    DIM,
    HEADS,
    KV_HEADS,
    Program,
    assert_exact,
    called,
    causal_mask,
    found,
    inputs,
    offloaded,
    repeat_kv,
)
from headinfer_compile import headinfer
from headinfer_compile.errors import DeclinedError
from headinfer_compile.passes.context import META, AttentionSite
from headinfer_compile.passes.graph_utils import node_value

ATTENTION = torch.ops.headinfer.attention.default
FLASH_SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


FLASH3_SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, "
    "Tensor? qv=None, Tensor? cu_seqlens_q=None, Tensor? page_table=None, "
    "Tensor? leftpad_k=None, float? softmax_scale=None, bool causal=False, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, SymInt attention_chunk=0, "
    "float softcap=0.0, bool rotary_interleaved=True, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""Of the operator of the package for Hopper, what a call without variable lengths may name."""


def written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
    n, total = scores.shape[-2:]
    ahead = torch.arange(total) - (torch.arange(n)[:, None] + total - n)
    if causal:
        scores = scores.masked_fill(ahead > 0, float("-inf"))
    if left >= 0:
        scores = scores.masked_fill(ahead < -left, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1), q.new_empty(0), q.new_empty(2, dtype=torch.int64)


def flash2_forward(
    q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool, left: int, right: int,
    cap: float, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return written_out(q, k, v, scale, causal, left, cap)


def flash3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: None = None, v_new: None = None, qv: None = None,
    cu_seqlens_q: None = None, page_table: None = None, leftpad_k: None = None,
    softmax_scale: float | None = None, causal: bool = False, left: int = -1, right: int = -1,
    attention_chunk: int = 0, softcap: float = 0.0, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scale = softmax_scale if softmax_scale is not None else float(q.shape[-1] ** -0.5)
    return written_out(q, k, v, scale, causal, left, softcap)


@pytest.fixture
def flash() -> Iterator[None]:
    """``_flash_attn_forward`` of ``torch.ops.flash_attn`` and ``torch.ops.flash_attn_3``.

    The packages' operators, or their schemas with plain maths where a package is absent.
    """
    packages = {
        "flash_attn": ("flash_attn", FLASH_SCHEMA, flash2_forward),
        "flash_attn_3": ("flash_attn_interface", FLASH3_SCHEMA, flash3_forward),
    }
    libraries = []

    def fake(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)

    for namespace, (package, schema, forward) in packages.items():
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
            continue
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema)
        library.impl("_flash_attn_forward", forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::_flash_attn_forward", fake, lib=library)
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


def grouped(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    return sdpa(q, keys, values, attn_mask=causal_mask(q, keys), enable_gqa=True)


def repeated(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    mask = causal_mask(q, keys)
    return sdpa(q, repeat_kv(keys), repeat_kv(values).contiguous(), mask, scale=0.7)


def interleaving(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    values = values.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(v.shape[0], HEADS, -1, DIM)
    return sdpa(q, keys.repeat_interleave(2, dim=1), values, causal_mask(q, keys), scale=0.7)


def positional_is_causal(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    if keys.shape[2] == q.shape[2]:
        return sdpa(q, keys, values, None, 0.0, True, enable_gqa=True)
    return sdpa(q, keys, values, causal_mask(q, keys), 0.0, False, enable_gqa=True)


def unmasked(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    return sdpa(q, keys, values, enable_gqa=True)


def flash_program(**changed: Any) -> Program:
    """A program over the flash_attn operator with ``changed`` arguments."""
    options = {
        "dropout_p": 0.0, "softmax_scale": 0.4, "causal": True, "window_size_left": -1,
        "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
        **changed,
    }  # fmt: skip

    def program(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.transpose(1, 2) for x in cache.update(k, v, 0))
        op = torch.ops.flash_attn._flash_attn_forward
        out = op(q.transpose(1, 2), keys, values, **options)[0]
        result: Tensor = out.transpose(1, 2)
        return result

    return program


def flash3_program(**options: Any) -> Program:
    """A program over FlashAttention-3's operator with ``options``."""

    def program(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.transpose(1, 2) for x in cache.update(k, v, 0))
        op = torch.ops.flash_attn_3._flash_attn_forward
        result: Tensor = op(q.transpose(1, 2), keys, values, **options)[0].transpose(1, 2)
        return result

    return program


@pytest.mark.parametrize(
    ("program", "scale"),
    [
        (grouped, DIM**-0.5),
        (repeated, 0.7),
        (interleaving, 0.7),
        (positional_is_causal, DIM**-0.5),
        (unmasked, DIM**-0.5),
        (flash_program(), 0.4),
        (flash_program(causal=False), 0.4),
        (flash_program(window_size_left=7), 0.4),
        (flash_program(softcap=0.5, window_size_left=30, window_size_right=0), 0.4),
        (flash3_program(causal=True, num_splits=2), DIM**-0.5),
        (flash3_program(causal=True, window_size_left=7, softcap=0.5, softmax_scale=0.4), 0.4),
    ],
    ids=[
        "gqa",
        "repeat_kv",
        "interleave",
        "is_causal",
        "unmasked",
        "flash",
        "flash_full",
        "flash_window",
        "flash_cap",
        "flash3",
        "flash3_window_cap",
    ],
)
def test_found_and_exact(flash: Any, seed: int, program: Program, scale: float) -> None:
    gm, ctx = found(program)
    (node,) = called(gm, ATTENTION)
    assert not called(gm, torch.ops.headinfer.update_kv.default)
    assert ctx.declines == []
    site = node.meta[META]
    assert isinstance(site, AttentionSite)
    assert ctx.sites == [site]
    shape = (site.num_heads, site.num_kv_heads, site.head_dim, site.v_head_dim)
    assert shape == (HEADS, KV_HEADS, DIM, DIM)
    assert site.layer == site.index == 0
    assert site.scale == pytest.approx(scale)
    assert site.mask is None
    assert __file__ in site.source
    assert node.meta["example_value"].shape == (2, HEADS, 7, DIM)
    assert_exact(program, seed)


def test_nothing_else_is_left_or_lost() -> None:
    gm, _ = found(lambda cache, q, k, v: positional_is_causal(cache, q * 2, k, v) + 1)
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    # The cache's new length is computed too.
    nodes = [node for node in calls if isinstance(node_value(node), Tensor)]
    names = [getattr(node.target, "__name__", str(node.target)) for node in nodes]
    assert names == ["mul", "attention.default", "add"]
    assert nodes[1].args[1] is nodes[0]
    assert nodes[2].args[0] is nodes[1]


def dropout(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    return sdpa(q, keys, values, dropout_p=1e-12, enable_gqa=True)


def other_reader(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys: Tensor
    keys, values = cache.update(k, v, 0)
    return sdpa(q, keys, values, enable_gqa=True) + keys.mean()


def swapped(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    return sdpa(q, values, keys, enable_gqa=True)


def changed_keys(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    return sdpa(q, keys * 2, values, enable_gqa=True)


def no_attention(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache.update(k, v, 0)
    result: Tensor = q @ (repeat_kv(keys).transpose(2, 3) @ repeat_kv(values))
    return result


def interleaved(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Repeats heads in another order than grouped attention does."""
    keys, values = (torch.cat([x, x], 1) for x in cache.update(k, v, 0))
    return sdpa(q, keys, values)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (dropout, "dropout_p=1e-12 is not zero"),
        (other_reader, "K or V of the cache is also read by"),
        (swapped, "K and V of the cache are swapped"),
        (changed_keys, "its K or V is not the output of a HeadInferCache update"),
        (interleaved, "its K or V is not the output of a HeadInferCache update"),
        (no_attention, "is no attention that this pass knows"),
        (flash_program(causal=False, window_size_right=4), "reaches 4 tokens ahead"),
        (flash3_program(causal=True, attention_chunk=64), "its argument attention_chunk is 64"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_declined_and_exact(flash: Any, seed: int, program: Program, reason: str) -> None:
    gm, ctx = found(program)
    assert ctx.sites == []
    assert not called(gm, ATTENTION)
    decline = ctx.declines[0]
    assert reason in decline.reason
    assert decline.pass_name == "find_attention"
    assert __file__ in decline.source
    assert_exact(program, seed, rewritten=False)


@pytest.mark.parametrize("program", [dropout, other_reader, no_attention])
def test_strict_raises(program: Program) -> None:
    model = torch.compile(program, backend=headinfer, options={"lowering": "eager", "strict": True})
    with pytest.raises(DeclinedError, match=r"is left alone: .*test_find_attention\.py:\d+"):
        model(offloaded(), *inputs(0, 7))


def test_v_of_another_width(seed: int) -> None:
    """K and V need not have the same head dim."""

    def program(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.update(k, v[..., :5], 0)
        return sdpa(q, keys, values, attn_mask=causal_mask(q, keys), enable_gqa=True)

    gm, ctx = found(program)
    assert [(site.head_dim, site.v_head_dim) for site in ctx.sites] == [(DIM, 5)]
    (node,) = called(gm, ATTENTION)
    assert node.meta["example_value"].shape == (2, HEADS, 7, 5)
    assert_exact(program, seed)
