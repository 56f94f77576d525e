"""Wrong use of a cache: a clear error each, and what is stored goes on as before."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MambaConfig, T5Config

from harness import (
    CHUNKED_TURNS,
    CompiledModel,
    assert_same,
    clean_dynamo,
    generate,
    random_ids,
    tiny_llama,
)
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.errors import (
    CacheError,
    ClosedError,
    DoesNotFitError,
    HeadInferError,
    OptionError,
)

NEW = 4
PROMPT = 40
HELD = PROMPT + NEW - 1


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Iterator[CompiledModel]:
    """One compiled model with two layers and 3 KV heads for all tests of this module."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed))


@pytest.fixture
def used(llama: CompiledModel, seed: int) -> tuple[HeadInferCache, Tensor]:
    """A cache that holds ``HELD`` tokens and the conversation so far."""
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW), oracle)
    return cache, oracle.tokens


def assert_intact(llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]) -> None:
    """Assert that the conversation continues with the resident model's tokens."""
    cache, tokens = used
    assert cache.get_seq_length() == cache.stats().tokens == HELD
    ids, oracle = llama.prompt(seed + 1, 7, NEW, after=tokens)
    assert_same(generate(llama.model, ids, cache, NEW), oracle)
    llama.assert_streamed(cache)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({}, "holds 43 tokens of another model: use one cache per model"),
        ({"head_dim": 16}, "of another model"),
        ({"layers": 1}, "layers up to 0 and the cache expects layers up to 1.*another model"),
        ({"layers": 3}, "layers up to 2 and the cache expects layers up to 1.*another model"),
    ],
)
def test_a_cache_of_another_model(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor], shape: dict[str, int],
    message: str,
) -> None:  # fmt: skip
    cache, tokens = used
    other = CompiledModel(tiny_llama(seed, **shape))
    ids = torch.cat([tokens, random_ids(seed, 3)], 1)
    with pytest.raises(CacheError, match=message):
        generate(other.model, ids, cache, NEW)
    assert_intact(llama, seed, used)


def test_a_cache_may_change_models_when_it_is_empty(llama: CompiledModel, seed: int) -> None:
    """Reset it, use another model, and the first model is refused until the next reset."""
    other = CompiledModel(tiny_llama(seed, head_dim=16))
    cache = llama.cache()
    for m in (llama, other, llama):
        ids, oracle = m.prompt(seed, PROMPT, NEW)
        assert_same(generate(m.model, ids, cache, NEW), oracle)
        m.assert_streamed(cache)
        wrong = other if m is llama else llama
        with pytest.raises(CacheError, match="of another model"):
            generate(wrong.model, torch.cat([oracle.tokens, ids], 1), cache, NEW)
        cache.reset()


def test_a_cache_made_for_fewer_layers_used_uncompiled(llama: CompiledModel, seed: int) -> None:
    larger = tiny_llama(seed, layers=3)
    with pytest.raises(CacheError, match="layer 2 updates a cache whose last layer is 1"):
        generate(larger, random_ids(seed, 5), llama.cache(), NEW)


def test_the_batch_changes(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]
) -> None:
    cache, tokens = used
    ids = torch.cat([tokens, random_ids(seed, 3)], 1).repeat(2, 1)
    with pytest.raises(
        CacheError, match="batch=1, and K and V came with batch=2: batch size changed"
    ):
        generate(llama.model, ids, cache, NEW)
    assert_intact(llama, seed, used)


def test_the_dtype_changes(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]
) -> None:
    cache, _ = used
    k = torch.zeros(1, 3, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(CacheError, match=r"dtype=torch.float32, .*dtype=torch.bfloat16.*intact"):
        cache.update(k, k, 0)
    assert_intact(llama, seed, used)


def test_another_device_than_asked_for(llama: CompiledModel, seed: int) -> None:
    cache = llama.cache(device="cuda:1")
    with pytest.raises(CacheError, match="came on cpu and this cache was made with device=cuda:1"):
        generate(llama.model, random_ids(seed, PROMPT), cache, NEW)
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    assert_same(generate(llama.model, ids, llama.cache(device="cpu"), NEW), oracle)


def test_a_training_forward(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]
) -> None:
    cache, tokens = used
    with torch.enable_grad(), pytest.raises(HeadInferError, match="for inference only: call the"):
        llama.model(tokens[:, HELD:], past_key_values=cache, use_cache=True)
    assert_intact(llama, seed, used)


