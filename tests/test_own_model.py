"""A model that is not from transformers needs nothing of ours but a cache of its shape.

Its own rope, its own layer loop, its own greedy loop; it calls ``scaled_dot_product_attention`` in
one layer and writes attention out in the other.

Legend: B batch, H query heads, Hkv KV heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_harness import ResidentCache
from harness import clean_dynamo
from headinfer_compile import HeadInferCache, headinfer

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, LAYERS = 61, 48, 6, 2, 8, 2


class Block(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=True)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.slopes = nn.Parameter(torch.linspace(0.01, 0.1, HEADS))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], past: int, cache: Any) -> Tensor:
        batch, new, _ = x.shape
        qkv = self.qkv(F.layer_norm(x, (WIDTH,))).view(batch, new, -1, DIM).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        k, v = cache.update(turn(k, *rope), v, self.index)
        total = past + new
        kv = torch.arange(total)
        seen = kv <= torch.arange(new)[:, None] + past
        if self.index == 0:
            a = F.scaled_dot_product_attention(turn(q, *rope), k, v, seen, enable_gqa=True)
        else:
            # ALiBi and a soft cap, written out; K and V are repeated over their groups.
            k, v = (
                y[:, :, None].expand(batch, KV_HEADS, HEADS // KV_HEADS, total, DIM)
                .reshape(batch, HEADS, total, DIM)
                for y in (k, v)
            )  # fmt: skip
            scores = 3.0 * torch.tanh(turn(q, *rope) @ k.transpose(-1, -2) / 6.0)
            scores = scores + self.slopes[None, :, None, None] * kv
            a = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(batch, new, -1))
        gate, value = self.up(F.layer_norm(x, (WIDTH,))).chunk(2, dim=-1)
        result: Tensor = x + self.down(F.silu(gate) * value)
        return result


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of ``[B, H, n, D]`` as complex numbers, interleaved."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class OwnModel(nn.Module):
    """A decoder in twenty lines."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(index) for index in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        past, new = cache.get_seq_length(), ids.shape[1]
        angles = (torch.arange(new) + past)[:, None] / 100 ** (torch.arange(DIM // 2) / DIM * 2)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), past, cache)
        logits: Tensor = self.head(F.layer_norm(x, (WIDTH,)))
        return logits


class OwnCache:
    """The model's own cache: one resident cache a layer."""

    def __init__(self) -> None:
        self.layers = [ResidentCache() for _ in range(LAYERS)]

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.layers[-1].kv)

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer].update(k, v, layer)


def greedy(model: Any, ids: Tensor, cache: Any, chunk: int, new: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, new]`` and the logits that chose them ``[B, new, vocab]``."""
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            logits = model(part, cache)[:, -1:]
        found = [logits]
        for _ in range(new - 1):
            found.append(model(found[-1].argmax(-1), cache))
    all_logits = torch.cat(found, dim=1)
    return all_logits.argmax(-1), all_logits


def test_a_model_of_ones_own(seed: int) -> None:
    torch.manual_seed(seed)
    model = OwnModel().eval()
    ids = torch.randint(0, VOCAB, (2, 161))
    tokens, logits = greedy(model, ids, OwnCache(), 161, 24)
    cache = HeadInferCache.from_shape(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32,
        gpu_budget=0, page_tokens=16, tail_tokens=8,
    )  # fmt: skip
    with clean_dynamo():
        compiled = torch.compile(model, backend=headinfer, options={"lowering": "eager"})
        found, found_logits = greedy(compiled, ids, cache, 70, 24)
    assert float((found_logits - logits).abs().max()) <= 1e-4
    assert torch.equal(found, tokens)
    stats = cache.stats()
    assert stats.tokens == 184
    assert stats.sites_rewritten == LAYERS
    assert stats.h2d_bytes > 0
    assert stats.eager_updates == stats.materialised_layers == 0
