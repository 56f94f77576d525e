"""Masks of real and hand-made graphs: the proved form, or an expression, equals the mask."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from headinfer_compile.errors import DeclinedError
from headinfer_compile.passes import recover_mask
from headinfer_compile.passes.context import META
from headinfer_compile.runtime.masks import Expr, MaskForm, load
from mask_harness import Capture, assert_same_mask, capture_mask, capture_model
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SOURCES = [
    f"L{prefix}['{name}']{suffix}"
    for prefix in ("", "['kwargs']")
    for name, suffix in [
        ("past_key_values", ".length"),
        *((name, "") for name in ("input_ids", "position_ids", "attention_mask")),
    ]
]
INF = float("inf")


@pytest.fixture(autouse=True)
def dynamic_lengths() -> Iterator[None]:
    before = torch.compiler.config.dynamic_sources
    torch.compiler.config.dynamic_sources = ",".join(SOURCES)
    yield
    torch.compiler.config.dynamic_sources = before
    torch._dynamo.reset()


def llama(**extra: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **extra)).eval()


def steps(
    ends: tuple[int, ...], batch: int = 1, mask: Callable[[int, int], Tensor] | None = None
) -> Callable[[Any, Callable[[], Any]], None]:
    """Feed chunks that end at ``ends``, with ``mask(start, end)`` as the attention mask."""

    def calls(model: Any, new_cache: Callable[[], Any]) -> None:
        cache = new_cache()
        ids = torch.randint(0, 97, (batch, ends[-1]))
        for start, end in zip((0, *ends), ends, strict=False):
            extra = {} if mask is None else {"attention_mask": mask(start, end)}
            model(ids[:, start:end], past_key_values=cache, **extra)

    return calls


CHUNKS = (16, 32, 36, 37)


def forms_by_layer(graphs: list[Capture]) -> list[list[MaskForm]]:
    """The forms of each graph; also asserts that they equal the masks they replaced."""
    assert len(graphs) > 1
    forms = []
    for number, graph in enumerate(graphs):
        forms.append(graph.recover())
        for site in graph.sites:
            assert site.args[4] is None
            if graph.masks[site.meta[META].index] is not None:
                check(graph, site, seed=number)
        masks = [mask.name for mask in graph.masks.values() if mask and mask.op != "placeholder"]
        graph.gm.graph.eliminate_dead_code()
        assert not {node.name for node in graph.gm.graph.nodes} & set(masks)
    return forms


def check(graph: Capture, site: Any, seed: int, hidden: float | None = None) -> None:
    """Compare with brute force at random lengths that the graph accepts."""
    rng = random.Random(seed)
    length = getattr(site.args[7], "meta", {}).get("example_value", site.args[7])
    new = site.args[1].meta["example_value"].shape[2]
    for trial in range(3):
        lengths = [
            value if isinstance(value, int) else rng.randint(2, 12)
            for value in (concrete(length), concrete(new))
        ]
        assert_same_mask(graph, site, lengths[0], lengths[1], seed * 10 + trial, hidden)


def concrete(value: Any) -> Any:
    is_constant = isinstance(value, torch.SymInt) and value.node.expr.is_number
    return int(value) if is_constant else value


def test_llama_is_causal_in_every_phase() -> None:
    graphs = forms_by_layer(capture_model(llama(), steps(CHUNKS)))
    assert all(form == MaskForm(causal=True) for forms in graphs for form in forms)


def test_sliding_window_is_proved_in_every_phase() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)).eval()
    graphs = forms_by_layer(capture_model(model, steps(CHUNKS)))
    assert all(form == MaskForm(causal=True, window=8) for forms in graphs for form in forms)
    assert graphs[0][0].formula == "kv <= q + past and kv > q + past - 8"


def test_two_masks_in_one_graph() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    graphs = forms_by_layer(capture_model(Gemma3ForCausalLM(config).eval(), steps(CHUNKS)))
    wanted = [MaskForm(causal=True, window=8), MaskForm(causal=True)]
    assert all(forms == wanted for forms in graphs)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["left", "ones", "bool"])
def test_a_2d_mask_becomes_the_padding_input(batch: int, kind: str) -> None:
    mask = torch.ones(batch, 12, dtype=torch.bool if kind == "bool" else torch.int64)
    mask[-1, : 0 if kind == "ones" else 3] = 0
    calls = steps((5, 9, 11, 12), batch, lambda start, end: mask[:, :end])
    graphs = capture_model(llama(), calls)
    for forms in forms_by_layer(graphs):
        assert forms == [MaskForm(causal=True, padding=0)] * 2
        assert forms[0].formula == "kv <= q + past and m0[b, kv]"
    for graph in graphs:
        inputs = [site.args[5] for site in graph.sites]
        assert all(len(nodes) == 1 and nodes[0].op == "placeholder" for nodes in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_4d_mask_of_the_caller_is_one_load(dtype: torch.dtype) -> None:
    calls = steps((5, 9), 1, lambda start, end: torch.ones(1, 1, end - start, end).to(dtype))
    for forms in forms_by_layer(capture_model(llama(), calls)):
        zero = Expr("const", (0,))
        expr = load(0, (zero, zero, Expr("q"), Expr("kv")))
        assert forms == [MaskForm(expr=expr)] * 2


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
    "diagonal": (lambda q, kv: kv == q, MaskForm(True, 1)),
    "bidirectional": (lambda q, kv: (q >= 0) & (kv >= 0), MaskForm()),
    "where": (lambda q, kv: torch.where(kv > q, False, True), CAUSAL),
    "cast": (lambda q, kv: (kv <= q).long().bool() & (kv.to(torch.int32) <= q), None),
}
MUTATED = {
    "lt": (lambda q, kv: kv < q, None),
    "one later": (lambda q, kv: kv <= q + 1, None),
    "one earlier": (lambda q, kv: kv <= q - 1, None),
    "swapped operands": (lambda q, kv: q <= kv, None),
    "extra term": (lambda q, kv: (kv <= q) & (kv != 3), MaskForm(True)),
    "extra window": (lambda q, kv: (kv > q - 4) & (kv <= q) & (kv % 2 == 0), MaskForm(True, 4)),
    "or": (lambda q, kv: (kv <= q) | (kv > q + 2), None),
    "or window": (lambda q, kv: (kv <= q - 4) | (kv == q), None),
    "abs": (lambda q, kv: (q - kv).abs() <= 2, None),
    "chunked": (lambda q, kv: (kv // 4 == q // 4) & (kv <= q), MaskForm(True)),
    "doubled": (lambda q, kv: 2 * kv <= q, None),
    "sinks": (lambda q, kv: (kv <= q) & ((kv > q - 3) | (kv < 2)), MaskForm(True)),
    "not q": (lambda q, kv: (kv <= q) ^ (kv == 1), "declined"),
}


@pytest.mark.parametrize("name", PROVED)
def test_arithmetic_of_any_shape_is_proved(name: str) -> None:
    test, wanted = PROVED[name]
    graph = capture_mask(arithmetic(test))
    (form,) = graph.recover()
    check(graph, graph.sites[0], seed=1)
    if wanted is not None:
        assert form == wanted
        assert graph.sites[0].args[5] == []


@pytest.mark.parametrize("name", MUTATED)
def test_changed_arithmetic_is_never_taken_for_the_form(name: str) -> None:
    test, bounds = MUTATED[name]
    graph = capture_mask(arithmetic(test))
    if bounds == "declined":
        recover_mask.run(graph.gm, graph.ctx)
        assert graph.ctx.sites[0].mask is None
        return
    (form,) = graph.recover()
    assert form.expr is not None, form
    wanted = bounds or MaskForm()
    assert (form.causal, form.window, form.padding) == (wanted.causal, wanted.window, None)
    check(graph, graph.sites[0], seed=2)


def rows(batch: int) -> Tensor:
    return torch.arange(batch)[:, None, None, None]


def padded(join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A mask of positions and of a [2, past + new] tensor."""

    def build(past: int, new: int, pad: Tensor) -> Tensor:
        q, kv = grid(past, new)
        return join(q, kv, pad).expand(2, 1, new, past + new)

    return build


