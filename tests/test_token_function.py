"""K and V computed of cached rows: what is streamed stays compressed, and pieces join exactly.

Legend: B batch, H heads, n new tokens, R width of a cached latent, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attention_harness import Program, ResidentCache, causal_mask, found
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.runtime.expand import TokenFunction, rows_within

HEADS, LATENT, ROPE, NOPE, V_DIM = 6, 10, 4, 8, 5
WEIGHT = torch.randn(HEADS * (NOPE + V_DIM), LATENT, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def latent_attention(cache: Any, q: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    """Expand latents as models do: a projection, a split, and K filled in place."""
    latents, ropes = cache.update(latent, rope, 0)
    batch, _, total, _ = latents.shape
    expanded = F.linear(latents, WEIGHT).view(batch, total, -1, NOPE + V_DIM).transpose(1, 2)
    k_nope, values = torch.split(expanded, [NOPE, V_DIM], dim=-1)
    keys = expanded.new_empty(batch, HEADS, total, NOPE + ROPE)
    keys[..., :NOPE].copy_(k_nope)
    keys[..., NOPE:].copy_(ropes.expand(-1, HEADS, -1, -1))
    return sdpa(q, keys, values, attn_mask=causal_mask(q, keys), scale=0.3)


def joined(cache: Any, q: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    """The same by concatenation, with a norm of each row, in another layout."""
    latents, ropes = cache.update(latent, rope, 0)
    batch, _, total, _ = latents.shape
    latents = latents * 0.5 + 0.1
    expanded = F.linear(latents.squeeze(1)[:, None], WEIGHT)
    expanded = expanded.reshape(batch, total, HEADS, -1).permute(0, 2, 1, 3)
    ropes = ropes.expand(batch, HEADS, total, ROPE)
    keys = torch.cat([expanded[..., :NOPE], ropes.tanh()], dim=-1)
    return sdpa(q, keys, expanded[..., NOPE:], causal_mask(q, keys))


def positional(cache: Any, q: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    latents, ropes = cache.update(latent, rope, 0)
    latents = latents * torch.arange(latents.shape[2])[None, None, :, None]
    keys = torch.cat([latents[..., :NOPE], ropes], dim=-1)
    return sdpa(q, keys.expand(-1, HEADS, -1, -1), latents.expand(-1, HEADS, -1, -1))


def mixing(cache: Any, q: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    latents, ropes = cache.update(latent, rope, 0)
    latents = latents.cumsum(2)
    keys = torch.cat([latents[..., :NOPE], ropes], dim=-1)
    return sdpa(q, keys.expand(-1, HEADS, -1, -1), latents.expand(-1, HEADS, -1, -1))


def partial(cache: Any, q: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    latents, ropes = cache.update(latent, rope, 0)
    keys = torch.cat([latents[..., :NOPE], ropes], dim=-1)[:, :, 1:]
    values = latents[:, :, 1:].expand(-1, HEADS, -1, -1)
    return sdpa(q, keys.expand(-1, HEADS, -1, -1), values)


def inputs(seed: int, new: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, NOPE + ROPE), (1, LATENT), (1, ROPE))
    q, k, v = (torch.randn(batch, h, new, d, generator=generator) for h, d in shapes)
    return q, k, v


def caches() -> tuple[HeadInferCache, ResidentCache]:
    cache = HeadInferCache.from_shape(
        num_layers=1, num_kv_heads=1, head_dim=LATENT, v_head_dim=ROPE, dtype=torch.float32,
        gpu_budget=0, page_tokens=8, tail_tokens=4,
    )  # fmt: skip
    return cache, ResidentCache()


@pytest.mark.parametrize("workspace", [1 << 28, 4096])
@pytest.mark.parametrize("program", [latent_attention, joined])
def test_expanded_per_block_and_exact(seed: int, program: Program, workspace: int) -> None:
    options: dict[str, Any] = {"lowering": "eager", "workspace_bytes": workspace}
    compiled = torch.compile(program, backend=headinfer, options=options)
    cache, resident = caches()
    for step, new in enumerate((70, 90, 1, 1, 9, 1)):
        qkv = inputs(seed + step, new)
        torch.testing.assert_close(
            compiled(cache, *qkv), program(resident, *qkv), rtol=1e-4, atol=1e-4
        )
    stats = cache.stats()
    assert stats.eager_updates == stats.materialised_layers == 0
    assert stats.sites_rewritten == 1
    # The compressed row is what is stored and moved: H times (D + Dv) would be 7 times as much.
    assert stats.kv_bytes == 172 * 2 * (LATENT + ROPE) * 4
    assert 0 < stats.d2h_bytes <= stats.kv_bytes


def test_piece_sizes() -> None:
    expand = TokenFunction("", (), 6, lambda k, v, rows: (k, v))
    assert rows_within(1 << 20, expand, 2, 20, 4) == (1 << 20) // (2 * 6 * 20 * 4) // 16 * 16
    assert rows_within(1, expand, 2, 20, 4) == 16


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (positional, "depends on the positions of cached tokens"),
        (mixing, "(cumsum) may mix cached tokens"),
        (partial, "takes some of the cached tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_declined_and_exact(seed: int, program: Program, reason: str) -> None:
    compiled = torch.compile(program, backend=headinfer, options={"lowering": "eager"})
    cache, resident = caches()
    for step, new in enumerate((20, 9, 1)):
        qkv = inputs(seed + step, new)
        torch.testing.assert_close(
            compiled(cache, *qkv), program(resident, *qkv), rtol=1e-4, atol=1e-4
        )
    assert cache.stats().materialised_layers == 1
    assert cache.stats().sites_rewritten == 0
    torch._dynamo.reset()
    declines = found(program, make=lambda: (caches()[0], inputs(0, 7)))[1].declines
    assert reason in declines[0].reason