def test_host_memory_for_the_next_page(llama: CompiledModel, seed: int) -> None:
    """The budget ends in mid-decode: the tokens so far stay, and room can be made."""
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    cache = llama.cache(host_budget=48 * llama.token_bytes)
    assert_same(generate(llama.model, ids, cache, NEW), oracle)
    long = torch.cat([oracle.tokens, random_ids(seed, 20)], 1)
    with pytest.raises(
        DoesNotFitError, match=r"64 tokens need .* host_budget is .*at most 48 tokens"
    ):
        generate(llama.model, long, cache, NEW)
    assert cache.get_seq_length() == cache.stats().tokens == HELD
    # 44 tokens, one more, and three of the four that follow are all that 48 have room for.
    ids, oracle = llama.prompt(seed, 1, NEW, after=oracle.tokens)
    assert_same(generate(llama.model, ids, cache, NEW), oracle)
    assert llama.assert_streamed(cache).tokens == 48


@pytest.mark.parametrize("held", [False, True])
def test_host_memory_for_a_known_length(llama: CompiledModel, seed: int, held: bool) -> None:
    """``reserve`` refuses before anything is computed, whether or not the geometry is known."""
    cache = llama.cache(host_budget=96 * llama.token_bytes)
    if held:
        generate(llama.model, random_ids(seed, PROMPT), cache, NEW)
    before = cache.stats()
    cache.reserve(96)
    with pytest.raises(DoesNotFitError, match=r"97 tokens .*at most 96 tokens"):
        cache.reserve(97)
    assert cache.stats() == before


@pytest.mark.gpu
def test_device_memory_for_the_fixed_bytes(seed: int) -> None:
    cache = HeadInferCache(
        LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, head_dim=64, num_attention_heads=2),
        gpu_budget=0,
        tail_tokens=torch.cuda.mem_get_info()[1] // 1024,
    )
    k = torch.zeros(1, 2, 1, 64, device="cuda")
    with pytest.raises(DoesNotFitError, match=r"no room for the fixed buffers: .*GiB"):
        cache.update(k, k, 0)


def test_a_closed_cache(llama: CompiledModel, seed: int) -> None:
    with llama.cache() as cache:
        generate(llama.model, random_ids(seed, PROMPT), cache, NEW)
    cache.close()
    with pytest.raises(ClosedError, match="was closed and holds nothing: make a new one"):
        generate(llama.model, random_ids(seed, PROMPT), cache, NEW)
    with pytest.raises(ClosedError, match="was closed"):
        cache.reserve(1)


@pytest.mark.parametrize("count", [1, -44])
def test_bad_crops(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor], count: int
) -> None:
    with pytest.raises(CacheError, match=rf"crop\({count}\) on 43 tokens: pass minus the number"):
        used[0].crop(count)
    assert_intact(llama, seed, used)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor],
    copying: Callable[[Any], Any],
) -> None:  # fmt: skip
    with pytest.raises(CacheError, match=r"cannot be copied or pickled.*crop\(-n\)"):
        copying(used[0])
    assert_intact(llama, seed, used)


def test_rows_that_there_are_not(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]
) -> None:
    for rows in ([1], [0, -2], []):
        with pytest.raises(CacheError, match=r"the cache holds rows 0 to 0: nothing was changed"):
            used[0].reorder_cache(torch.tensor(rows, dtype=torch.int64))
    with pytest.raises(CacheError, match=r"batch_repeat_interleave\(0\): expected a count"):
        used[0].batch_repeat_interleave(0)
    used[0].reorder_cache(torch.tensor([0]))
    assert_intact(llama, seed, used)


