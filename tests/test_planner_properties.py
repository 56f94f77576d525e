"""Random machines and models: budgets hold, more memory never hurts, a refusal is right."""

from __future__ import annotations

from dataclasses import replace

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from headinfer_compile.config import HeadInferConfig  # noqa: E402
from headinfer_compile.errors import DoesNotFitError  # noqa: E402
from headinfer_compile.machine import Machine, Rates  # noqa: E402
from headinfer_compile.model_facts import Footprint, ModelFacts  # noqa: E402
from headinfer_compile.plan_memory import Memory, Request, Settings, memory_of  # noqa: E402
from headinfer_compile.plan_search import (  # noqa: E402
    CHUNKS,
    Choice,
    choose,
    choose_slots,
)
from headinfer_compile.plan_time import decode_of, prefill_of  # noqa: E402
from headinfer_compile.planner import Plan, make_plan  # noqa: E402
from headinfer_compile.runtime.block_plan import KEPT_TOKENS  # noqa: E402
from test_planner import check  # noqa: E402

MIB = 1 << 20


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    layers = draw(st.integers(1, 48))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 4, 7]))
    dim = draw(st.sampled_from([64, 128]))
    window = draw(st.sampled_from([None, 128, 4096]))
    windows = tuple(window if i % 2 else None for i in range(layers))
    hidden = heads * dim
    elements = layers * 12 * hidden * hidden
    return ModelFacts(
        name="random", windows=windows, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        v_head_dim=dim, row_elements=2 * dim, hidden=hidden, vocab=32000, itemsize=2,
        weight_bytes=2 * (elements + 64000 * hidden), layer_weight_bytes=2 * elements,
        end_weight_bytes=64000 * hidden, read_bytes=2 * elements, matrix_elements=elements,
        head_elements=32000 * hidden,
        footprint=Footprint(20.0 * hidden, 8.0 * hidden, 20.0 * hidden * layers, False),
        max_positions=None,
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelFacts, Machine]:
    """A model and a machine, mostly one that holds its weights and little more."""
    facts = draw(models())
    scale = draw(st.floats(0.2, 5))
    rates = Rates(
        h2d=((1 << 20, 10e9 * scale), (32 << 20, 25e9 * scale)),
        hbm=draw(st.floats(3e11, 5e12)),
        matmul=draw(st.floats(1e13, 8e14)),
        attention=draw(st.floats(1e13, 8e14)),
    )
    room = draw(st.sampled_from([4096, 1024, 16384, -1024])) + draw(st.integers(0, 2048))
    gpu = max(MIB, facts.weight_bytes + room * MIB)
    host = draw(st.sampled_from([512, 128, 32, 0])) * 1024 + draw(st.integers(0, 1024))
    return facts, Machine("random", gpu, host * MIB, rates)


budgets = st.sampled_from([None, 64 << 30, None, 2 << 30, 0])
requests = st.builds(
    Request,
    context=st.sampled_from([1 << 17, 1 << 19, 1 << 13, 0]).flatmap(
        lambda low: st.integers(low + 1, 2 * low + 9)
    ),
    chunk=st.none() | st.sampled_from([512, 4096, 16384]),
    batch=st.integers(1, 4),
    gpu_budget=budgets,
    host_budget=budgets,
)


def attempt(facts: ModelFacts, machine: Machine, request: Request) -> Plan | None:
    try:
        return make_plan(facts, machine, request)
    except DoesNotFitError:
        return None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), requests)
def test_a_plan_never_exceeds_a_budget(case: tuple[ModelFacts, Machine], request: Request) -> None:
    facts, machine = case
    made = attempt(facts, machine, request)
    if made is not None:
        check(made, machine, request)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), requests, st.integers(1, 32 * 1024))
def test_more_memory_never_makes_a_plan_slower(
    case: tuple[ModelFacts, Machine], request: Request, more: int
) -> None:
    facts, machine = case
    before = attempt(facts, machine, request)
    for name in ("gpu_memory", "host_memory"):
        larger = replace(machine, **{name: getattr(machine, name) + more * MIB})
        after = attempt(facts, larger, request)
        if before is not None:
            assert after is not None
            assert after.seconds <= before.seconds * (1 + 1e-9)
            assert after.max_context >= before.max_context


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), requests)
def test_a_refused_plan_is_infeasible(case: tuple[ModelFacts, Machine], request: Request) -> None:
    facts, machine = case
    if attempt(facts, machine, request) is not None:
        return
    # By hand: the least that any placement needs, without slots, staging or a tail of its own.
    chunk = min(request.chunk or 1024, request.context)
    activations = request.batch * chunk * max(facts.footprint.region, facts.footprint.site)
    host = machine.host_memory if request.host_budget is None else request.host_budget
    host = min(host, machine.host_memory)
    room = machine.gpu_memory - facts.weight_bytes - activations
    gpu = max(0, room) if request.gpu_budget is None else min(request.gpu_budget, max(0, room))
    kept = [
        request.context if window is None else min(request.context, window + KEPT_TOKENS + chunk)
        for window in facts.windows
    ]
    kv = facts.token_bytes // facts.num_layers * request.batch * sum(kept)
    # What the runtime cannot go below: a page of each layer, 256 MiB of workspace, 512 MiB of
    # slack, cuBLAS, two slots, the staging ring and the tail.
    page = 8 * max(32 * MIB, 256 * facts.num_kv_heads * request.batch * facts.head_token_bytes)
    overhead = (256 + 512 + 32 + 64 + 64) * MIB + page
    slab = facts.num_layers * page
    assert room < overhead or kv > host + gpu - overhead - slab


@st.composite
def fixed_settings(draw: st.DrawFn, heads: int) -> Settings:
    groups = st.sampled_from([group for group in range(1, heads + 1) if heads % group == 0])
    config = HeadInferConfig(
        head_group={"prefill": draw(groups), "decode": draw(groups)},
        num_slots=draw(st.integers(2, 4)),
    )
    return Settings(draw(st.sampled_from(CHUNKS)), config)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), requests, st.data())
def test_auto_is_never_far_behind_a_fixed_setting(
    case: tuple[ModelFacts, Machine], request: Request, data: st.DataObject
) -> None:
    facts, machine = case
    auto = choose(facts, machine, request)
    fixed = data.draw(fixed_settings(facts.num_kv_heads))
    if request.chunk is not None:
        fixed = replace(fixed, chunk=request.chunk)
    memory = memory_of(facts, machine, request, fixed, request.context)
    if memory.shortage is None:
        assert isinstance(auto, Choice)
        phases = prefill_of(facts, machine, memory), decode_of(facts, machine, memory)
        assert auto.seconds <= 1.03 * Choice(fixed, memory, *phases).seconds


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), requests)
def test_the_quick_choice_of_slots_is_the_whole_one(
    case: tuple[ModelFacts, Machine], request: Request
) -> None:
    facts, machine = case
    request = replace(request, chunk=request.chunk or 2048)
    found = choose(facts, machine, request)
    memory = found if isinstance(found, Memory) else found.memory
    assert choose_slots(facts, machine, request) == memory.settings.config.slots
