"""Region lowering: equal regions share code, different ones never, and results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headinfer_compile.errors import OptionError
from headinfer_compile.passes.lower import RegionReport, lower_regions
from region_harness import (
    Backend,
    PlainCache,
    attend,
    bind_reference,
    capture,
    dynamic_lengths,
    plain_cache,
    runnable,
    split_graph,
    tiny_llama,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("num_layers", "fuse"), [(2, False), (4, True)])
def test_llama_has_three_regions_at_any_depth_and_length(num_layers: int, fuse: bool) -> None:
    model, backend = tiny_llama(num_layers), Backend("eager", fuse)
    plain = tiny_llama(num_layers)
    kwargs: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    with dynamic_lengths():
        model.compile(backend=backend)
        for length in (21, 30, 11):
            ids = torch.randint(0, 97, (1, length))
            cache = PlainCache(model.config)
            out = model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **kwargs)
            assert torch.equal(out, plain.generate(ids, **kwargs)), f"{length=}"
    assert len(backend.reports) == 3  # first chunk, later chunk, decode; nothing recompiled
    for report in backend.reports:
        assert (report.num_regions, report.num_unique) == (num_layers + 1, 3)
        middle = {region.key for region in report.regions[1:-1]}
        assert len(middle) == 1


def test_inductor_equals_the_model_at_every_length() -> None:
    model, backend, plain = tiny_llama(3), Backend("inductor"), tiny_llama(3)
    with dynamic_lengths():
        model.compile(backend=backend)
        for length in (6, 11, 19):
            ids = torch.randint(0, 97, (1, length))
            out = model(input_ids=ids, past_key_values=PlainCache(model.config), use_cache=True)
            assert torch.allclose(out.logits, plain(input_ids=ids).logits, atol=1e-5), f"{length=}"
    assert len(backend.splits) == 1
    (split,), (report,) = backend.splits, backend.reports
    assert [region.shared_with for region in report.regions] == [
        "region_0",
        "region_1",
        "region_1",
        "region_3",
    ]
    assert split.region_2 is split.region_1
    assert [region.seconds > 0 for region in report.regions] == [True, True, False, True]


@dataclass(frozen=True)
class Block:
    """``x -> (x * scale) @ up @ down``, as the traced program does it after each attention."""

    scale: float = 2
    width: int = 8
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    grad: bool = False
    autocast: bool = False
    offset: int = 0

    def weights(self) -> list[Tensor]:
        up = torch.randn(4 * self.width + self.offset)[self.offset :].view(4, self.width)
        if self.transposed:
            up = up.t().contiguous().t()
        down = torch.randint(-2, 3, (self.width, 4)).to(self.dtype)
        return [up.requires_grad_(self.grad), down]

    def __call__(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = (x * self.scale) @ up
        return (hidden.float()[..., None] * down).sum(1).float()


def lower_blocks(
    blocks: list[Callable[..., Tensor]], weights: list[list[Tensor]]
) -> tuple[RegionReport, Sequence[Tensor], Sequence[Tensor]]:
    """Lower ``attend, block, attend, block, ...``; return report, results, expected results."""
    cache = plain_cache(len(blocks))

    def program(x: Tensor, weights: list[list[Tensor]]) -> Tensor:
        x = x * 1.5
        for layer, (block, pair) in enumerate(zip(blocks, weights, strict=True)):
            x = block(attend(cache, x, layer), *pair)
        return x

    gm, inputs = capture(program, torch.randn(5, 4), weights)
    split = split_graph(gm, inputs)
    bind_reference(split)
    report = lower_regions(split, inputs, lowering="eager", inductor={})
    return report, split(*inputs), runnable(gm)(*inputs)


@pytest.mark.parametrize(
    ("other", "unique"),
    [
        ({}, 3),
        ({"scale": 3}, 4),
        ({"scale": 2.0}, 4),
        ({"scale": -0.0}, 4),
        ({"scale": True}, 4),
        ({"width": 12}, 4),
        ({"dtype": torch.int32}, 4),
        ({"dtype": torch.float64}, 4),
        ({"transposed": True}, 4),
        ({"grad": True}, 4),
        ({"autocast": True}, 4),
        ({"offset": 1}, 4),
    ],
    ids=str,
)
def test_only_equal_regions_share(other: dict[str, Any], unique: int) -> None:
    blocks = [Block(), Block(), replace(Block(), **other), Block(), Block()]
    report, out, expected = lower_blocks(list(blocks), [block.weights() for block in blocks])
    assert report.num_regions == 6
    assert report.num_unique == unique, [region.shared_with for region in report.regions]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, check_dtype=True)


def test_zero_and_minus_zero_are_different_scalars() -> None:
    blocks = [Block(scale=0.0), Block(scale=-0.0), Block(scale=0.0), Block(scale=0.0)]
    report, _, _ = lower_blocks(list(blocks), [block.weights() for block in blocks])
    assert [region.shared_with for region in report.regions][1:4] == [
        "region_1",
        "region_2",
        "region_1",
    ]


def mutating(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The result shows whether ``a`` and ``b`` share memory."""
    a.add_(1)
    return x * 0.5 + b