def test_models_without_a_cache_of_this_kind() -> None:
    with pytest.raises(CacheError, match="T5Config is an encoder-decoder"):
        HeadInferCache(T5Config())
    with pytest.raises(
        CacheError, match="MambaConfig has no attention layer: it keeps no KV cache"
    ):
        HeadInferCache(MambaConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_budget": "4 parsecs"}, "gpu_budget='4 parsecs': not a byte count"),
        ({"gpu_budget": -1}, "gpu_budget=-1: a byte count cannot be negative"),
        ({"host_budget": 1.5}, "host_budget=1.5: expected bytes"),
        ({"host_budget": "1.5 GiBs"}, "host_budget='1.5 GiBs': not a byte count"),
        ({"page_tokens": 0}, "page_tokens=0: expected 'auto' or a count of at least 1"),
        ({"tail_tokens": "many"}, "tail_tokens='many'"),
        ({"tail_tokens": True}, "tail_tokens=True"),
    ],
)
def test_bad_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HeadInferCache(LlamaConfig(num_hidden_layers=1), **options)
    for good in (0, "auto", "4GB", "1.5GiB", 10**12):
        HeadInferCache(LlamaConfig(num_hidden_layers=1), gpu_budget=good)


def test_an_uncompiled_model(
    llama: CompiledModel, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Exact, one warning, an error if strict; ``torch.compile(model).generate`` is such a model."""
    ids, oracle = llama.prompt(seed, PROMPT, NEW)
    fresh = type(llama.resident)(llama.resident.config).eval()
    fresh.load_state_dict(llama.resident.state_dict())
    model: Any = torch.compile(fresh, backend=headinfer, options={"lowering": "eager"})
    cache = llama.cache()
    with caplog.at_level(logging.WARNING):
        assert_same(generate(model, ids, cache, NEW), oracle)
    warnings = [r.message for r in caplog.records if r.name == "headinfer_compile.cache"]
    assert len(warnings) == 1
    assert "not compiled" in warnings[0]
    assert "model.compile(backend='headinfer')" in warnings[0]
    assert "torch.compile(model).generate reaches the uncompiled module" in warnings[0]
    assert cache.stats().eager_updates == NEW * llama.layers
    assert cache.stats().sites_rewritten == 0
    with pytest.raises(CacheError, match=r"not compiled.*strict=True"):
        generate(model, ids, llama.cache(strict=True), NEW)
    # A compiled model takes over what an uncompiled one has stored.
    cache = llama.cache()
    generate(fresh, ids, cache, NEW)
    ids, oracle = llama.prompt(seed, 9, NEW, after=oracle.tokens)
    assert_same(generate(llama.model, ids, cache, NEW), oracle)


@pytest.mark.oldest
@pytest.mark.skipif(CHUNKED_TURNS, reason="fixed in transformers 5.21")
def test_a_second_chunked_turn_on_old_transformers(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor]
) -> None:
    cache, tokens = used
    ids = torch.cat([tokens, random_ids(seed, 30)], 1)
    with pytest.raises(CacheError, match=r"start at position 0 again.*leave it out"):
        generate(llama.model, ids, cache, NEW, prefill_chunk_size=16)
    assert_intact(llama, seed, used)


def test_an_error_in_the_middle_of_a_forward(
    llama: CompiledModel, seed: int, used: tuple[HeadInferCache, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Layer 0 has stored its rows when layer 1 fails; the step is forgotten as a whole."""
    cache, tokens = used
    session = cache.session
    written = session.written_event

    def fail(layer: int) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return written(layer)

    for count in (1, 30):
        monkeypatch.setattr(session, "written_event", fail)
        ids = torch.cat([tokens, random_ids(seed, count)], 1)
        with pytest.raises(KeyboardInterrupt):
            generate(llama.model, ids, cache, NEW)
        monkeypatch.undo()
        assert cache.stats().tokens == HELD
    assert_intact(llama, seed, used)
