"""``explain``: what it says of a model is what a real run of that model does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, T5Config

from harness import (
    CompiledModel,
    clean_dynamo,
    dynamo_graphs,
    random_ids,
    register_unknown_attention,
    tiny_llama,
    tiny_mistral,
)
from headinfer_compile import Explanation, HeadInferCache, explain, load_schedule
from headinfer_compile.cli import main
from headinfer_compile.errors import HeadInferError, OptionError
from headinfer_compile.explanation import SiteRun, StepPlan
from headinfer_compile.runtime.slots import SlotRing
from headinfer_compile.site_ops import SiteOp

SIZES = {"page_tokens": 16, "tail_tokens": 8}
PASSES = ["find_attention", "recover_mask", "drop_vmap", "partition"]


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> Iterator[None]:
    with clean_dynamo():
        yield


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Explanation:
    """Three layers, first and later chunk and decode."""
    return of_context(tiny_llama(run_seed, layers=3).config, 100, 32)


def of_context(model: Any, context: int, chunk: int, **kwargs: Any) -> Explanation:
    return explain(model, context=context, chunk=chunk, **{**SIZES, **kwargs})


def gemma(**kwargs: Any) -> Gemma3TextConfig:
    """A config of two layers of which the first attends 24 tokens, the other everything."""
    return Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=2048,
        **kwargs,
    )


def check_slots(step: StepPlan, filled: list[tuple[Any, ...]]) -> None:
    """The transfers of a step, as explained and as run: ring slot, layer, heads and pages."""
    shape, layers = step.shape, len(step.sites)

    def facts(site: SiteRun, op: SiteOp) -> tuple[Any, ...]:
        assert op.slot is not None and op.group is not None
        layer = (site.layer + op.next_layer) % layers
        return (site.base + op.slot) % shape.num_slots, layer, *shape.heads(0, op.group), op.pages

    def ops(site: SiteRun, kind: str) -> list[SiteOp]:
        return [op for op in step.schedules[site.schedule].ops if op.op == kind]

    first = step.sites[0]
    entry = step.schedules[first.schedule].schedule.entry
    cold = [facts(first, op) for op in ops(first, "wait")[:entry]]
    told = [facts(site, op) for site in step.sites for op in ops(site, "prefetch")]
    assert filled == cold + told


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (20_000, {"num_slots": 2, "head_group": 1, "workspace_bytes": 40_000}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(20_000, {}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_that_of_a_real_run(
    seed: int, budget: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan keys, bytes and slots of every step and bytes of every buffer, traced and as run."""
    filled: dict[int, list[tuple[Any, ...]]] = {}
    acquire = SlotRing.acquire

    def note(ring: SlotRing, index: int, after: int, tag: tuple[Any, ...]) -> Any:
        layer, low, high, pages = tag
        rows = tuple((block, rows) for block, _, rows, _ in pages)
        filled.setdefault(start, []).append((index, layer, low, high, rows))
        return acquire(ring, index, after, tag)

    monkeypatch.setattr(SlotRing, "acquire", note)
    context, chunk = 175, 70
    compiled = CompiledModel(tiny_llama(seed), **options)
    ids = random_ids(seed, context + 1)
    with compiled.cache(gpu_budget=budget) as cache:
        moved = {}
        for part in [*ids[:, :context].split(chunk, dim=1), ids[:, context:]]:
            before, start = cache.stats(), cache.length
            with torch.no_grad():
                compiled.model(part, past_key_values=cache)
            after = cache.stats()
            moved[start] = (after.h2d_bytes - before.h2d_bytes, after.d2h_bytes - before.d2h_bytes)
        real = cache.stats()
        carried = len(cache.session.in_flight)
    explanation = of_context(
        compiled.resident.config, context, chunk, options=options, gpu_budget=budget
    )
    run = {key for graph in compiled.graphs for key in graph.schedules}
    for graph in explanation.graphs:
        assert graph.step is not None
        assert {item.schedule.key for item in graph.step.schedules} <= run, graph.name
        h2d, d2h = moved[graph.step.past]
        if graph.step.new == 1:
            # The first decode step also starts transfers of the next one.
            h2d -= carried * graph.step.slot_tokens * graph.step.head_group * 2 * 8 * 4
        assert (graph.step.h2d_bytes, graph.step.d2h_bytes) == (h2d, d2h), graph.name
        check_slots(graph.step, filled.get(graph.step.past, []))
    assert [graph.step.past for graph in explanation.graphs if graph.step] == [0, 70, 175]
    told = explanation.storage
    for name in (
        "tokens", "kv_bytes", "resident_bytes", "host_bytes", "slab_bytes", "slot_bytes",
        "staging_bytes", "tail_bytes", "fixed_bytes", "workspace_bytes", "blocks_by_tier",
    ):  # fmt: skip
        assert getattr(told, name) == getattr(real, name), name
    assert bool(told.resident_bytes) == bool(budget)


