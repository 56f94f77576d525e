"""States of linear-attention layers: in step with the cache, whatever happens to a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Qwen3NextConfig

from harness import CompiledModel, assert_same, clean_dynamo, generate, random_ids
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError
from headinfer_compile.linear_states import LinearStates
from model_zoo import FAMILIES, Family

KINDS = ["linear_attention", "full_attention", "linear_attention"]


def hybrid_cache() -> HeadInferCache:
    config = Qwen3NextConfig(num_hidden_layers=3, layer_types=KINDS, hidden_size=48)
    return HeadInferCache(config, gpu_budget=0)


def family(name: str) -> Family:
    (found,) = (family for family in FAMILIES if family.name == name)
    return found


def feed(cache: HeadInferCache, value: float) -> None:
    """One call's worth of states, as a model leaves them."""
    for layer in (0, 2):
        cache.update_conv_state(torch.full((1, 6, 4), value), layer)
        cache.update_recurrent_state(torch.full((1, 2, 3, 3), value), layer)


def states(cache: HeadInferCache) -> list[float]:
    """One number a state."""
    return [
        float(state.mean())
        for layer in (cache.layers[0], cache.layers[2])
        for state in (layer.conv_states[0], layer.recurrent_states[0])
        if layer.has_previous_state[0]
    ]


@pytest.mark.oldest
def test_layers_are_those_of_transformers() -> None:
    cache = hybrid_cache()
    assert cache.is_linear == [True, False, True]
    assert cache.last_layer == 1
    assert states(cache) == []
    feed(cache, 1.0)
    assert states(cache) == [1.0] * 4
    assert not cache.is_croppable
    cache.reset()
    assert states(cache) == []


def test_layers_without_kv_have_no_pages() -> None:
    cache = hybrid_cache()
    k = torch.zeros(1, 2, 300, 8)
    cache.update(k, k, 1)
    stats = cache.stats()
    assert stats.kv_bytes == 2 * k.nbytes == 300 * stats.tail_bytes // cache.session.tail.tokens
    assert stats.kv_bytes <= stats.host_bytes <= 1024 * stats.kv_bytes // 300
    with pytest.raises(CacheError, match="layer 0 updates a cache whose config has no KV there"):
        cache.update(k, k, 0)
    assert cache.get_seq_length() == 300


def test_a_call_that_is_not_counted_is_undone() -> None:
    cache = hybrid_cache()
    with cache.session.around_call():
        feed(cache, 1.0)
    cache.length = 5
    with cache.session.around_call():
        # Cut short: the length is not counted.
        feed(cache, 2.0)
    assert states(cache) == [2.0] * 4
    with cache.session.around_call():
        assert states(cache) == [1.0] * 4
        feed(cache, 3.0)
    cache.length = 8
    with cache.session.around_call():
        assert states(cache) == [3.0] * 4


def test_crop_is_refused_before_anything_is_dropped() -> None:
    cache = hybrid_cache()
    feed(cache, 1.0)
    cache.length = 5
    with pytest.raises(CacheError, match="linear-attention layers: their states hold every"):
        cache.crop(-2)
    assert cache.get_seq_length() == 5
    cache.crop(0)


def conv_cache() -> HeadInferCache:
    config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    return HeadInferCache(config, gpu_budget=0)


def record(cache: HeadInferCache, start: int, new: int) -> None:
    """Positions as the inputs of a convolution of width 3, counted as a model's last layer does."""
    inputs = torch.arange(float(start), start + new).expand(1, 6, new)
    cache.update_conv_state(inputs, 0, conv_kernel_size=3)
    cache.length = start + new


@pytest.mark.oldest
def test_convolutions_go_back_as_far_as_they_have_recorded() -> None:
    cache = conv_cache()
    cache.activate_past_recording()
    record(cache, 0, 10)
    cache.linear.crop(4)
    cache.length = 6
    held = cache.layers[0].conv_states
    assert held[0][0, 0].tolist() == [3.0, 4.0, 5.0]
    record(cache, 6, 5)
    with pytest.raises(CacheError, match=r"have recorded the newest 5 tokens"):
        cache.linear.crop(6)
    cache.linear.crop(5)
    assert held[0][0, 0].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.oldest
