"""The predicted time line: its rules, and what it says of a step that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import clean_dynamo, tiny_llama
from headinfer_compile import Explanation, explain
from headinfer_compile.explanation import StepPlan
from headinfer_compile.known_models import known_config
from headinfer_compile.machine import Machine, Rates
from headinfer_compile.prediction import Prediction, RegionWork, StepCall, op_seconds, predict

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> Iterator[None]:
    with clean_dynamo():
        yield


@pytest.fixture(scope="module")
def explanation(run_seed: int) -> Explanation:
    return explain(
        tiny_llama(run_seed, layers=2).config, context=96, chunk=96, page_tokens=16,
        tail_tokens=8, options={"head_group": 2},
    )  # fmt: skip


def steps(explanation: Explanation) -> list[StepPlan]:
    return [graph.step for graph in explanation.graphs if graph.step is not None]


def calls_of(step: StepPlan) -> list[StepCall]:
    """The sites of a step, with nothing between them."""
    return [
        (site.layer, step.schedules[site.schedule].schedule, step.schedules[site.schedule].ops)
        for site in step.sites
    ]


def test_streams_run_in_order_and_wait_for_their_events(explanation: Explanation) -> None:
    for step in steps(explanation):
        prediction = step.prediction
        streams: dict[str, float] = {}
        for site in prediction.sites:
            ends = {time.op.name: time.end for time in site.ops}
            seen = {time.op.name for time in site.ops}
            for time in site.ops:
                assert time.start >= streams.get(time.op.stream, 0.0)
                streams[time.op.stream] = time.end
                for edge in time.op.after:
                    if edge.op in seen:
                        assert time.start >= ends[edge.op], (time.op.name, edge)
        busy = sum(
            time.end - time.start
            for site in prediction.sites for time in site.ops if time.op.stream == "h2d"
        )  # fmt: skip
        assert prediction.h2d_seconds == pytest.approx(busy)
        assert prediction.seconds == pytest.approx(
            prediction.attention_seconds
            + prediction.region_seconds
            + prediction.exposed_wait_seconds
        )


def test_a_slower_link_is_what_limits(explanation: Explanation) -> None:
    decode = steps(explanation)[-1]
    machine = Machine("test", 0, 0, Rates(h2d=((1, 1e6),), hbm=1e15, matmul=1e18, attention=1e18))
    slow = predict(calls_of(decode), machine, chained=True)
    assert slow.limit == "link"
    assert slow.seconds == pytest.approx(decode.h2d_bytes / 1e6, rel=1e-3)
    assert slow.link_utilisation == pytest.approx(1.0, rel=1e-3)
    fast = predict(calls_of(decode), replace(machine, rates=Rates(h2d=((1, 1e15),))), chained=True)
    assert fast.limit != "link" or fast.seconds < slow.seconds / 100
    cold = predict(calls_of(decode), machine, chained=False)
    # A step that starts cold moves its own first blocks and those of the step after it.
    assert cold.h2d_seconds > slow.h2d_seconds


def test_regions_take_the_longer_of_weights_and_products() -> None:
    rates = Rates(hbm=100.0, matmul=10.0)
    assert RegionWork("r", 1000, 20).seconds(rates) == 10.0
    assert RegionWork("r", 100, 200).seconds(rates) == 20.0
    assert RegionWork("r", 1000, 20, 3.0).seconds(rates) == 3.0
    machine = Machine("test", 0, 0, rates)
    found = predict([RegionWork("r", 1000, 0), RegionWork("s", 0, 50)], machine, chained=False)
    assert found.seconds == 15.0 and found.limit == "weights"
    assert [(r.start, r.end) for r in found.regions] == [(0.0, 10.0), (10.0, 15.0)]


def test_causal_squares_count_half_and_have_their_own_rate(explanation: Explanation) -> None:
    first = steps(explanation)[0]
    squares = [op for op in first.schedules[0].ops if op.causal]
    assert len(squares) == 2
    for op, heads in zip(squares, (2, 1), strict=True):
        assert op.flop == 2 * heads * 2 * (96 * 97 // 2) * 16
        assert op_seconds(op, Rates(causal=1.0, attention=1e30, hbm=1e30)) == op.flop


def test_the_bytes_of_a_step_are_those_of_its_transfers(explanation: Explanation) -> None:
    for step in steps(explanation):
        ops = [op for site in step.sites for op in step.schedules[site.schedule].ops]
        assert sum(op.slot_bytes for op in ops if op.op == "wait") == step.h2d_bytes
        assert sum(op.link_bytes for op in ops if op.op == "offload") == step.d2h_bytes
        for choice in step.choices:
            assert choice.h2d_bytes == step.h2d_bytes
        (chosen,) = [choice for choice in step.choices if choice.chosen]
        assert chosen.head_group == 2
        assert chosen.prediction.seconds == pytest.approx(step.prediction.seconds)
    assert [choice.head_group for choice in steps(explanation)[0].choices] == [1, 2, 3]


def measured(name: str, variant: str) -> dict[str, Any]:
    """A row of the stored results."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    (row,) = [
        row for row in rows
        if row["variant"] == variant and row["context"] == 131072 and row["layers"] == 32
        and "h200" in row["id"] and row.get("chunk") in (16384, None)
        and not row.get("gpu_memory")
    ]  # fmt: skip
    found: dict[str, Any] = row
    return found


@pytest.mark.slow
def test_a_measured_decode_step_is_predicted_within_five_percent() -> None:
    """Llama-3-8B, 128K tokens, everything streamed: one layer predicted, times 32."""
    row = measured("decode", "headinfer:0")
    rates = row["roofline"]
    config = known_config("llama-3-8b")
    assert config is not None
    config.num_hidden_layers = 1
    step = steps(explain(config, context="128K", chunk="16K"))[-1]
    machine = Machine(
        row["device"], 0, 0,
        Rates(
            h2d=((32 << 20, rates["h2d_gb_s"] * 1e9),), d2h=((1, rates["d2h_gb_s"] * 1e9),),
            hbm=rates["hbm_gb_s"] * 1e9, attention=rates["attention_tflop_s"] * 1e12,
            matmul=rates["matmul_tflop_s"] * 1e12,
        ),
    )  # fmt: skip
    layer: Prediction = predict(calls_of(step), machine, chained=True)
    assert 32 * layer.seconds * 1e3 == pytest.approx(row["step_ms"]["median"], rel=0.05)
    assert layer.limit == "link"
