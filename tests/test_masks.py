"""Blocks of a mask, tiled, equal the mask; ranges hold every visible key."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from headinfer_compile.runtime.masks import (
    FALSE,
    TRUE,
    Expr,
    MaskForm,
    block_mask,
    const,
    load,
    make,
    visible_range,
)

B, H, Q, KV, PAST = (Expr(name) for name in ("b", "h", "q", "kv", "past"))


def cuts(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """Random pieces that cover ``[0, size)``."""
    inner = rng.sample(range(1, size), rng.randint(0, min(3, size - 1))) if size > 1 else []
    return list(itertools.pairwise([0, *sorted(inner), size]))


def tiled(
    form: MaskForm, inputs: list[Tensor], past: int, new: int, batch: int, heads: int, seed: int
) -> Tensor:
    """The whole mask, put together from the blocks of random cuts."""
    rng = random.Random(seed)
    rows = []
    for q_start, q_stop in cuts(rng, new):
        row = []
        for k_start, k_stop in cuts(rng, past + new):
            block = block_mask(
                form,
                inputs,
                past=past,
                new=new,
                q_start=q_start,
                q_stop=q_stop,
                k_start=k_start,
                k_stop=k_stop,
                device="cpu",
            )
            shape = (batch, heads, q_stop - q_start, k_stop - k_start)
            block = torch.ones((), dtype=torch.bool) if block is None else block
            assert block.numel() <= batch * heads * shape[2] * shape[3]
            row.append(block.expand(shape))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def positions(past: int, new: int) -> tuple[Tensor, Tensor]:
    return torch.arange(new)[:, None], torch.arange(past + new)[None, :]


@pytest.mark.parametrize("seed", range(60))
def test_arithmetic_and_padding_blocks_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    past, new, batch = rng.randint(0, 9), rng.randint(1, 7), rng.choice((1, 2, 3))
    window = rng.choice((None, 1, 2, 3, 5, 40))
    padding = rng.choice((None, 0))
    form = MaskForm(rng.random() < 0.7, window, padding)
    pad = torch.tensor([[rng.random() < 0.6 for _ in range(past + new + 2)] for _ in range(batch)])
    pad = pad.to(rng.choice((torch.bool, torch.int64)))
    q, kv = positions(past, new)
    expected = torch.ones(batch, 2, new, past + new, dtype=torch.bool)
    if form.causal:
        expected &= kv <= q + past
    if window is not None:
        expected &= kv > q + past - window
    if padding is not None:
        expected &= (pad[:, None, None, : past + new]) != 0
    got = tiled(form, [pad], past, new, batch, 2, seed)
    assert got.dtype == torch.bool
    assert torch.equal(got, expected), f"seed {seed}: {form}, past {past}, new {new}"
    for first in range(new):
        start, stop = visible_range(form, past=past, q_start=first, q_stop=new)
        outside = torch.ones(past + new, dtype=torch.bool)
        outside[start : min(stop, past + new)] = False
        assert not expected[:, :, first:, outside].any(), f"seed {seed}"


@pytest.mark.parametrize(
    ("form", "q", "k", "none"),
    [
        (MaskForm(), (0, 4), (0, 12), True),
        (MaskForm(causal=True), (0, 4), (0, 9), True),
        (MaskForm(causal=True), (0, 4), (0, 10), False),
        (MaskForm(causal=True), (3, 4), (0, 12), True),
        (MaskForm(window=8), (0, 4), (4, 12), True),
        (MaskForm(window=8), (0, 4), (3, 12), False),
        (MaskForm(causal=True, padding=0), (0, 4), (0, 4), False),
    ],
)
def test_none_exactly_when_arithmetic_shows_the_block(
    form: MaskForm, q: tuple[int, int], k: tuple[int, int], none: bool
) -> None:
    block = block_mask(
        form,
        [torch.ones(1, 12)],
        past=8,
        new=4,
        q_start=q[0],
        q_stop=q[1],
        k_start=k[0],
        k_stop=k[1],
        device="cpu",
    )
    assert (block is None) == none


def test_visible_range_of_window_and_causal() -> None:
    form = MaskForm(causal=True, window=3)
    assert visible_range(form, past=10, q_start=2, q_stop=5) == (10, 15)
    assert visible_range(MaskForm(causal=True), past=10, q_start=2, q_stop=5) == (0, 15)
    assert visible_range(MaskForm(), past=10, q_start=2, q_stop=5)[1] >= 10**9


@pytest.mark.parametrize("seed", range(12))
def test_loads_of_every_layout_equal_torch_indexing(seed: int) -> None:
    torch.manual_seed(seed)
    past, new = seed % 4, 1 + seed % 3
    total = past + new
    q, kv = positions(past, new)
    four = torch.randn(2, 3, new, total)
    keys_first = torch.randn(total + 1, new)
    slopes = torch.randn(3)
    groups = torch.randint(0, 3, (2, total))
    chunk = make("floordiv", KV, const(2))
    cases = [
        (load(0, (B, H, Q, KV)), four),
        (load(1, (make("add", KV, const(1)), Q)), keys_first[1:].T[None, None]),
        (
            make("mul", load(2, (H,)), make("sub", KV, make("add", Q, PAST))),
            slopes[:, None, None] * (kv - (q + past)),
        ),
        (
            make("eq", load(3, (B, KV)), load(3, (B, make("add", Q, PAST)))),
            (groups[:, None, :] == groups[:, past:, None])[:, None],
        ),
        (load(3, (B, make("sub", KV, const(1)))), groups.roll(1, 1)[:, None, None]),
        (load(3, (B, chunk)), groups[:, kv[0] // 2][:, None, None]),
        (load(3, (const(-1), make("min", KV, PAST))), groups[1, kv[0].clamp(max=past)]),
        (make("or", make("not", FALSE), make("ge", Q, KV)), torch.tensor(True)),
        (
            make("where", make("le", KV, Q), Expr("cast", (Q, "float32")), const(-1.0)),
            torch.where(kv <= q, q.float(), -1.0),
        ),
    ]
    for expr, expected in cases:
        got = tiled(MaskForm(expr=expr), [four, keys_first, slopes, groups], past, new, 2, 3, seed)
        wanted = expected.expand(2, 3, new, total)
        assert torch.equal(got, wanted), f"seed {seed}: {expr}"


def test_too_short_a_padding_tensor_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="dimension of 5"):
        block_mask(
            MaskForm(padding=0),
            [torch.ones(1, 5)],
            past=4,
            new=2,
            q_start=0,
            q_stop=2,
            k_start=4,
            k_stop=6,
            device="cpu",
        )


def test_forms_are_keys_and_formulas_are_not() -> None:
    one = MaskForm(causal=True, window=4, formula="a")
    assert {one: 1}[MaskForm(causal=True, window=4)] == 1
    assert one != MaskForm(causal=True, window=5)
    expr = make("and", make("le", KV, Q), load(0, (B, KV)))
    assert {MaskForm(expr=expr): 1}[MaskForm(expr=make("and", *expr.args))] == 1
    assert str(expr) == "(kv <= q) and m0[b, kv]"


def test_properties_tell_what_old_tokens_need() -> None:
    assert MaskForm().is_full
    assert not MaskForm(causal=True).is_full
    assert MaskForm(causal=True, padding=0).is_causal_square
    assert not MaskForm(causal=True, window=8).is_causal_square
    assert not MaskForm(causal=True, window=8).sees_all_past
    assert MaskForm().sees_all_past
    assert not MaskForm().is_causal_square
    assert not MaskForm(causal=True, expr=TRUE).is_causal_square
    assert MaskForm(padding=0).reads_data
    assert MaskForm(expr=load(0, (B, KV))).reads_data
    assert not MaskForm(expr=make("lt", KV, Q)).reads_data
    bare = MaskForm(causal=True, window=8, padding=0).without_padding()
    assert bare == MaskForm(causal=True, window=8)
    assert bare.formula == "kv <= q + past and kv > q + past - 8"