def test_a_config_at_a_context(llama: Explanation) -> None:
    assert [graph.name.split(":")[0] for graph in llama.graphs] == [
        "first chunk", "later chunk", "decode",
    ]  # fmt: skip
    assert not llama.declines
    assert len(llama.sites) == 9
    for graph in llama.graphs:
        report = graph.report
        assert [site.layer for site in report.sites] == [0, 1, 2]
        assert [entry.name for entry in report.passes] == PASSES
        assert all("def forward" in entry.text for entry in report.passes)
        assert report.passes[0].ops_changed["headinfer.attention.default"] == 3
        assert (report.regions.num_regions, report.regions.num_unique) == (4, 3)
        kinds = [call.kind for call in graph.calls]
        assert kinds == ["region", *["site", "region"] * 3]
        for site in report.sites:
            assert (site.num_heads, site.num_kv_heads, site.head_dim) == (6, 3, 8)
            assert site.mask is not None and site.mask.causal and site.mask.expr is None
            assert ".py:" in site.source


def test_the_report(llama: Explanation, tmp_path: Path) -> None:
    report = str(llama)
    for words in (
        "3 rewritten, layers 0-2: 6 query heads over 3 KV heads of 8, scale 0.353553",
        "mask: kv <= q + past (proved)",
        "sdpa_attention.py:",
        "4 regions, 3 of them unique",
        "2 times, to region_2:",
        "ops moved into 4 regions",
        "3 slots of 16 tokens, transfers 2 ahead",
        "layers 0-1 attend the new tokens, 0 resident and 4 host KV blocks",
        "as that of layers 0-1, but with 0 transfers started for the next site",
        "# h2d, after release_default",
        "# d2h, after pack_default",
        "100 tokens of context in chunks of 32",
        f"({llama.graphs[2].step.h2d_bytes:,} bytes)",  # type: ignore[union-attr]
    ):
        assert words in report, words
    for number, item in enumerate(llama.schedules):
        path = tmp_path / f"{number}.py"
        path.write_text(item.text, encoding="ascii")
        assert load_schedule(path).key == item.schedule.key
        assert [entry.name for entry in item.passes][-1] == "hoist_prefetch"
    assert json.loads(json.dumps(llama.to_json()))["graphs"][1]["unique_regions"] == 3


def test_windows_and_classes() -> None:
    explanation = of_context(gemma(), 100, 100)
    assert not explanation.declines
    decode = explanation.graphs[1]
    windows = [site.mask.window for site in decode.report.sites if site.mask]
    assert windows == [24, None]
    assert decode.step is not None
    hosts = {item.layers: item.schedule.key.host for item in decode.step.schedules}
    # 100 tokens before in blocks of 16: all of them, or those with the last 23.
    assert {layer: count for layers, count in hosts.items() for layer in layers} == {
        0: 3, 1: 7,
    }  # fmt: skip
    report = str(explanation)
    assert "1 rewritten, layers 0:" in report and "1 rewritten, layers 1:" in report
    assert {call.same_as for call in decode.calls if call.kind == "site"} == {"class 0", "class 1"}


