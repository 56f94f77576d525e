"""Masks of hand-made graphs: the proved form, or an expression, equals the mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headinfer_compile.errors import DeclinedError
from headinfer_compile.passes import recover_mask
from headinfer_compile.passes.context import META
from headinfer_compile.runtime.masks import Expr, MaskForm, load, make
from mask_harness import Capture, assert_same_mask, capture_masks, check

INF = float("inf")


def grid(past: int, new: int) -> tuple[Tensor, Tensor]:
    q = torch.arange(new)[None, None, :, None] + past
    return q, torch.arange(past + new)[None, None, None, :]


def arithmetic(test: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A mask of absolute query and key positions."""
    return lambda past, new: test(*grid(past, new)).expand(2, -1, new, past + new)


CAUSAL = MaskForm(causal=True)
PROVED = {
    "causal": (lambda q, kv: kv <= q, CAUSAL),
    "swapped": (lambda q, kv: q >= kv, CAUSAL),
    "strict": (lambda q, kv: kv < q + 1, CAUSAL),
    "negated": (lambda q, kv: ~(kv > q), CAUSAL),
    "method": (lambda q, kv: kv.sub(q).le(0).logical_not().logical_not(), CAUSAL),
    "function": (lambda q, kv: torch.le(torch.neg(q), torch.neg(kv)), CAUSAL),
    "implied": (lambda q, kv: (kv <= q) & (kv <= q + 3) & (q >= 0), CAUSAL),
    "absorbed": (lambda q, kv: (kv <= q) | (kv <= q - 2), CAUSAL),
    "window": (lambda q, kv: (kv > q - 4) & (kv <= q), MaskForm(True, 4)),
    "window ge": (lambda q, kv: (kv >= q - 4) & (kv <= q), MaskForm(True, 5)),
    "window - 1": (lambda q, kv: (kv <= q) & (q - kv < 3), MaskForm(True, 3)),
    "window + 1": (lambda q, kv: torch.logical_and(kv > q - 5, kv <= q), MaskForm(True, 5)),
    "two windows": (lambda q, kv: (kv > q - 5) & (kv <= q) & (kv > q - 3), MaskForm(True, 3)),
    "window alone": (lambda q, kv: kv > q - 4, MaskForm(False, 4)),
    "only later": (lambda q, kv: q <= kv, MaskForm(False, 1)),
    "diagonal": (lambda q, kv: kv == q, MaskForm(True, 1)),
    "bidirectional": (lambda q, kv: (q >= 0) & (kv >= 0), MaskForm()),
    "where": (lambda q, kv: torch.where(kv > q, False, True), CAUSAL),
    "int32": (lambda q, kv: kv.to(torch.int32) <= q.int(), CAUSAL),
}
MUTATED = {
    "lt": (lambda q, kv: kv < q, MaskForm(True)),
    "one later": (lambda q, kv: kv <= q + 1, MaskForm()),
    "one earlier": (lambda q, kv: kv <= q - 1, MaskForm(True)),
    "extra term": (lambda q, kv: (kv <= q) & (kv != 3), MaskForm(True)),
    "extra window": (lambda q, kv: (kv > q - 4) & (kv <= q) & (kv % 2 == 0), MaskForm(True, 4)),
    "or": (lambda q, kv: (kv <= q) | (kv > q + 2), MaskForm()),
    "or window": (lambda q, kv: (kv <= q - 4) | (kv == q), MaskForm()),
    "abs": (lambda q, kv: (q - kv).abs() <= 2, MaskForm()),
    "chunked": (lambda q, kv: (kv // 4 == q // 4) & (kv <= q), MaskForm(True, 4)),
    "doubled": (lambda q, kv: 2 * kv <= q, MaskForm(True)),
    "sinks": (lambda q, kv: (kv <= q) & ((kv > q - 3) | (kv < 2)), MaskForm(True)),
    "int cast": (lambda q, kv: ((kv <= q).long() - (kv == 1).long()).bool(), MaskForm()),
    "float": (lambda q, kv: kv.float() <= q.half(), MaskForm()),
}


def test_arithmetic_of_any_shape_is_proved() -> None:
    graph = capture_masks([arithmetic(test) for test, _ in PROVED.values()])
    forms = graph.recover()
    for site, form, (name, (_, wanted)) in zip(graph.sites, forms, PROVED.items(), strict=True):
        check(graph, site, seed=1)
        assert form == wanted, name
        assert site.args[5] == [], name


def test_changed_arithmetic_is_never_taken_for_the_form() -> None:
    graph = capture_masks([arithmetic(test) for test, _ in MUTATED.values()])
    forms = graph.recover()
    for site, form, (name, (_, bounds)) in zip(graph.sites, forms, MUTATED.items(), strict=True):
        assert form.expr is not None, f"{name}: {form}"
        assert (form.causal, form.window, form.padding) == (bounds.causal, bounds.window, None)
        check(graph, site, seed=2)


def rows(batch: int) -> Tensor:
    return torch.arange(batch)[:, None, None, None]


def padded(join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A mask of positions and of a [2, past + new] tensor."""

    def build(past: int, new: int, pad: Tensor) -> Tensor:
        q, kv = grid(past, new)
        return join(q, kv, pad).expand(2, 1, new, past + new)

    return build


PADDED = MaskForm(causal=True, padding=0)
PADDINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], MaskForm | None]] = {
    "indexed": (lambda q, kv, pad: (kv <= q) & pad.to(torch.bool)[rows(2), kv], PADDED),
    "broadcast": (lambda q, kv, pad: pad.bool()[:, None, None, :] & (kv <= q), PADDED),
    "nonzero": (lambda q, kv, pad: (pad != 0).unsqueeze(1).unsqueeze(2) & (kv <= q), PADDED),
    "viewed": (lambda q, kv, pad: (kv <= q) & ~(pad == 0).view(2, 1, 1, -1), PADDED),
    "sliced": (lambda q, kv, pad: (kv <= q) & pad[:, None, None, : kv.shape[-1]].bool(), PADDED),
    "window": (
        lambda q, kv, pad: (kv <= q) & (kv > q - 3) & pad.bool()[rows(2), kv],
        MaskForm(True, 3, 0),
    ),
    "alone": (lambda q, kv, pad: pad.bool()[:, None, None], MaskForm(padding=0)),
    "inverted": (lambda q, kv, pad: (kv <= q) & ~pad.bool()[rows(2), kv], None),
    "value": (lambda q, kv, pad: (kv <= q) & (pad[rows(2), kv] == 1), None),
    "shifted": (lambda q, kv, pad: (kv <= q) & pad.bool()[rows(2), kv - 1], None),
    "of queries": (lambda q, kv, pad: (kv <= q) & pad.bool()[rows(2), q], None),
    "row 0": (lambda q, kv, pad: (kv <= q) & pad.bool()[rows(1), kv], None),
    "or": (lambda q, kv, pad: (kv <= q) | pad.bool()[rows(2), kv], None),
    "groups": (lambda q, kv, pad: pad[rows(2), q] == pad[rows(2), kv], None),
    "counted": (lambda q, kv, pad: (kv <= q) & (pad.cumsum(-1)[:, None, None] > 2), None),
    "from the end": (lambda q, kv, pad: pad[:, None, None, -kv.shape[-1] :] > 0, None),
}


def test_padding_is_found_and_other_data_is_loaded() -> None:
    pad = torch.ones(2, 8, dtype=torch.int64)
    graph = capture_masks([padded(join) for join, _ in PADDINGS.values()], [pad])
    forms = graph.recover()
    for site, form, (name, (_, wanted)) in zip(graph.sites, forms, PADDINGS.items(), strict=True):
        assert form == wanted if wanted else form.expr is not None, f"{name}: {form}"
        (node,) = site.args[5]
        # What may wrap around is read by torch's own indexing, from the tensor it was.
        assert node.op == "placeholder" or name in ("counted", "shifted"), name
        check(graph, site, seed=3)


def test_two_padding_tensors_stay_an_expression() -> None:
    def build(past: int, new: int, first: Tensor, second: Tensor) -> Tensor:
        q, kv = grid(past, new)
        return (kv <= q) & first[:, None, None] & second[:, None, None]

    ones = torch.ones(2, 8, dtype=torch.bool)
    graph = capture_masks([build], [ones, ones.clone()])
    (form,) = graph.recover()
    assert form.expr is not None
    assert len(graph.sites[0].args[5]) == 2
    check(graph, graph.sites[0], seed=4)


def lowest() -> float:
    # Called inside the graph: Dynamo makes an input of a float that it finds outside.
    return torch.finfo(torch.float32).min


def finite(q: Tensor, kv: Tensor, pad: Tensor) -> Tensor:
    return torch.where((kv <= q) & pad.bool()[rows(2), kv], 0.0, lowest())


def infinite(q: Tensor, kv: Tensor, pad: Tensor) -> Tensor:
    return torch.where((kv <= q) & pad.bool()[rows(2), kv], 0.0, -INF)


def triangle(past: int, new: int) -> Tensor:
    return torch.full((new, past + new), -INF).triu(diagonal=past + 1)


def filled(past: int, new: int) -> Tensor:
    q, kv = grid(past, new)
    return torch.zeros(new, past + new).masked_fill(kv > q, lowest())


ADDITIVE: list[tuple[Callable[..., Tensor], float | None, MaskForm | None]] = [
    (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, -INF)), -INF, CAUSAL),
    (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, lowest())), lowest(), CAUSAL),
    (arithmetic(lambda q, kv: torch.where(kv > q, -INF, 0.0)), -INF, CAUSAL),
    (triangle, -INF, CAUSAL),
    (filled, lowest(), CAUSAL),
    (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, -1e4)), None, None),
    (arithmetic(lambda q, kv: torch.where(kv < q, 0.0, lowest())), None, None),
    (arithmetic(lambda q, kv: torch.where(kv <= q, 1.0, -INF)), None, None),
    (arithmetic(lambda q, kv: (q - kv).float() * -0.5), None, None),
    (arithmetic(lambda q, kv: ((q - kv).bfloat16() * -0.3 + 0.1).float()), None, None),
]


def test_additive_masks() -> None:
    graph = capture_masks([build for build, _, _ in ADDITIVE])
    forms = graph.recover()
    for site, form, (_, hidden, wanted) in zip(graph.sites, forms, ADDITIVE, strict=True):
        assert form == wanted if wanted else form.expr is not None, form
        check(graph, site, 5, hidden)


def test_the_lowest_bias_with_padding_is_padding() -> None:
    builds = [padded(finite), padded(infinite)]
    graph = capture_masks(builds, [torch.ones(2, 8, dtype=torch.int64)])
    assert graph.recover() == [PADDED, PADDED]
    check(graph, graph.sites[0], 6, torch.finfo(torch.float32).min)
    check(graph, graph.sites[1], 6, -INF)


def test_a_bias_per_head_is_loaded() -> None:
    def build(past: int, new: int, slopes: Tensor) -> Tensor:
        q, kv = grid(past, new)
        bias = slopes[None, :, None, None] * (kv - q)
        return bias + torch.where(kv <= q, 0.0, -INF)

    graph = capture_masks([build], [torch.ones(2)])
    (form,) = graph.recover()
    assert form.expr is not None
    check(graph, graph.sites[0], seed=7)


def transposed(past: int, new: int) -> Tensor:
    q, kv = grid(past, new)
    return (kv.transpose(2, 3) <= q.permute(0, 1, 3, 2)).transpose(-1, -2)


def stepped(past: int, new: int) -> Tensor:
    q = torch.arange(past, past + new)
    kv = torch.arange(0, 2 * (past + new), 2)[0::1] - torch.arange(past + new)
    return kv[None] <= q.view(new, 1)


def sliced(past: int, new: int) -> Tensor:
    all_positions = torch.arange(past + new)
    return all_positions[None, :] <= all_positions[past:, None]


def last_rows(past: int, new: int) -> Tensor:
    all_positions = torch.arange(past + new)
    return all_positions[None, :] <= all_positions[-new:][:, None]


def gathered(past: int, new: int) -> Tensor:
    all_positions = torch.arange(past + new)
    return torch.ones(past + new, past + new).tril().bool()[all_positions[past:]]


def test_views_and_slices_are_followed() -> None:
    graph = capture_masks([transposed, stepped, sliced, last_rows, gathered])
    assert graph.recover() == [CAUSAL] * 5
    for site in graph.sites:
        check(graph, site, seed=8)


def test_one_query_sees_all_keys_as_causal() -> None:
    tests: list[tuple[Callable[[Tensor, Tensor], Tensor], MaskForm | None]] = [
        (lambda q, kv: kv <= q, CAUSAL),
        (lambda q, kv: kv <= q + 1, CAUSAL),
        (lambda q, kv: (q >= 0) & (kv >= 0), CAUSAL),
        (lambda q, kv: (kv > q - 4) & (kv <= q), MaskForm(causal=True, window=4)),
        (lambda q, kv: kv < q, None),
    ]
    graph = capture_masks([arithmetic(test) for test, _ in tests], new=1)
    for site, form, (_, wanted) in zip(graph.sites, graph.recover(), tests, strict=True):
        assert form == wanted if wanted else form.expr is not None
        check(graph, site, seed=9)


def test_past_and_new_of_one_symbol() -> None:
    build = arithmetic(lambda q, kv: (kv <= q) & (kv > q - 6))
    graph = capture_masks([build], past=4, new=4)
    assert graph.recover() == [MaskForm(causal=True, window=6)]
    assert_same_mask(graph, graph.sites[0], 7, 7, seed=10)


def without_mask(past: int, new: int, is_causal: bool, strict: bool = False) -> Capture:
    """A site with no mask; its graph still holds the nodes of one."""
    build = arithmetic(lambda q, kv: kv <= q)
    graph = capture_masks([build], past=past, new=new, strict=strict)
    (site,) = graph.sites
    site.update_arg(4, None)
    site.meta[META] = dataclasses.replace(site.meta[META], is_causal=is_causal)
    graph.ctx.sites = [site.meta[META]]
    return graph


@pytest.mark.parametrize(
    ("past", "new", "is_causal", "wanted"),
    [
        (5, 3, False, MaskForm()),
        (5, 1, False, MaskForm(causal=True)),
        (0, 3, True, MaskForm(causal=True)),
        (0, 3, False, MaskForm()),
    ],
)
def test_sites_without_a_mask(past: int, new: int, is_causal: bool, wanted: MaskForm) -> None:
    assert without_mask(past, new, is_causal).recover() == [wanted]


def written(past: int, new: int) -> Tensor:
    q, kv = grid(past, new)
    mask = (kv <= q).clone()
    mask[..., 0] = True
    return mask


def written_view(past: int, new: int) -> Tensor:
    q, kv = grid(past, new)
    mask = torch.zeros(new, past + new).masked_fill(kv > q, -INF)
    mask[..., 1:].mul_(0.5)
    return mask


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (written, "in place"),
        (written_view, "in place"),
        (arithmetic(lambda q, kv: (kv <= q).roll(1, -1)), "not index arithmetic"),
        (arithmetic(lambda q, kv: (kv <= q).float().cumsum(-1)), "not index arithmetic"),
    ],
)
def test_unreadable_masks_are_read_from_the_tensor(
    build: Callable[..., Tensor], reason: str
) -> None:
    graph = capture_masks([build])
    (form,) = graph.recover()
    assert form.expr is not None
    assert form.expr.args[-2:] == (Expr("q"), Expr("kv"))
    assert form == MaskForm(expr=load(0, form.expr.args[1:]))
    (site,) = graph.sites
    assert site.args[5] == [graph.masks[0]]
    assert reason in graph.ctx.declines[0].reason
    strict = capture_masks([build], strict=True)
    with pytest.raises(DeclinedError, match=reason):
        recover_mask.run(strict.gm, strict.ctx)


def test_top_left_causal_over_a_filled_cache_is_what_torch_computes() -> None:
    graph = without_mask(5, 3, is_causal=True)
    assert graph.recover() == [MaskForm(expr=make("le", Expr("kv"), Expr("q")))]


def test_bottom_right_causal_is_causal() -> None:
    graph = without_mask(5, 3, is_causal=True)
    (site,) = graph.sites
    site.meta[META] = dataclasses.replace(site.meta[META], bottom_right=True)
    graph.ctx.sites = [site.meta[META]]
    assert graph.recover() == [CAUSAL]