def test_what_was_recorded_is_let_go_when_nothing_is_dropped() -> None:
    cache = conv_cache()
    cache.crop(0)
    cache.activate_past_recording()
    cache.crop(0)
    record(cache, 0, 100)
    cache.crop(0)
    assert cache.layers[0].conv_states[0][0, 0].tolist() == [97.0, 98.0, 99.0]
    with pytest.raises(CacheError, match=r"have recorded the newest 0 tokens"):
        cache.crop(-1)
    assert cache.get_seq_length() == 100


def test_a_call_to_undo_is_undone_after_a_crop_of_nothing() -> None:
    cache = hybrid_cache()
    cache.activate_past_recording()
    with cache.session.around_call():
        feed(cache, 1.0)
    cache.length = 4
    with cache.session.around_call():
        # Cut short: the recurrent states are written, the recorded inputs not yet taken over.
        for layer in (0, 2):
            cache.update_recurrent_state(torch.full((1, 2, 3, 3), 2.0), layer)
    assert states(cache) == [1.0, 2.0] * 2
    cache.crop(0)
    with cache.session.around_call():
        assert states(cache) == [1.0] * 4


@pytest.mark.oldest
def test_all_of_a_short_prompt_can_be_dropped() -> None:
    cache = conv_cache()
    cache.activate_past_recording()
    record(cache, 0, 2)
    cache.linear.crop(2)
    assert cache.layers[0].conv_states[0].shape == (1, 6, 0)


def test_rows_follow_the_beams() -> None:
    cache = hybrid_cache()
    cache.update_conv_state(torch.arange(2.0).view(2, 1, 1).expand(2, 6, 4).clone(), 0)
    cache.linear.reorder(torch.tensor([1, 1]))
    assert float(cache.layers[0].conv_states[0].min()) == 1.0
    assert isinstance(cache.linear, LinearStates)


@pytest.mark.slow
def test_a_failed_call_leaves_a_hybrid_model_intact(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clean_dynamo():
        model = CompiledModel(family("Qwen3-Next").make(seed))
        ids, oracle = model.prompt(seed, 90, 8)
        cache = model.cache()
        with torch.no_grad():
            model.model(ids[:, :40], past_key_values=cache, use_cache=True)
            commit = cache.session.commit

            def fail() -> Any:
                raise RuntimeError("injected")

            monkeypatch.setattr(cache.session, "commit", fail)
            with pytest.raises(RuntimeError, match="injected"):
                model.model(ids[:, 40:80], past_key_values=cache, use_cache=True)
            monkeypatch.setattr(cache.session, "commit", commit)
        assert cache.get_seq_length() == 40
        assert_same(generate(model.model, ids, cache, 8), oracle)
        assert cache.stats().eager_updates == 0


@pytest.mark.slow
def test_prompt_lookup_on_convolutions(seed: int) -> None:
    """Rounds drop tokens of convolutions' states too; another turn goes on from there."""
    with clean_dynamo():
        model = CompiledModel(family("LFM2").make(seed))
        # A text that repeats itself, so that candidates are found.
        after = random_ids(seed, 30).repeat(1, 3)
        ids, oracle = model.prompt(seed, 1, 24, after=after)
        cache = model.cache()
        run = generate(model.model, ids, cache, 24, prompt_lookup_num_tokens=3)
        assert_same(run, oracle)
        layers = [layer for layer in cache.layers if layer is not None]
        assert [layer.conv_states[0].shape[-1] for layer in layers] == [3, 3]
        ids, oracle = model.prompt(seed, 20, 8, after=oracle.tokens)
        assert_same(generate(model.model, ids, cache, 8), oracle)
        model.assert_streamed(cache)
