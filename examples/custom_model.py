"""A decoder written by hand, without transformers, on ``HeadInferCache.from_shape``.

The only thing it does for the cache is what any model does: ``cache.update(k, v, layer)`` before
the attention. The same weights run with a list of tensors for a cache, and the tokens are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headinfer_compile import HeadInferCache

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 257, 128, 4, 8, 2, 16


class Cache(Protocol):
    """What the model asks of a cache."""

    def update(self, k: Tensor, v: Tensor, layer: int, /) -> tuple[Tensor, Tensor]: ...

    def get_seq_length(self) -> int: ...


class ListCache:
    """K and V of every layer as tensors ``[1, Hkv, S, D]`` on the device."""

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to a layer and return all of it."""
        if layer == len(self.kv):
            self.kv.append((k, v))
        else:
            old_k, old_v = self.kv[layer]
            self.kv[layer] = (torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2))
        return self.kv[layer]

    def get_seq_length(self) -> int:
        """Tokens held by the layer that is written last."""
        return self.kv[-1][0].shape[2] if len(self.kv) == LAYERS else 0


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of ``x [1, H, n, D]`` at ``positions [n]``."""
    rates = 10_000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=x.device)
    angles = positions[:, None] * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Block(nn.Module):
    """Grouped-query attention and a gated MLP, each behind a norm."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.up, self.gate = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """From ``x [1, n, WIDTH]`` to the same shape."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = rotate(q, positions), rotate(k, positions)
        k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Decoder(nn.Module):
    """Token ids ``[1, n]`` and a cache in, logits ``[1, n, VOCAB]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """One step: the new tokens attend those in the cache and themselves."""
        past, n = cache.get_seq_length(), ids.shape[1]
        positions = torch.arange(past, past + n, device=ids.device)
        # One query sees everything. More of them: key j is seen by query i if j <= past + i.
        mask = None
        if n > 1:
            mask = torch.arange(past + n, device=ids.device)[None, :] <= positions[:, None]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, positions, mask, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits


def greedy(
    model: Callable[[Tensor, Cache], Tensor], prompt: Tensor, cache: Cache, chunk: int, new: int
) -> list[int]:
    """The likeliest ``new`` tokens after ``prompt [1, S]``."""
    tokens: list[int] = []
    with torch.no_grad():
        for piece in prompt.split(chunk, dim=1):
            logits = model(piece, cache)
        for _ in range(new):
            token = logits[:, -1:].argmax(-1)
            tokens.append(int(token))
            logits = model(token, cache)
    return tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=1000, help="tokens of the random prompt")
    options.add_argument("--chunk", type=int, default=256)
    options.add_argument("--max-new-tokens", type=int, default=16)
    options.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    args = options.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Decoder().to(device)
    prompt = torch.randint(VOCAB, (1, args.tokens), device=device)
    expected = greedy(model, prompt, ListCache(), args.chunk, args.max_new_tokens)

    compiled = torch.compile(model, backend="headinfer", options={"lowering": args.lowering})
    cache = HeadInferCache.from_shape(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32,
        gpu_budget=0, page_tokens=64, tail_tokens=16, device=device,
    )  # fmt: skip
    with cache:
        tokens = greedy(compiled, prompt, cache, args.chunk, args.max_new_tokens)
        stats = cache.stats()
    print(f"tokens: {tokens}")
    print(
        f"{stats.sites_rewritten} of {LAYERS} attentions rewritten, "
        f"{stats.host_bytes:,} bytes in host pages, {stats.h2d_bytes:,} read from them"
    )
    same = tokens == expected and stats.materialised_layers == 0
    print("equal to the resident run" if same else "DIFFERENT from the resident run")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