def additive(hidden: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, kv, pad: torch.where((kv <= q) & pad.bool()[rows(2), kv], 0.0, hidden)


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


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_is_found_and_other_data_is_loaded(name: str) -> None:
    join, wanted = PADDINGS[name]
    graph = capture_mask(padded(join), [torch.ones(2, 8, dtype=torch.int64)])
    (form,) = graph.recover()
    assert form == wanted if wanted else form.expr is not None, form
    (node,) = graph.sites[0].args[5]
    assert node.op == "placeholder" or name == "counted"
    check(graph, graph.sites[0], seed=3)


def test_two_padding_tensors_stay_an_expression() -> None:
    def build(past: int, new: int, first: Tensor, second: Tensor) -> Tensor:
        q, kv = grid(past, new)
        return (kv <= q) & first[:, None, None] & second[:, None, None]

    ones = torch.ones(2, 8, dtype=torch.bool)
    graph = capture_mask(build, [ones, ones.clone()])
    (form,) = graph.recover()
    assert form.expr is not None
    assert len(graph.sites[0].args[5]) == 2
    check(graph, graph.sites[0], seed=4)


MIN = torch.finfo(torch.float32).min


def triangle(past: int, new: int) -> Tensor:
    return torch.full((new, past + new), -INF).triu(diagonal=past + 1)


def filled(past: int, new: int) -> Tensor:
    q, kv = grid(past, new)
    return torch.zeros(new, past + new).masked_fill(kv > q, MIN)


@pytest.mark.parametrize(
    ("build", "hidden", "wanted"),
    [
        (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, -INF)), -INF, CAUSAL),
        (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, MIN)), MIN, CAUSAL),
        (arithmetic(lambda q, kv: torch.where(kv > q, -INF, 0.0)), -INF, CAUSAL),
        (triangle, -INF, CAUSAL),
        (filled, MIN, CAUSAL),
        (arithmetic(lambda q, kv: torch.where(kv <= q, 0.0, -1e4)), None, None),
        (arithmetic(lambda q, kv: torch.where(kv < q, 0.0, MIN)), None, None),
        (arithmetic(lambda q, kv: torch.where(kv <= q, 1.0, -INF)), None, None),
        (arithmetic(lambda q, kv: (q - kv).float() * -0.5), None, None),
        (arithmetic(lambda q, kv: (q - kv).bfloat16() * -0.3 + 0.1), None, None),
    ],
)
def test_additive_masks(
    build: Callable[..., Tensor], hidden: float | None, wanted: MaskForm | None
) -> None:
    graph = capture_mask(build)
    (form,) = graph.recover()
    assert form == wanted if wanted else form.expr is not None, form
    check(graph, graph.sites[0], 5, hidden)