def test_inputs_that_share_memory_get_code_of_their_own() -> None:
    base = torch.randn(8)
    weights = [
        [torch.randn(4), torch.randn(4)],
        [base[:4], base[:4].detach()],
        [torch.randn(4), torch.randn(4)],
        [torch.randn(4), torch.randn(4)],
    ]
    report, _, _ = lower_blocks([mutating] * 4, weights)
    assert [region.shared_with for region in report.regions][1:4] == [
        "region_1",
        "region_2",
        "region_1",
    ]


def test_inductor_with_tied_and_shared_inputs() -> None:
    """The same tensor given twice, and two views of one storage, where the region mutates one."""

    def program(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        x = mutating(attend(cache, x * 1.5, 0), a, b)
        return mutating(attend(cache, x, 1), c, d) + attend(cache, x, 2)

    cache, base = plain_cache(3), torch.randn(4)
    apart = [torch.randn(4) for _ in range(4)]
    gm, inputs = capture(program, torch.randn(5, 4), *apart)
    order = {id(tensor): i for i, tensor in enumerate(apart)}

    def arguments(tensors: list[Tensor]) -> list[Any]:
        return [tensors[order[id(arg)]] if id(arg) in order else arg for arg in inputs]

    def fresh() -> list[Any]:
        shared, tied = base.clone(), base.clone()
        return arguments([shared, shared.detach(), tied, tied])

    split = split_graph(gm, inputs)
    bind_reference(split)
    report = lower_regions(split, fresh(), lowering="inductor", inductor={})
    assert report.num_unique == report.num_regions
    expected = runnable(gm)(*fresh())
    for out, ref in zip(split(*fresh()), expected, strict=True):
        torch.testing.assert_close(out, ref)


@pytest.mark.parametrize(
    ("inductor", "message"),
    [
        ({"triton.cudagraphs": True}, "triton.cudagraphs=True is not possible"),
        ({"freezing": True}, "weights cannot be constants"),
        ({"max_autotun": True}, "no option 'max_autotun'"),
    ],
)
def test_impossible_inductor_options_are_refused(inductor: dict[str, Any], message: str) -> None:
    cache = plain_cache(1)
    gm, inputs = capture(lambda x: attend(cache, x + 1, 0), torch.randn(5, 4))
    with pytest.raises(OptionError, match=message):
        lower_regions(split_graph(gm, inputs), inputs, lowering="inductor", inductor=inductor)


def test_lowering_leaves_the_tracing_context_and_grad_mode_alone() -> None:
    seen: list[tuple[Any, ...]] = []

    def state() -> tuple[Any, ...]:
        context = torch._guards.TracingContext.get()
        return context, context.fake_mode, context.params_flat, torch.is_grad_enabled()

    class Checked(Backend):
        def __call__(self, gm: Any, example_inputs: Any) -> Any:
            before = state()
            result = super().__call__(gm, example_inputs)
            seen.append((before, state()))
            return result

    def program(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            x = attend(cache, x * w, 0)
        return x * w

    cache, w = plain_cache(1), torch.randn(4, requires_grad=True)
    torch._dynamo.reset()
    with torch.enable_grad():
        compiled = torch.compile(program, backend=Checked("inductor", fuse=False), fullgraph=True)
        x = torch.randn(5, 4)
        torch.testing.assert_close(compiled(x, w), program_reference(x, w))
        (before, after) = seen[0]
        assert before == after
        assert compiled(x, w).requires_grad


def program_reference(x: Tensor, w: Tensor) -> Tensor:
    q = (x * w)[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0)
    return out[0, 0].detach() * w
