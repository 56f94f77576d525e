"""What "auto" becomes at run time is what the plan says, and no fixed setting is much faster."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from harness import CompiledModel, assert_same, clean_dynamo, generate, one_thread, tiny_llama
from headinfer_compile import HeadInferCache, explain
from headinfer_compile.auto_settings import AutoSettings
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.machine import (
    Machine,
    MachineProfile,
    Rates,
    describe,
    load_profile,
    save_profile,
)
from headinfer_compile.model_facts import ModelFacts, facts_of
from headinfer_compile.plan_memory import Request, Settings, memory_of
from headinfer_compile.plan_search import NOT_PROBED, Choice, choose
from headinfer_compile.plan_time import decode_of, prefill_of
from headinfer_compile.planner import make_plan
from headinfer_compile.report_graphs import PlannedGraph, RecordedGraph, Recorder
from model_zoo import FAMILIES

GIB = 1 << 30
LAYERS = 2
#: The rates of an H100 with PCIe 5, rounded.
FAST = Rates(
    h2d=((1 << 20, 35e9), (4 << 20, 49e9), (8 << 20, 53e9), (32 << 20, 54e9)),
    d2h=((1 << 20, 35e9), (32 << 20, 50e9)), hbm=2600e9, matmul=600e12, attention=600e12,
    causal=450e12, dram=117e9, dram_beside_link=85e9,
)  # fmt: skip
ROOMY = Machine("roomy", 80 * GIB, 512 * GIB, Rates())
MACHINES = {
    "slow link": describe(ROOMY, link="4GB/s", tflops=165),
    "fast link": describe(ROOMY, link="60GB/s", tflops=165),
    "fast in all": Machine("fast", 80 * GIB, 512 * GIB, FAST),
    "rates by size": Machine("by size", 80 * GIB, 512 * GIB, replace(Rates(), matmul=8e14)),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Two layers of an 8B model's widths, without weights."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.eval()
    return made


class Steps:
    """Chunks of a prompt as the backend would run them, traced once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        # Facts are collected where rates are known only; every run brings a machine of its own.
        self.recorder = Recorder(HeadInferConfig(lowering="eager"), PlannedGraph, model, ROOMY)
        self.machine = ROOMY
        model.compile(backend=self._backend)
        self.run(ROOMY, 300, 100)

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self.recorder(gm, example_inputs)
        self._use_machine()  # this graph may be made in the middle of a run
        return compiled

    def _use_machine(self) -> None:
        for graph in self.recorder.graphs:
            graph.auto = AutoSettings(self.machine, graph.auto.facts)

    def run(
        self, machine: Machine, context: int, chunk: int, gpu_budget: int = 0
    ) -> tuple[list[tuple[int, int]], int]:
        """The head groups of a prefill as ``Phase.groups`` has them, and the slots."""
        groups: list[tuple[int, int]] = []
        self.machine = machine
        self._use_machine()
        with (
            HeadInferCache(self.model.config, gpu_budget=gpu_budget, host_budget=1 << 50) as cache,
            torch.no_grad(),
        ):
            session = cache.session
            session.reserved = context
            for start in range(0, context, chunk):
                ids = torch.empty(1, min(chunk, context - start), dtype=torch.int64, device="meta")
                self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                group = session.layout("prefill").head_group
                if not groups or groups[-1][1] != group:
                    groups.append((start, group))
            assert session.layout("decode").head_group == self.model.config.num_key_value_heads
            return groups, session.config.slots


@pytest.fixture(scope="module")
def steps(model: PreTrainedModel) -> Steps:
    return Steps(model)


@pytest.fixture(scope="module")
def facts(model: PreTrainedModel) -> ModelFacts:
    return facts_of(model)


def test_the_facts_of_a_graph_are_those_of_its_model(steps: Steps, facts: ModelFacts) -> None:
    assert steps.recorder.graphs
    for graph in steps.recorder.graphs:
        found = graph.auto.facts
        assert found is not None
        for name in ("windows", "num_heads", "num_kv_heads", "row_elements", "itemsize",
                     "weight_bytes"):  # fmt: skip
            assert getattr(found, name) == getattr(facts, name), name
        for name in ("matrix_elements", "head_elements", "read_bytes"):
            assert getattr(found, name) == pytest.approx(getattr(facts, name), rel=1e-3), name
        for part in ("region", "site", "elementwise"):
            mine, its = getattr(found.footprint, part), getattr(facts.footprint, part)
            assert mine == pytest.approx(its, rel=0.01), part