def test_a_finite_bias_with_padding_keeps_its_value() -> None:
    # A row that is all padding is uniform under a finite bias and empty under a bool mask.
    pad = torch.ones(2, 8, dtype=torch.int64)
    graph = capture_mask(padded(additive(MIN)), [pad])
    (form,) = graph.recover()
    assert form.expr is not None
    assert not form.causal
    check(graph, graph.sites[0], seed=6)
    graph = capture_mask(padded(additive(-INF)), [pad])
    assert graph.recover() == [PADDED]
    check(graph, graph.sites[0], 6, -INF)


def test_a_bias_per_head_is_loaded() -> None:
    def build(past: int, new: int, slopes: Tensor) -> Tensor:
        q, kv = grid(past, new)
        bias = slopes[None, :, None, None] * (kv - q)
        return bias + torch.where(kv <= q, 0.0, -INF)

    graph = capture_mask(build, [torch.ones(2)])
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


@pytest.mark.parametrize("build", [transposed, stepped, sliced, last_rows, gathered])
def test_views_and_slices_are_followed(build: Callable[..., Tensor]) -> None:
    graph = capture_mask(build)
    assert graph.recover() == [CAUSAL]
    check(graph, graph.sites[0], seed=8)


@pytest.mark.parametrize(
    ("test", "wanted"),
    [
        (lambda q, kv: kv <= q, MaskForm(causal=True)),
        (lambda q, kv: kv <= q + 1, MaskForm(causal=True)),
        (lambda q, kv: (q >= 0) & (kv >= 0), MaskForm(causal=True)),
        (lambda q, kv: (kv > q - 4) & (kv <= q), MaskForm(causal=True, window=4)),
        (lambda q, kv: kv < q, None),
    ],
)
def test_one_query_sees_all_keys_as_causal(
    test: Callable[[Tensor, Tensor], Tensor], wanted: MaskForm | None
) -> None:
    graph = capture_mask(arithmetic(test), new=1)
    (form,) = graph.recover()
    assert form == wanted if wanted else form.expr is not None
    check(graph, graph.sites[0], seed=9)


def test_past_and_new_of_one_symbol() -> None:
    graph = capture_mask(arithmetic(lambda q, kv: (kv <= q) & (kv > q - 6)), past=4, new=4)
    assert graph.recover() == [MaskForm(causal=True, window=6)]
    assert_same_mask(graph, graph.sites[0], 7, 7, seed=10)


def without_mask(past: int, new: int, is_causal: bool, strict: bool = False) -> Capture:
    """A site with no mask; its graph still holds the nodes of one."""
    graph = capture_mask(arithmetic(lambda q, kv: kv <= q), past=past, new=new, strict=strict)
    (site,) = graph.sites
    site.update_arg(4, None)
    site.meta[META] = graph.ctx.sites[0].__class__(
        **{**vars(site.meta[META]), "is_causal": is_causal}
    )
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
def test_unreadable_masks_are_declined(build: Callable[..., Tensor], reason: str) -> None:
    graph = capture_mask(build)
    before = [(node, node.args) for node in graph.gm.graph.nodes]
    recover_mask.run(graph.gm, graph.ctx)
    assert [(node, node.args) for node in graph.gm.graph.nodes] == before
    assert graph.ctx.sites[0].mask is None
    assert reason in graph.ctx.declines[0].reason
    with pytest.raises(DeclinedError, match=reason):
        strict = capture_mask(build, strict=True)
        recover_mask.run(strict.gm, strict.ctx)


def test_top_left_causal_over_a_filled_cache_is_declined() -> None:
    graph = without_mask(5, 3, is_causal=True)
    recover_mask.run(graph.gm, graph.ctx)
    assert graph.ctx.sites[0].mask is None
    assert "first key" in graph.ctx.declines[0].reason
    with pytest.raises(DeclinedError, match="first key"):
        recover_mask.run(*vars(without_mask(5, 3, True, strict=True)).values())
