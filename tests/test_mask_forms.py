"""The masks that ``transformers.masking_utils`` builds for decoders with a cache, and the caller's.

One attention under each mask: equal to the same attention over a ``DynamicCache``, no tensor of new
x all tokens made, and no block streamed that the mask hides by arithmetic.

Legend: B batch, H heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, LlamaConfig, masking_utils

from attention_harness import DIM, HEADS, KV_HEADS, LargestTensor, inputs, repeat_kv
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.executor import CompiledGraph

WINDOW, PAGE = 24, 8
STEPS = (70, 70, 1, 1, 9, 1)
TOTAL = sum(STEPS)

Build = Callable[..., Tensor | None]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def config(implementation: str) -> LlamaConfig:
    options: dict[str, Any] = {"sliding_window": WINDOW, "attention_chunk_size": WINDOW}
    options["attn_implementation"] = implementation
    return LlamaConfig(num_hidden_layers=1, **options)


def _tensor(mask: Any) -> Tensor | None:
    assert mask is None or isinstance(mask, Tensor)
    return mask


def causal(**given: Any) -> Tensor | None:
    return _tensor(masking_utils.create_causal_mask(**given))


def sliding(**given: Any) -> Tensor | None:
    return _tensor(masking_utils.create_sliding_window_causal_mask(**given))


def chunked(**given: Any) -> Tensor | None:
    return _tensor(masking_utils.create_chunked_causal_mask(**given))


class Attention:
    """One attention layer under the mask that ``build`` makes."""

    def __init__(self, build: Build, implementation: str = "sdpa", blocks: bool = False) -> None:
        self.build, self.blocks = build, blocks
        self.config = config(implementation)
        self.graphs: list[CompiledGraph] = []
        self.compiled = torch.compile(self.__call__, backend=self._backend)

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled = headinfer(gm, example_inputs, options={"lowering": "eager"})
        assert isinstance(compiled, CompiledGraph)
        self.graphs.append(compiled)
        return compiled

    def __call__(
        self, cache: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, groups: Tensor
    ) -> Tensor:
        """``[B, H, n, D]``; ``padding`` and ``groups`` are ``[B, S]``."""
        extra = {"block_sequence_ids": groups} if self.blocks else {}
        mask = self.build(
            config=self.config,
            inputs_embeds=q.transpose(1, 2).flatten(2),
            attention_mask=padding,
            past_key_values=cache,
            **extra,
        )
        keys, values = (repeat_kv(x) for x in cache.update(k, v, 0))
        if self.config._attn_implementation == "sdpa":
            return sdpa(q, keys, values, mask, is_causal=mask is None and q.shape[2] > 1)
        scores = torch.matmul(q, keys.transpose(2, 3)) * DIM**-0.5
        assert mask is not None
        return torch.matmul((scores + mask).softmax(-1), values)

    def assert_exact(self, seed: int, padding: Tensor | None = None, batch: int = 2) -> list[int]:
        """Compare with a resident cache over ``STEPS``; the bytes streamed in each of them."""
        cache, resident = offloaded(), DynamicCache()
        groups = torch.full((batch, TOTAL), -1)
        groups[0, 20:35], groups[-1, 60:75], groups[:, 90:100] = 0, 1, 2
        streamed = []
        done = 0
        for step, new in enumerate(STEPS):
            qkv = inputs(seed + step, new, batch)
            done += new
            rest = (None if padding is None else padding[:, :done], groups[:, :done])
            before = cache.stats().h2d_bytes
            got = self.compiled(cache, *qkv, *rest)
            streamed.append(cache.stats().h2d_bytes - before)
            want = self(resident, *qkv, *rest)
            shown = slice(None) if padding is None else padding[:, done - new : done].bool()
            if isinstance(shown, Tensor):
                # What a padded query sees is nobody's business: SDPA itself gives NaN there.
                got, want = (x.transpose(1, 2)[shown] for x in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        stats = cache.stats()
        assert stats.eager_updates == stats.materialised_layers == 0
        assert stats.sites_rewritten == 1
        return streamed


def offloaded() -> HeadInferCache:
    return HeadInferCache.from_shape(
        num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, gpu_budget=0,
        page_tokens=PAGE, tail_tokens=4,
    )  # fmt: skip


def left_padding() -> Tensor:
    mask = torch.ones(2, TOTAL, dtype=torch.int64)
    mask[1, :11] = 0
    return mask


SLOW = pytest.mark.slow
DEFAULT = ((causal, "sdpa", True), (sliding, "eager", True), (chunked, "sdpa", False))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("build", "implementation", "padded"),
    [
        pytest.param(*case, marks=() if case in DEFAULT else SLOW)
        for case in itertools.product((causal, sliding, chunked), ("sdpa", "eager"), (False, True))
    ],
)
def test_masks_of_transformers(seed: int, build: Build, implementation: str, padded: bool) -> None:
    attention = Attention(build, implementation)
    streamed = attention.assert_exact(seed, left_padding() if padded else None)
    row_bytes = 2 * KV_HEADS * 2 * DIM * 4
    decode = [streamed[step] for step, new in enumerate(STEPS) if new == 1]
    if build is causal:
        assert min(decode) >= 132 * row_bytes
    else:
        # The window, the rest of its first and last page, and what is fetched for the next step.
        assert max(decode) <= (WINDOW + 4 * PAGE) * row_bytes
    forms = [site.mask for graph in attention.graphs for site in graph.sites]
    if build is sliding and not padded:
        assert all(form is not None and form.expr is None for form in forms)


@pytest.mark.parametrize(
    "build", [pytest.param(causal, marks=SLOW), sliding, pytest.param(chunked, marks=SLOW)]
)
def test_bidirectional_blocks(seed: int, build: Build) -> None:
    """Image tokens of one group see each other, whatever their order."""
    attention = Attention(build, blocks=True)
    attention.assert_exact(seed)
    attention.assert_exact(seed, left_padding())


@pytest.mark.parametrize(
    "kind", ["and_mask_function", pytest.param("or_mask_function", marks=SLOW)]
)
def test_a_mask_function_of_the_caller_is_exact(seed: int, kind: str) -> None:
    """transformers maps such functions over the whole mask: no index arithmetic is left."""

    def every_third(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (kv % 3 == 0) | (kv == q)

    def build(**given: Any) -> Tensor | None:
        return causal(**given, **{kind: every_third})

    attention = Attention(build)
    attention.assert_exact(seed)
    (decline, *_) = attention.graphs[0].report.declines
    assert "is made in full and read block by block" in decline.reason


@pytest.mark.parametrize(("additive", "per_head"), [(False, True), (True, False)])
def test_the_callers_own_mask_is_sliced(seed: int, additive: bool, per_head: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = HEADS if per_head else 1
    seen = torch.rand(2, heads, TOTAL, TOTAL, generator=generator) < 0.6
    seen |= torch.eye(TOTAL, dtype=torch.bool)
    seen &= torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    noise = torch.randn(seen.shape, generator=generator)
    whole = noise.masked_fill(~seen, float("-inf")) if additive else seen

    def build(past_key_values: Any, inputs_embeds: Tensor, **_: Any) -> Tensor:
        past = past_key_values.get_seq_length()
        new = inputs_embeds.shape[1]
        return whole[:, :, past : past + new, : past + new]

    Attention(build).assert_exact(seed)


@pytest.mark.parametrize(
    ("build", "implementation"),
    [(sliding, "sdpa"), (causal, "eager"), pytest.param(chunked, "eager", marks=SLOW)],
)
def test_no_tensor_of_new_times_all_tokens(seed: int, build: Build, implementation: str) -> None:
    attention = Attention(build, implementation)
    cache = offloaded()
    groups, done = torch.full((1, 1000), -1), 0
    for step, new in enumerate((128, 96, 80, 96)):
        qkv = inputs(seed + step, new, batch=1)
        done += new
        largest = LargestTensor()
        cache.session.around_call = lambda found=largest: found  # type: ignore[misc]
        attention.compiled(cache, *qkv, torch.ones(1, done), groups[:, :done])
    assert cache.stats().sites_rewritten == 1
    assert cache.stats().eager_updates == 0
    # The last call: 96 queries over 400 keys. A square of the new tokens is the most there is.
    assert 0 < largest.elements <= 2 * 96 * 96 < 96 * 400
