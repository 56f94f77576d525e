"""Options as ``model.compile`` passes them, and what the backend says about what it cannot do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    assert_same,
    clean_dynamo,
    dynamo_graphs,
    generate,
    random_ids,
    register_unknown_attention,
    tiny_llama,
)
from headinfer_compile import headinfer
from headinfer_compile.backend import configure_dynamo
from headinfer_compile.errors import DeclinedError, HeadInferError, OptionError

NEW = 4


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    with clean_dynamo():
        yield


def compiled(m: CompiledModel, attention: str = "sdpa", **how: Any) -> Any:
    """Another copy of the model, compiled by the user's one line."""
    config = type(m.resident.config)(**m.resident.config.to_dict())
    model: Any = type(m.resident)(config).eval()
    model.load_state_dict(m.resident.state_dict())
    model.set_attn_implementation(attention)
    model.compile(backend=headinfer, **how)
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"options": {"num_slot": 2}}, "unknown option 'num_slot': did you mean 'num_slots'"),
        (
            {"options": {"workspace_bytes": "1 league"}},
            "workspace_bytes='1 league': not a byte count",
        ),
        (
            {"options": {"workspace_bytes": -1}},
            "workspace_bytes=-1: a byte count cannot be negative",
        ),
        ({"options": {"num_slots": 1}}, "num_slots=1: expected an int of at least 2"),
        ({"options": {"disable_passes": ["verify"]}}, "only hoist_prefetch may be disabled"),
        ({"mode": "fastest"}, "mode='fastest': expected 'default', 'reduce-overhead'"),
    ],
)
def test_bad_options(seed: int, how: dict[str, Any], message: str) -> None:
    m = CompiledModel(tiny_llama(seed))
    cache = m.cache()
    model = compiled(m, **how)
    for _ in range(2):
        with pytest.raises(OptionError, match=message) as error:
            generate(model, random_ids(seed, 20), cache, NEW)
        assert error.value.__cause__ is None
    assert cache.get_seq_length() == 0


def test_options_reach_the_run(seed: int, tmp_path: Path) -> None:
    """Each option changes what it says it changes, through a real compilation."""
    m = CompiledModel(tiny_llama(seed))
    ids, oracle = m.prompt(seed, 70, NEW)
    cache = m.cache()
    options = {
        "lowering": "eager",
        "head_group": {"prefill": 2, "decode": 1},
        "slot_tokens": 32,
        "num_slots": 2,
        "workspace_bytes": "16KB",
        "disable_passes": ["hoist_prefetch"],
        "debug_dir": str(tmp_path / "dump"),
    }
    assert_same(generate(compiled(m, options=options), ids, cache, NEW), oracle)
    stats = m.assert_streamed(cache)
    page_head_bytes = 32 * 2 * 8 * 4
    assert stats.slot_bytes == 2 * 2 * page_head_bytes
    assert stats.workspace_bytes <= 16000
    # Decode: 3 head groups, each over 64 and 6 tokens in blocks of 32, in each of two layers.
    assert stats.op_calls["prefetch"] == (NEW - 1) * 3 * 3 * m.layers
    dumped = sorted(path.name for path in (tmp_path / "dump").iterdir())
    names = {name[4:].removesuffix(".py") for name in dumped}
    assert {"dynamo", "find_attention", "recover_mask", "partition", "insert_transfers"} <= names
    assert "hoist_prefetch" not in names
    assert (tmp_path / "dump").stat().st_mode & 0o077 == 0


def test_options_of_torch_compile_itself_are_left_to_it(seed: int) -> None:
    """Guards of modules dropped, as docs/budgets.md tells: the same tokens, no graph more."""
    m = CompiledModel(tiny_llama(seed))
    ids, oracle = m.prompt(seed, 70, NEW)
    cache = m.cache()
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    model = compiled(m, options={"lowering": "eager", "guard_filter_fn": skip})
    assert_same(generate(model, ids, cache, NEW), oracle)
    m.assert_streamed(cache)
    made = dynamo_graphs()
    cache.reset()
    assert_same(generate(model, ids, cache, NEW), oracle)
    assert dynamo_graphs() == made > 0


