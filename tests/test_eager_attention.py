"""Attention written out by hand becomes a site, and its scores are never made.

Legend: B batch, Hq query heads, Hkv KV heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_harness import (
    DIM,
    HEADS,
    LargestTensor,
    Program,
    assert_exact,
    causal_mask,
    found,
    inputs,
    offloaded,
    repeat_kv,
)
from headinfer_compile import headinfer

LOWEST = torch.finfo(torch.float32).min
SINKS = torch.linspace(-1.0, 2.0, HEADS)
SLOPES = torch.linspace(0.01, 0.2, HEADS)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def keys_and_values(cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All K, transposed, and all V, repeated over the GQA group."""
    keys, values = cache.update(k, v, 0)
    return repeat_kv(keys).transpose(2, 3), repeat_kv(values)


def additive(q: Tensor, keys: Tensor, hidden: float = LOWEST) -> Tensor | float:
    mask = causal_mask(q, keys.transpose(2, 3))
    return torch.zeros(1) if mask is None else torch.where(mask, 0.0, hidden)


def plain(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    scores = torch.matmul(q, keys) / math.sqrt(DIM)
    scores = scores + additive(q, keys)
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, False)
    return torch.matmul(weights, values)


def soft_capped(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    scores = torch.tanh(q @ keys * 0.3 / 0.7) * 0.7 + additive(q, keys)
    result: Tensor = scores.softmax(-1) @ values
    return result


def with_sinks(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    scores = torch.matmul(q, keys) * 0.4 + additive(q, keys)
    column = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    logits = torch.cat([scores, column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(logits, dim=-1)[..., :-1].to(values.dtype), values)


def filled(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    scores = q @ keys
    mask = causal_mask(q, keys.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    result: Tensor = torch.softmax(scores, 3) @ values
    return result


def biased(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias a head and key before the scale, in place, and a mask after it."""
    keys, values = keys_and_values(cache, k, v)
    bias = SLOPES[None, :, None, None] * torch.arange(keys.shape[3])
    scores = q @ keys
    scores = scores + bias
    scores *= 0.5
    result: Tensor = F.softmax(scores + additive(q, keys), dim=-1) @ values
    return result


def biased_sinks_cap(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything at once."""
    keys, values = keys_and_values(cache, k, v)
    bias = SLOPES[None, :, None, None] * torch.arange(keys.shape[3])
    scores = torch.tanh(q @ keys / 2.0) * 2.0 + bias + additive(q, keys)
    column = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    result: Tensor = weights @ values
    return result


EXACT: list[tuple[Program, float, float | None, bool]] = [
    (plain, DIM**-0.5, None, False),
    (soft_capped, 0.3, 0.7, False),
    (with_sinks, 0.4, None, True),
    (filled, 1.0, None, False),
    (biased, 0.5, None, False),
    (biased_sinks_cap, 1.0, 2.0, True),
]


@pytest.mark.parametrize(("program", "scale", "cap", "sinks"), EXACT)
def test_found_and_exact(
    seed: int, program: Program, scale: float, cap: float | None, sinks: bool
) -> None:
    _, ctx = found(program)
    assert ctx.declines == []
    (site,) = ctx.sites
    assert (site.num_heads, site.num_kv_heads, site.head_dim) == (HEADS, 3, DIM)
    assert site.scale == pytest.approx(scale)
    assert (site.soft_cap is None) == (cap is None)
    assert cap is None or site.soft_cap == pytest.approx(cap)
    assert (site.sinks is not None) == sinks
    assert_exact(program, seed)


@pytest.mark.parametrize("program", [plain, soft_capped, with_sinks])
def test_scores_are_never_made(seed: int, program: Program) -> None:
    """No tensor of new x all tokens, of any head, not even for the mask."""
    compiled = torch.compile(program, backend=headinfer, options={"lowering": "eager"})
    cache = offloaded()
    for step, new in enumerate((64, 96, 128)):
        qkv = inputs(seed + step, new, batch=1)
        compiled(cache, *qkv)
    assert cache.stats().sites_rewritten == 1
    old, new = 288, 96
    qkv = inputs(seed, new, batch=1)
    largest = LargestTensor()
    # Within the call: Dynamo runs nothing that it compiled under a dispatch mode of the caller.
    cache.session.around_call = lambda: largest
    compiled(cache, *qkv)
    assert cache.stats().eager_updates == 0
    # The scores of one head over one KV block of 8-token pages are far below.
    assert 0 < largest.elements < new * (old + new)
    with LargestTensor() as resident:
        program(_Grown(inputs(seed, old, batch=1)), *qkv)
    assert resident.elements >= HEADS * new * (old + new)


class _Grown:
    """A cache that holds some tokens already."""

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        self.kv = qkv[1:]

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([self.kv[0], k], 2), torch.cat([self.kv[1], v], 2)


def reads_weights(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    weights = (q @ keys).softmax(-1)
    result: Tensor = weights @ values + weights.mean()
    return result


def other_function(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    result: Tensor = (q @ keys).relu().softmax(-1) @ values
    return result


def learned_scale(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    result: Tensor = (q @ keys * SINKS[None, :, None, None]).softmax(-1) @ values
    return result


def over_queries(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    result: Tensor = (q @ keys).softmax(-2) @ values
    return result


def mask_under_cap(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    result: Tensor = torch.tanh(q @ keys + additive(q, keys, -3.0)).softmax(-1) @ values
    return result


def token_dependent_sink(cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = keys_and_values(cache, k, v)
    logits = torch.cat([q @ keys, q[..., :1]], dim=-1)
    result: Tensor = logits.softmax(-1)[..., :-1] @ values
    return result


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (reads_weights, "its scores are also read by"),
        (other_function, "changes its scores"),
        (learned_scale, "scales its scores by no constant"),
        (over_queries, "is no attention that this pass knows"),
        (mask_under_cap, "changes its scores"),
        (token_dependent_sink, "its sinks have the shape"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_declined_and_exact(seed: int, program: Program, reason: str) -> None:
    _, ctx = found(program)
    assert ctx.sites == []
    assert reason in ctx.declines[0].reason
    assert __file__ in ctx.declines[0].source
    assert_exact(program, seed, rewritten=False)