def test_an_attention_that_is_left_alone() -> None:
    config = tiny_llama(0, layers=1).config
    config._attn_implementation = register_unknown_attention()
    explanation = of_context(config, 40, 40)
    graph = explanation.graphs[0]
    assert graph.step is None and not graph.report.sites
    assert [call.kind for call in graph.calls if call.kind != "region"] == ["update_kv"]
    assert "none rewritten" in str(explanation)


def test_a_live_call_leaves_the_model_as_it_was(seed: int) -> None:
    compiled = CompiledModel(tiny_llama(seed))
    ids = random_ids(seed, 60)
    with compiled.cache() as cache, compiled.cache() as other:
        compiled.forward(ids, cache, 30)
        graphs, entry = dynamo_graphs(), compiled.model._compiled_call_impl
        compiled.forward(ids[:, :30], other, 30)
        assert dynamo_graphs() == graphs
        options = {"lowering": "eager"}
        first = explain(compiled.model, ids[:, 30:], past_key_values=other, options=options)
        assert compiled.model._compiled_call_impl is entry
        assert (other.length, first.storage.tokens) == (60, 60)
        assert first.graphs[0].step is not None
        assert first.storage.h2d_bytes == first.graphs[0].step.h2d_bytes > 0
        graphs = dynamo_graphs()
        # What the user compiled is still there, and what explain wrote can be read by it.
        got = compiled.forward(ids[:, :1], other, 1)
        with torch.no_grad():
            want = compiled.resident(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        assert float((got - want).abs().max()) <= 1e-4
        assert dynamo_graphs() <= graphs + 1
        graphs = dynamo_graphs()
        compiled.forward(ids, compiled.cache(), 30)
        assert dynamo_graphs() == graphs


def test_a_live_call_makes_its_own_cache(seed: int) -> None:
    model = tiny_llama(seed)
    explanation = explain(model, random_ids(seed, 30), options={"lowering": "eager"})
    assert model._compiled_call_impl is None
    (graph,) = explanation.graphs
    assert "30 new tokens after 0" in graph.name
    assert explanation.storage.sites_rewritten == 2
    assert all(entry.text for entry in graph.report.passes)
    assert "one call" in str(explanation)


def test_a_live_model_at_a_context_is_not_run(seed: int) -> None:
    model = tiny_mistral(seed, window=20, layers=1).bfloat16()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    explanation = of_context(model, 64, 64)
    assert "bfloat16" in explanation.title
    decode = explanation.graphs[1].report
    assert [site.mask.window for site in decode.sites if site.mask] == [20]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model._compiled_call_impl is None


def test_options_change_the_plan(seed: int) -> None:
    config = tiny_llama(seed, layers=1).config
    straight = {"head_group": 3, "disable_passes": ("hoist_prefetch",)}
    wide = of_context(config, 800, 800, options=straight)
    narrow = of_context(config, 800, 800, options={"head_group": 1})
    keys = [e.schedules[-1].schedule.key for e in (wide, narrow)]
    assert [(key.groups, key.distance) for key in keys] == [(1, 0), (3, 2)]
    assert wide.graphs[1].step.h2d_bytes == narrow.graphs[1].step.h2d_bytes  # type: ignore[union-attr]
    assert "hoist_prefetch" not in [entry.name for entry in wide.schedules[-1].passes]
    # A long schedule is cut in the report only.
    assert len(wide.schedules[-1].text.splitlines()) > 300
    assert "more lines, all of them in Explanation.schedules" in str(wide)
    assert max(len(part.splitlines()) for part in str(wide).split("\n==")) < 200


def test_long_contexts_take_no_memory() -> None:
    """A plan of 1M tokens of a model with 16 GiB of KV per 128K: nothing of it is allocated."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=4096, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, dtype=torch.bfloat16,
    )  # fmt: skip
    stats = explain(config, context="1M").storage
    assert stats.kv_bytes == 1_048_577 * 2 * 8 * 128 * 2
    assert stats.host_bytes >= stats.kv_bytes - stats.tail_bytes
    assert stats.fixed_bytes < 1 << 30


class Other(torch.nn.Module):
    """No transformers model, and without a cache."""

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return x + 1


def test_models_of_one_class_in_one_process() -> None:
    """Dynamo makes a symbol of a float that differs: the scale of a second head size."""
    for dim in (8, 16):
        config = LlamaConfig(
            vocab_size=97, hidden_size=4 * dim, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=dim,
        )  # fmt: skip
        explanation = of_context(config, 40, 40)
        assert [site.scale for site in explanation.sites] == [dim**-0.5] * 2
        assert not explanation.declines


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "error", "message"),
    [
        (gemma(), (), {}, OptionError, "context"),
        (gemma(), (torch.ones(1),), {}, OptionError, "live model"),
        (gemma(), (torch.ones(1),), {"context": 5}, OptionError, "not both"),
        (gemma(), (), {"context": "12Q"}, OptionError, "'12Q'"),
        (gemma(), (), {"context": 0}, OptionError, "context=0"),
        (gemma(), (), {"context": 8, "chunk": True}, OptionError, "chunk=True"),
        (gemma(), (), {"context": 8, "options": {"num_slot": 3}}, OptionError, "num_slots"),
        (gemma(), (), {"context": 8, "gpu_budget": "4XB"}, OptionError, "4XB"),
        (Other(), (), {"context": 8}, OptionError, "Other"),
        (Other(), (torch.ones(1),), {"chunk": 8}, OptionError, "chunk"),
        (Other(), (torch.ones(1),), {}, OptionError, "from_shape"),
        ("no/such/folder/", (), {"context": 8}, OSError, "no/such/folder"),
        ("/no/such/folder", (), {"context": 8}, OptionError, "no such folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(
    model: Any, args: Any, kwargs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(model, *args, **kwargs)


def test_a_model_that_uses_no_cache() -> None:
    cache = HeadInferCache.from_shape(num_layers=1, num_kv_heads=1, head_dim=8)
    with pytest.raises(HeadInferError, match="does not use the cache"):
        explain(Other(), torch.ones(1), past_key_values=cache, options={"lowering": "eager"})


def test_strict_declines_raise() -> None:
    class Uncommon(PretrainedConfig):
        pass

    with pytest.raises((ValueError, HeadInferError)):
        explain(Uncommon(), context=8)
    with pytest.raises((ValueError, HeadInferError)):
        explain(T5Config(), context=8)


# -- command line ---------------------------------------------------------------------------------


def test_command_line(
    llama: Explanation,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report.json"
    args = ["explain", str(tiny_checkpoint), "--context", "1K", "--chunk", "512"]
    options = ["--option", "num_slots=2", "--option", "lowering=eager"]
    assert main([*args, *options, "--json", "-o", str(path)]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [graph["step"]["past"] for graph in record["graphs"]] == [0, 512, 1024]
    assert record["graphs"][2]["step"]["schedules"][0]["key"]["num_slots"] == 2
    assert record["storage"]["tokens"] == 1025
    monkeypatch.setattr("headinfer_compile.report.explain", lambda *_, **__: llama)
    assert main(args) == 0
    assert capfd.readouterr().out == str(llama)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--context"),
        (["--context", "1Q"], "context='1Q'"),
        (["--context", "1K", "--option", "num_slots"], "name=value"),
        (["--context", "1K", "--option", "num_slotz=2"], "num_slots"),
        (["--context", "1K", "--gpu-budget", "much"], "gpu_budget='much'"),
        (["--context", "64", "-o", "/no/such/folder/x"], "--output /no/such/folder/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_usage_errors(
    tiny_checkpoint: Path, args: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(tiny_checkpoint), *args]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in " ".join(err.replace("\u2502", " ").split())
    assert "Traceback" not in err