@pytest.mark.parametrize(
    "name", ["Mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Gemma 3", "Qwen3"))]
)
def test_the_products_of_experts_and_the_windows_are_seen(name: str, seed: int) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    model: Any = family.make(seed)
    wanted, recorder = (
        facts_of(model),
        Recorder(HeadInferConfig(lowering="eager"), RecordedGraph, model, ROOMY),
    )
    with clean_dynamo(), HeadInferCache(model.config, gpu_budget=0) as cache, torch.no_grad():
        model.compile(backend=recorder)
        model(torch.zeros(1, 100, dtype=torch.int64), past_key_values=cache, logits_to_keep=1)
    (graph,) = recorder.graphs
    found = graph.auto.facts
    assert found is not None and found.windows == wanted.windows
    for part in ("matrix_elements", "head_elements"):
        assert getattr(found, part) == pytest.approx(getattr(wanted, part), rel=0.1), part


@pytest.mark.parametrize("chunk", [512, 2048])
@pytest.mark.parametrize("name", MACHINES)
def test_the_choice_is_that_of_the_plan(
    steps: Steps, facts: ModelFacts, name: str, chunk: int
) -> None:
    context, budget = 24 * chunk, 4096 * facts.token_bytes
    for gpu_budget in (0, budget):
        request = Request(context, chunk, gpu_budget=gpu_budget)
        choice = make_plan(facts, MACHINES[name], request).choice
        groups, slots = steps.run(MACHINES[name], context, chunk, gpu_budget=gpu_budget)
        print(name, chunk, gpu_budget, groups)
        assert groups == list(choice.prefill.groups)
        assert slots == choice.settings.config.slots == 3


def test_a_small_device_gets_two_slots(steps: Steps, facts: ModelFacts) -> None:
    context, chunk = 4096, 512
    needed = {}
    for count in (2, 3):
        settings = Settings(chunk, HeadInferConfig(num_slots=count))
        request = Request(context, chunk, gpu_budget=0)
        needed[count] = memory_of(facts, ROOMY, request, settings, context).gpu_needed
    assert needed[2] < needed[3]
    for room, slots in ((needed[3], 3), (needed[3] - 1, 2), (needed[2], 2)):
        small = replace(ROOMY, gpu_memory=room)
        made = make_plan(facts, small, Request(context, chunk, gpu_budget=0))
        assert made.settings["num_slots"] == slots
        assert steps.run(small, context, chunk)[1] == slots
    with pytest.raises(DoesNotFitError):
        make_plan(facts, replace(ROOMY, gpu_memory=needed[2] - 1), Request(context, chunk))


def seconds_of(facts: ModelFacts, machine: Machine, request: Request, settings: Settings) -> float:
    """What ``Choice.seconds`` is for fixed settings; infinite where they do not fit."""
    memory = memory_of(facts, machine, request, settings, request.context)
    if memory.shortage is not None:
        return float("inf")
    phases = prefill_of(facts, machine, memory), decode_of(facts, machine, memory)
    return Choice(settings, memory, *phases).seconds


@pytest.mark.parametrize("name", MACHINES)
def test_no_fixed_setting_is_much_faster(name: str) -> None:
    """Over head groups of both phases, slots, and the slot tokens of ``benchmarks/plan_sweep``."""
    machine, worst, gain = MACHINES[name], -1.0, 0.0
    for model_name, context, chunk in itertools.product(
        ("llama-3-8b", "qwen2.5-7b"), (1 << 13, 1 << 17), (1024, 16384)
    ):
        facts = facts_of(model_name)
        heads = facts.num_kv_heads
        groups = [group for group in range(1, heads + 1) if heads % group == 0]
        request = Request(context, chunk, gpu_budget=0)
        auto = choose(facts, machine, request)
        assert isinstance(auto, Choice)
        one = Settings(chunk, HeadInferConfig(head_group={"prefill": 1, "decode": heads}))
        memory = memory_of(facts, machine, request, one, context)
        gain = max(gain, prefill_of(facts, machine, memory).seconds / auto.prefill.seconds - 1)
        settings = [
            HeadInferConfig(head_group={"prefill": prefill, "decode": decode}, num_slots=count)
            for prefill, decode, count in itertools.product(groups, groups, (2, 4))
        ]
        settings += [
            HeadInferConfig(head_group={"prefill": group, "decode": heads}, slot_tokens=tokens)
            for group, tokens in itertools.product(groups, (8192, 32768))
        ]
        for config in settings:
            fixed = seconds_of(facts, machine, request, Settings(chunk, config))
            worst = max(worst, auto.seconds / fixed - 1)
            assert auto.seconds <= 1.03 * fixed, (model_name, context, chunk, config)
    print(
        f"{name}: auto at most {worst:.2%} behind the best, its prefill up to {gain:.0%} ahead of "
        "one head"
    )
    # Where blocks cost the host more than attention the device, one head is no choice.
    assert gain > 0.2 or name != "fast in all"