def test_inductor_lowering(seed: int) -> None:
    """The default lowering once: the other tests run the regions eagerly."""
    m = CompiledModel(tiny_llama(seed), lowering="inductor")
    cache, ids = m.cache(), random_ids(seed, 46)
    parts = [m.forward(part, cache, 40) for part in (ids[:, :40], *ids[:, 40:].split(1, dim=1))]
    want = m.forward(ids, m.resident_cache(), 46)
    assert float((torch.cat(parts, dim=1) - want).abs().max()) <= MAX_LOGIT_DIFFERENCE
    m.assert_streamed(cache)
    assert [g.report.regions.num_unique for g in m.graphs] == [3, 3]


def test_a_model_without_our_cache(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    m = CompiledModel(tiny_llama(seed))
    ids, oracle = m.prompt(seed, 20, NEW)
    with caplog.at_level(logging.WARNING):
        assert_same(generate(m.model, ids, m.resident_cache(), NEW), oracle)
    messages = [r.message for r in caplog.records if r.name == "headinfer_compile.backend"]
    assert messages
    assert "nothing is offloaded" in messages[0]
    assert "cache=HeadInferCache(model.config)" in messages[0]


def test_an_attention_that_is_not_known(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Declined at its line and exact, or an error if strict."""
    unknown = register_unknown_attention()
    m = CompiledModel(tiny_llama(seed))
    ids, oracle = m.prompt(seed, 40, NEW)
    cache = m.cache()
    model = compiled(m, unknown, options={"lowering": "eager"})
    with caplog.at_level(logging.WARNING):
        assert_same(generate(model, ids, cache, NEW), oracle)
    stats = cache.stats()
    assert stats.materialised_layers == m.layers
    assert stats.sites_rewritten == stats.eager_updates == 0
    declined = [r.message for r in caplog.records if "is left alone" in r.message]
    assert declined
    assert all("harness.py" in message for message in declined), declined

    cache = m.cache()
    strict = compiled(m, unknown, options={"lowering": "eager", "strict": True})
    with pytest.raises(DeclinedError, match=r"harness\.py:\d+"):
        generate(strict, ids, cache, NEW)
    assert_same(generate(m.model, ids, cache, NEW), oracle)
    m.assert_streamed(cache)


def test_two_caches_in_one_call(seed: int) -> None:
    m = CompiledModel(tiny_llama(seed))
    caches = [m.cache(), m.cache()]
    attend = torch.nn.functional.scaled_dot_product_attention

    @torch.compile(backend=headinfer, options={"lowering": "eager"})
    def call(q: torch.Tensor) -> torch.Tensor:
        for cache in caches:
            k, v = cache.update(q, q, 1)
            q = attend(q, k, v, is_causal=True)
        return q

    with torch.no_grad(), pytest.raises(HeadInferError, match="one call uses two HeadInferCaches"):
        call(torch.randn(1, 3, 5, 8))


def test_dynamo_settings_can_be_restored() -> None:
    dynamo: Any = torch._dynamo.config
    compiler: Any = torch.compiler.config

    def settings() -> tuple[Any, ...]:
        return compiler.dynamic_sources, dynamo.recompile_limit, dynamo.specialize_float

    ours = settings()
    with (
        dynamo.patch(recompile_limit=3, specialize_float=False),
        compiler.patch(dynamic_sources="L['mine']"),
    ):
        restore = configure_dynamo()
        assert "L['mine']" in compiler.dynamic_sources.split(",")
        assert settings()[1:] == ours[1:]
        restore()
        assert settings() == ("L['mine']", 3, False)
    assert settings() == ours


def test_a_user_limit_above_ours_is_kept() -> None:
    with torch._dynamo.config.patch(recompile_limit=1000):
        restore = configure_dynamo()
        assert torch._dynamo.config.recompile_limit == 1000
        restore()
    assert dynamo_graphs() == 0
