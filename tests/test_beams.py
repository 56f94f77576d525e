"""Beams and samples of one prompt: equal tokens, and the bytes of one row for what they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fault_injection import Lines
from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    clean_dynamo,
    dynamo_graphs,
    generate,
    random_ids,
    tiny_llama,
    tiny_mistral,
)
from headinfer_compile import HeadInferCache
from headinfer_compile.simulator import simulated
from model_zoo import FAMILIES

NEW = 12


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Iterator[CompiledModel]:
    """One compiled model with 3 KV heads for all tests of this module."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed))


def beams(
    model: Any, ids: Tensor, cache: Any, num_beams: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Sequences and their scores."""
    out = model.generate(
        ids, past_key_values=cache, num_beams=num_beams, return_dict_in_generate=True,
        output_scores=True, pad_token_id=97,
        **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options},
    )  # fmt: skip
    return out.sequences, out.sequences_scores


def check_beams(
    m: CompiledModel,
    seed: int,
    cache: HeadInferCache,
    num_beams: int,
    tokens: int = 90,
    **options: Any,
) -> None:
    ids = random_ids(seed, tokens, options.pop("batch", 1))
    sampled = options.get("do_sample", False)
    torch.manual_seed(seed)
    want, want_scores = beams(m.resident, ids, m.resident_cache(), num_beams, **options)
    torch.manual_seed(seed)
    got, scores = beams(m.model, ids, cache, num_beams, **options)
    assert torch.equal(got, want), "sampled" if sampled else "searched"
    assert float((scores - want_scores).abs().max()) <= MAX_LOGIT_DIFFERENCE
    m.assert_streamed(cache)


@pytest.mark.oldest
@pytest.mark.parametrize("chunk", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_beam_search(llama: CompiledModel, seed: int, chunk: int | None) -> None:
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    check_beams(llama, seed, llama.cache(), 4, **options)


def test_beams_of_several_prompts_and_returned_beams(llama: CompiledModel, seed: int) -> None:
    check_beams(llama, seed, llama.cache(), 3, batch=2, num_return_sequences=2)


@pytest.mark.slow
def test_sampled_beams(llama: CompiledModel, seed: int) -> None:
    check_beams(llama, seed, llama.cache(tail_tokens=3), 3, do_sample=True, top_k=20)


LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"gpu_budget": 40_000, "tail_tokens": 1}, {"num_slots": 3}),
    ({"gpu_budget": 1 << 30}, {}),
    ({"page_tokens": 64, "tail_tokens": 5}, {"head_group": 1}),
    ({"page_tokens": 32}, {"workspace_bytes": 16000, "slot_tokens": 96}),
]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [LAYOUTS[0], *(pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])],
)
def test_beams_in_all_layouts(
    llama: CompiledModel, seed: int, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    llama.use(**options)
    ids = random_ids(seed, 70)
    cache = llama.cache(**sizes)
    want = beams(llama.resident, ids, llama.resident_cache(), 4, max_new_tokens=30)
    got = beams(llama.model, ids, cache, 4, max_new_tokens=30)
    assert torch.equal(got[0], want[0])
    llama.assert_streamed(cache, resident=sizes.get("gpu_budget") == 1 << 30)
    llama.use()


def test_samples_of_one_prompt(llama: CompiledModel, seed: int) -> None:
    """``num_return_sequences``: the prompt is stored once and streamed once for all of them."""
    llama.use(disable_passes=("hoist_prefetch",))
    ids = random_ids(seed, 128)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 4, "top_k": 30}
    torch.manual_seed(seed)
    want = generate(llama.resident, ids, llama.resident_cache(), NEW, **options)
    cache = llama.cache(tail_tokens=32)
    torch.manual_seed(seed)
    got = generate(llama.model, ids, cache, NEW, prefill_chunk_size=70, **options)
    assert torch.equal(got.tokens, want.tokens)
    assert len({tuple(row) for row in got.tokens.tolist()}) > 1
    stats = llama.assert_streamed(cache)
    # One chunk is read by the second chunk, the whole prompt by each token after the first.
    assert stats.h2d_bytes == (70 + (NEW - 1) * 128) * llama.token_bytes
    assert stats.d2h_bytes == stats.host_bytes == 128 * llama.token_bytes
    assert stats.kv_bytes == 4 * (128 + NEW - 1) * llama.token_bytes
    llama.use()


def logits(m: CompiledModel, ids: Tensor, cache: Any) -> Tensor:
    """The logits of one direct call."""
    return m.forward(ids, cache, ids.shape[1])


def assert_rows(got: Tensor, m: CompiledModel, ids: Tensor) -> None:
    """Assert the last logits of conversations, each computed by itself."""
    for row, conversation in enumerate(ids):
        want = logits(m, conversation[None], m.resident_cache())[:, -got.shape[1] :]
        assert float((got[row] - want).abs().max()) <= MAX_LOGIT_DIFFERENCE


def test_rows_of_the_batch_in_any_order(llama: CompiledModel, seed: int) -> None:
    """Reorder, select and repeat rows between steps; every row goes on as its own conversation."""
    ids = torch.cat([random_ids(seed, 70).expand(3, -1), random_ids(seed + 1, 70)])
    cache = llama.cache(tail_tokens=4)
    assert_rows(logits(llama, ids, cache), llama, ids)
    assert cache.stats().host_bytes == 2 * 80 * llama.token_bytes
    changes: list[tuple[str, Any, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 3, 3], dtype=torch.int32), [2, 0, 3, 3]),
        ("reorder_cache", torch.tensor([1, 1, 0, 2]), [1, 1, 0, 2]),
        ("batch_select_indices", torch.tensor([3, 0]), [3, 0]),
        ("batch_repeat_interleave", 3, [0, 0, 0, 1, 1, 1]),
        ("batch_select_indices", torch.tensor([True, False, False, True, True, False]), [0, 3, 4]),
        ("reorder_cache", torch.tensor([2, 1, 0]), [2, 1, 0]),
    ]
    for number, (method, argument, rows) in enumerate(changes):
        getattr(cache, method)(argument)
        assert cache.batch_size == len(rows)
        # One token each time, then a few at once; pages and tail are filled on the way.
        new = random_ids(seed + number, 1 if number % 2 else 3, len(rows))
        ids = torch.cat([ids[rows], new], 1)
        assert_rows(logits(llama, new, cache), llama, ids)
    new = random_ids(seed, 30, 3)
    ids = torch.cat([ids, new], 1)
    assert_rows(logits(llama, new, cache), llama, ids)
    llama.assert_streamed(cache)


def test_unlike_rows_in_any_order(llama: CompiledModel, seed: int) -> None:
    """A reorder changes what the transfers in flight should have brought: their tags tell."""
    ids = random_ids(seed, 40, 3)
    cache = llama.cache(tail_tokens=6)
    logits(llama, ids, cache)
    for number, rows in enumerate(([2, 0, 1], [0, 1, 2], [1, 1, 0], [2, 1, 0], [0, 2, 1])):
        new = random_ids(seed + number, 1, 3)
        ids = torch.cat([ids, new], 1)
        assert_rows(logits(llama, new, cache), llama, ids)
        assert cache.session.in_flight
        cache.reorder_cache(torch.tensor(rows))
        ids = ids[rows]
    llama.assert_streamed(cache)


@pytest.mark.parametrize(
    "method",
    ["batch_select_indices", pytest.param("reorder_cache", marks=pytest.mark.slow)],
)
def test_a_change_of_rows_that_is_interrupted(llama: CompiledModel, seed: int, method: str) -> None:
    """Ctrl-C at any line leaves the old rows or, at the next call, the new ones."""
    ids, kept = random_ids(seed, 40, 3), [2, 0, 1] if method == "reorder_cache" else [2, 0]

    def changed(at: int | None) -> tuple[HeadInferCache, Lines, bool]:
        cache = llama.cache(tail_tokens=6)
        logits(llama, ids[:, :36], cache)
        logits(llama, ids[:, 36:], cache)
        try:
            with Lines(at) as lines:
                getattr(cache, method)(torch.tensor(kept))
        except KeyboardInterrupt:
            return cache, lines, True
        return cache, lines, False

    _, counted, _ = changed(None)
    found = set()
    for at in range(0, counted.count, max(1, counted.count // 8)):
        cache, lines, interrupted = changed(at)
        assert interrupted
        new = random_ids(seed + 1, 1, cache.batch_size)
        got = logits(llama, new, cache)
        for rows in ([0, 1, 2], kept):
            if len(rows) == len(new):
                want = logits(llama, torch.cat([ids[rows], new], 1), llama.resident_cache())
                if float((got - want[:, -1:]).abs().max()) <= MAX_LOGIT_DIFFERENCE:
                    found.add(tuple(rows))
                    break
        else:
            raise AssertionError(f"neither the old rows nor the new ones after {lines.place}")
    assert found == {(0, 1, 2), tuple(kept)}


def test_beams_of_prompts_of_unequal_length(llama: CompiledModel, seed: int) -> None:
    """Rows of one prompt have one padding: they share, and the mask is applied to each."""
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :23] = 0
    ids = random_ids(seed, 60, 2)
    options: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": NEW}
    options |= {"min_new_tokens": NEW, "do_sample": False, "pad_token_id": 97}
    cache, model, resident = llama.cache(), cast(Any, llama.model), cast(Any, llama.resident)
    got = model.generate(ids, past_key_values=cache, prefill_chunk_size=32, **options)
    assert torch.equal(got, resident.generate(ids, **options))
    stats = llama.assert_streamed(cache)
    # Both prompts, their last page cut short, and the pages of six rows after it.
    assert stats.host_bytes <= (2 * 64 + 6 * 16) * llama.token_bytes


@pytest.mark.slow
def test_beams_under_a_window(seed: int) -> None:
    m = CompiledModel(tiny_mistral(seed, 20))
    check_beams(m, seed, m.cache(), 3)
    check_beams(m, seed, m.cache(gpu_budget=40_000), 4, tokens=15, max_new_tokens=30)


def test_one_prompt_read_once_for_all_beams(llama: CompiledModel, seed: int) -> None:
    """Prefill with one row, then repeat it: nothing is copied, and the beams share the prompt."""
    ids = random_ids(seed, 97)
    cache = llama.cache(tail_tokens=24)
    logits(llama, ids[:, :96], cache)
    cache.batch_repeat_interleave(4)
    want = beams(llama.resident, ids, llama.resident_cache(), 4)
    got = beams(llama.model, ids, cache, 4)
    assert torch.equal(got[0], want[0])
    stats = llama.assert_streamed(cache)
    assert stats.host_bytes == stats.d2h_bytes == 96 * llama.token_bytes
    page = 16 * llama.token_bytes // llama.layers
    # The transfers that the last step has started for the next one are all that is read besides.
    assert 0 <= stats.h2d_bytes - NEW * 96 * llama.token_bytes <= 2 * page
    # Back to the prompt, with one row again.
    cache.crop(96 - cache.get_seq_length())
    cache.batch_select_indices(torch.tensor([2]))
    assert_rows(logits(llama, ids[:, 96:], cache), llama, ids)


class _Uneven(torch.nn.Module):
    """Treats each row of the batch in another way."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + torch.arange(x.shape[0], device=x.device) / 100
        return self.inner(x) * scale[:, None, None]  # type: ignore[no-any-return]


def test_a_model_that_treats_equal_rows_unlike(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """The K and V of the first layer are equal and those of the second are not."""
    m = CompiledModel(tiny_llama(seed))
    for model in (m.model, m.resident):
        layer: Any = model.model.layers[1]
        layer.input_layernorm = _Uneven(layer.input_layernorm)
    ids = random_ids(seed, 60).expand(3, -1)
    cache, resident = m.cache(), m.resident_cache()
    for part in (ids[:, :40], ids[:, 40:], ids[:, :1]):
        got, want = logits(m, part, cache), logits(m, part, resident)
        assert float((got - want).abs().max()) <= MAX_LOGIT_DIFFERENCE
        assert float((got[0] - got[2]).abs().max()) > 100 * MAX_LOGIT_DIFFERENCE
    assert "call is made again" in caplog.text
    assert m.assert_streamed(cache).host_bytes >= 3 * 60 * m.token_bytes


def test_rows_that_differ_only_in_their_mask(llama: CompiledModel, seed: int) -> None:
    """Equal tokens under unlike padding are no equal rows."""
    ids = random_ids(seed, 50).expand(2, -1)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :7] = 0
    cache = llama.cache()
    run = generate(llama.model, ids, cache, 4, attention_mask=mask)
    oracle = generate(llama.resident, ids, llama.resident_cache(), 4, attention_mask=mask)
    assert torch.equal(run.tokens, oracle.tokens)
    assert llama.assert_streamed(cache).host_bytes >= 2 * 50 * llama.token_bytes


def turns(m: CompiledModel, cache: HeadInferCache, seed: int) -> list[Tensor]:
    """Logits of a prompt of three equal rows and of steps with reorders between them."""
    rows = torch.Generator().manual_seed(seed)
    found = []

    def step(ids: Tensor) -> None:
        # Nothing may be computed from the logits: in a simulation they may not be there yet.
        with torch.no_grad():
            found.append(m.model(ids, past_key_values=cache, use_cache=True).logits)

    step(random_ids(seed, 40).expand(3, -1))
    for number in range(9):
        step(random_ids(seed + number, 12 if number == 6 else 1, 3))
        cache.reorder_cache(torch.randint(0, 3, (3,), generator=rows))
    cache.batch_repeat_interleave(2)
    for number in range(3):
        step(random_ids(seed + number, 1, 6))
    return found


def test_rows_in_any_order_of_the_streams(llama: CompiledModel, seed: int) -> None:
    """Tags and page lifetimes hold when rows change: no race, bitwise the same in every order."""
    sizes = {"tail_tokens": 3, "page_tokens": 8}
    with llama.cache(**sizes) as cache:
        wanted = turns(llama, cache, seed)
    for order in range(2):
        with llama.cache(**sizes) as cache:
            with simulated(cache, seed=order, synchronize=bool(order % 2)) as simulation:
                found = turns(llama, cache, seed)
            assert simulation.edges["compute waits for slot.filled"] > 10
            simulation.log.check()
        assert all(map(torch.equal, found, wanted)), f"seed {order}"


def test_beams_compile_nothing_new(llama: CompiledModel, seed: int) -> None:
    """The graphs of a batch serve any number of beams."""
    check_beams(llama, seed, llama.cache(), 2, tokens=70)
    compiled = dynamo_graphs()
    for num_beams, tokens in ((3, 81), (5, 70)):
        check_beams(llama, seed, llama.cache(), num_beams, tokens=tokens)
        assert dynamo_graphs() == compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt-oss", "Gemma 2", "DeepSeek-V3", "Falcon (MQA)", "Qwen3-Next"]
)
def test_beams_of_other_families(seed: int, name: str) -> None:
    """Sinks, soft caps, expanded K and V, one KV head, states of linear layers."""
    (family,) = (family for family in FAMILIES if family.name == name)
    if family.missing():
        pytest.skip(str(family.missing()))
    m = CompiledModel(family.make(seed))
    ids, cache = random_ids(seed, 70), m.cache()
    want = beams(m.resident, ids, m.resident_cache(), 3)
    got = beams(m.model, ids, cache, 3)
    assert torch.equal(got[0], want[0])
    stats = cache.stats()
    assert stats.eager_updates == 0 and stats.materialised_layers == 0
    assert stats.sites_rewritten > 0 and stats.h2d_bytes > 0