def test_a_decision_takes_less_than_a_millisecond(steps: Steps) -> None:
    facts = facts_of("llama-2-7b")  # the most head groups
    times = []
    for past in range(1000, 1020):
        auto = AutoSettings(MACHINES["fast in all"], facts)
        with HeadInferCache.from_shape(
            num_layers=32, num_kv_heads=32, head_dim=128, gpu_budget=0, host_budget=1 << 50
        ) as cache:
            session = cache.session
            rows = torch.empty(1, 32, past, 128, dtype=torch.bfloat16, device="meta")
            auto.claim(session, HeadInferConfig())
            geometry = session.geometry_of(rows, rows)
            auto.settle(session, geometry, 0, past)
            session.start(rows, rows, 0, 0)
            session.commit()
            start = time.perf_counter()
            auto.settle(session, geometry, past, 4096)
            times.append(time.perf_counter() - start)
            assert isinstance(session.config.head_group, dict)
            first = time.perf_counter()
            auto.settle(session, geometry, past, 4096)
            again = time.perf_counter() - first
    print(f"{min(times) * 1e6:.0f} us, again {again * 1e6:.0f} us")
    assert min(times) < 1e-3


#: Blocks that cost the host much, so that small groups are slow where they make more of them.
HOST_BOUND = Rates(block_seconds=1.0)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after ``headinfer probe`` on a machine of ``HOST_BOUND``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("headinfer_compile.auto_settings.load_profile", load_profile)
    save_profile(
        MachineProfile(
            device="cpu", rates=HOST_BOUND, gpu_free=0, gpu_total=0, host_available=1 << 34,
            measured_at=time.time(), seconds=1.0, torch_version=torch.__version__,
        )
    )  # fmt: skip


def prefill_groups(llama: CompiledModel, kv_heads: int) -> list[int]:
    """The head groups of all prefill schedules that stream KV."""
    keys = {key for graph in llama.graphs for key in graph.schedules}
    groups = {key.groups for key in keys if key.phase == "prefill" and key.host}
    return sorted(kv_heads // count for count in groups)


@pytest.mark.usefixtures("probed")
def test_the_group_changes_within_a_prompt_and_nothing_else(seed: int) -> None:
    with clean_dynamo(), one_thread():
        llama = CompiledModel(tiny_llama(seed))
        ids, oracle = llama.prompt(seed, 400, 6)
        with llama.cache() as cache:
            # Three heads: a slot of one head has 48 tokens, and a slot of all of them 16.
            run = generate(llama.model, ids, cache, 6, prefill_chunk_size=80)
            assert_same(run, oracle)
            llama.assert_streamed(cache)
            assert prefill_groups(llama, 3) == [1, 3]
            assert "the fastest for this chunk" in cache.session.reasons["head_group.prefill"]
            graphs = len(llama.graphs)
        rings = set()
        with llama.cache() as cache:
            for part in ids.split(80, dim=1):
                llama.forward(part, cache, 80)
                rings.add(id(cache.session.slots))
            # Made with the second chunk, which is the first that streams, and kept.
            assert len(rings) == 2 and cache.session.slots is not None
        assert len(llama.graphs) <= graphs + 2  # logits of all tokens are another graph
        # What the options give stays.
        llama.use(head_group=1, num_slots=2)
        for graph in llama.graphs:
            graph.schedules.clear()
        with llama.cache() as cache:
            assert_same(generate(llama.model, ids, cache, 6, prefill_chunk_size=80), oracle)
            llama.assert_streamed(cache)
            assert prefill_groups(llama, 3) == [1]
            assert cache.session.config.slots == 2
            assert set(cache.session.reasons.values()) == {"given"}


def test_without_a_probe_the_defaults_stay_and_say_so(seed: int) -> None:
    with clean_dynamo(), one_thread():
        llama = CompiledModel(tiny_llama(seed))
        ids, oracle = llama.prompt(seed, 200, 4)
        with llama.cache() as cache:
            assert_same(generate(llama.model, ids, cache, 4, prefill_chunk_size=80), oracle)
            llama.assert_streamed(cache)
            assert prefill_groups(llama, 3) == [1]
            assert cache.session.config == HeadInferConfig(lowering="eager")
            assert cache.session.reasons["head_group.prefill"] == NOT_PROBED
            assert cache.session.reasons["num_slots"] == NOT_PROBED


def test_explain_and_plan_say_what_was_chosen_and_why(model: PreTrainedModel) -> None:
    known = explain(model, context=1024, chunk=512, link="60GB/s", tflops=800)
    step = known.graphs[1].step
    assert step is not None and known.plan is not None
    assert step.head_group == known.plan.settings["head_group"]["prefill"] == 8
    assert "head_group.prefill: the fastest for this chunk, predicted by group 1: " in str(known)
    assert "for each chunk the fastest: 1 after 0 tokens, 8 after 512 tokens" in str(known.plan)
    assert known.plan.to_json()["prefill_groups"] == [[0, 1], [512, 8]]
    unknown = explain(model, context=1024, chunk=512)
    assert unknown.graphs[1].step is not None and unknown.plan is not None
    assert unknown.graphs[1].step.head_group == 1
    assert f"head_group.prefill: {NOT_PROBED}" in str(unknown)
    assert unknown.plan.reasons["head_group.prefill"] == NOT_PROBED
