"""States of linear-attention layers: in step with the cache, whatever happens to a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig

from harness import CompiledModel, assert_same, clean_dynamo, generate
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError
from headinfer_compile.linear_states import LinearStates
from model_zoo import FAMILIES

KINDS = ["linear_attention", "full_attention", "linear_attention"]


def hybrid_cache() -> HeadInferCache:
    config = Qwen3NextConfig(num_hidden_layers=3, layer_types=KINDS, hidden_size=48)
    return HeadInferCache(config, gpu_budget=0)


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
    (family,) = (family for family in FAMILIES if family.name == "Qwen3-Next")
    with clean_dynamo():
        model = CompiledModel(family.make(seed))
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
