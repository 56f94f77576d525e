"""The planner: it keeps to budgets, is monotone, refuses only what cannot be, and meets the paper.

Machines are described, so nothing here depends on the one that runs the tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from headinfer_compile import Plan, plan
from headinfer_compile.cli import main
from headinfer_compile.config import HeadInferConfig, parse_tokens
from headinfer_compile.errors import DoesNotFitError, OptionError
from headinfer_compile.known_models import KNOWN_MODELS
from headinfer_compile.machine import Machine, Rates, describe, parse_rate
from headinfer_compile.model_facts import ModelFacts, facts_of
from headinfer_compile.plan_memory import Request, Settings
from headinfer_compile.planner import adaptive_head_group, make_plan

GIB = 1 << 30
PAPER = dict(gpu_memory="24GiB", host_memory="512GiB", link="25GB/s", tflops=165.0)


def paper_machine(gpus: int = 1) -> Machine:
    """One RTX 4090 with 512 GiB of host memory for KV, or several."""
    here = Machine("paper", 24 * GIB, 512 * GIB, Rates())
    return describe(here, link="25GB/s", tflops=165.0, gpus=gpus)


@pytest.fixture(scope="module")
def llama() -> ModelFacts:
    return facts_of("llama-3-8b")


# Table 3 of the paper, in units of 1,024 tokens; the first three are bound by the host there too.
@pytest.mark.parametrize(
    ("name", "paper_limit", "reason"),
    [
        ("llama-3-8b", 4096, "host memory"),
        ("llama-2-7b", 1024, "host memory"),
        ("mistral-7b", 4096, "host memory"),
        ("qwen2-7b", 4200, "host memory"),
        ("gemma-2-9b", 1300, "host memory"),
    ],
)
def test_limit_is_not_below_the_papers(name: str, paper_limit: int, reason: str) -> None:
    made = plan(name, context="128K", **PAPER)  # type: ignore[arg-type]
    print(f"{name}: {made.max_context:,} tokens, the paper {paper_limit}K")
    assert made.max_context >= paper_limit * 1024
    assert made.limits["context"].startswith(reason)
    at_limit = plan(name, context=made.max_context, **PAPER)  # type: ignore[arg-type]
    assert at_limit.host_bytes <= 512 * GIB
    with pytest.raises(DoesNotFitError):
        plan(name, context=made.max_context + 1, **PAPER)  # type: ignore[arg-type]


def test_llama_3_70b_on_eight_cards() -> None:
    made = plan("llama-3-70b", context="1000K", gpus=8, **PAPER)  # type: ignore[arg-type]
    print(f"{made.max_context:,} tokens")
    assert made.max_context >= 1000 * 1024
    assert made.gpu_bytes <= 24 * GIB
    assert "planned only: the runtime supports one GPU" in " ".join(made.warnings)
    with pytest.raises(DoesNotFitError, match="GPU memory"):
        plan("llama-3-70b", context="8K", gpus=4, **PAPER)  # type: ignore[arg-type]


def test_whole_head_slots_give_the_papers_adaptive_groups(llama: ModelFacts) -> None:
    contexts = ("500K", "1M", "2M", "4M")
    groups = [
        adaptive_head_group(llama, paper_machine(), parse_tokens(text, "context"), 10240)
        for text in contexts
    ]
    assert groups == [8, 4, 2, 1]
    with pytest.raises(DoesNotFitError, match="use blocks"):
        adaptive_head_group(llama, paper_machine(), 16 << 20, 10240)


def test_resident_first(llama: ModelFacts) -> None:
    for context in (10 << 10, 20 << 10, 40 << 10):
        made = make_plan(llama, paper_machine(), Request(context))
        assert made.host_bytes == 0 and made.resident_bytes >= made.kv_bytes
        assert made.choice.decode.parts["link"] == 0
    streamed = make_plan(llama, paper_machine(), Request(1 << 20))
    assert streamed.host_bytes + streamed.resident_bytes >= streamed.kv_bytes
    assert streamed.limits["decode"] == "link"


def test_json_form(capsys: pytest.CaptureFixture[str]) -> None:
    args = "plan llama-3-8b --context 1M --gpu-memory 24GiB --host-memory 512GiB"
    assert main([*args.split(), "--link", "25GB/s", "--tflops", "165", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    wanted = "context max_context gpu_bytes host_bytes kv_bytes prefill_seconds seconds_per_token"
    assert set(wanted.split()) | {"settings", "limits"} <= set(found)
    assert found["context"] == 1 << 20 and found["kv_bytes"] == 128 * GIB
    assert "expect nonsense" in out.err
    assert found["seconds_per_token"] >= (found["host_bytes"] - 4 * GIB) / 25e9


def test_refusal_names_three_settings_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "llama-3-8b", "--context", "8M", "--batch", "2", "--link", "25GB/s"]
    args += ["--gpu-memory", "24GiB", "--host-memory", "512GiB", "--tflops", "165"]
    assert main(args) == 3
    error = capsys.readouterr().err
    print(error)
    assert "8,388,608 tokens does not fit" in error and "host memory" in error
    ways = error.split("What would work: ")[1].split("; ")
    assert len(ways) == 3
    words = {**PAPER, "context": "8M", "batch": 2}
    for way in ways:
        changed = dict(re.findall(r"(\w+)=(\w+)", way))
        counts = {name: int(changed[name]) for name in ("context", "batch") if name in changed}
        made = plan("llama-3-8b", **{**words, **changed, **counts})
        assert all(getattr(made, name) == count for name, count in counts.items())


def test_bad_arguments() -> None:
    with pytest.raises(OptionError, match="known by name are llama-2-7b"):
        plan("lama-3-8b", context=1024, **PAPER)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="batch=0"):
        plan("llama-3-8b", context=1024, batch=0, **PAPER)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="link"):
        describe(paper_machine(), link="fast")
    with pytest.raises(OptionError, match="tflops"):
        describe(paper_machine(), tflops=-1)
    with pytest.raises(OptionError, match="gpus"):
        describe(paper_machine(), gpus=0)
    with pytest.raises(OptionError, match="dtype"):
        plan("llama-3-8b", context=1024, dtype="int3", **PAPER)  # type: ignore[arg-type]
    assert parse_rate("25GB/s", "link") == 25e9 and parse_rate("1GiB/s", "link") == GIB


def test_every_known_model_is_planned() -> None:
    for name in KNOWN_MODELS:
        made = plan(
            name, context="8K", host_memory="512GiB", gpu_memory="192GiB", link=25e9, tflops=100
        )
        text = str(made)
        assert made.model == name and "largest context" in text and "roofline" in text
        assert made.gpu_bytes > made.facts.weight_bytes > 0


def test_more_slots_and_budgets_are_counted(llama: ModelFacts) -> None:
    request = Request(1 << 17, 16384, gpu_budget=0)
    made = {
        count: make_plan(
            llama,
            paper_machine(),
            request,
            Settings(16384, HeadInferConfig(num_slots=count)),
        )
        for count in (2, 3)
    }
    assert made[3].gpu_bytes - made[2].gpu_bytes == 32 << 20
    assert made[2].resident_bytes == 0 and made[2].host_bytes == made[2].kv_bytes
    half = make_plan(llama, paper_machine(), replace(request, gpu_budget=4 * GIB))
    assert 0.9 * 4 * GIB < half.resident_bytes <= 4 * GIB
    assert half.seconds_per_token < made[2].seconds_per_token


def test_shape_formula_is_what_the_graph_shows() -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    traced = facts_of(config, dtype=torch.bfloat16)
    assert traced.footprint.traced and not traced.declined
    hidden, inner, dim, heads, kv_heads, item = 64, 160, 16, 4, 2, 2
    assert traced.footprint.region == (4 * hidden + 2 * inner + 2 * dim) * item
    assert traced.footprint.site == (hidden + 2 * (heads + kv_heads) * dim + 2 * dim) * item
    assert traced.token_bytes == 3 * kv_heads * 2 * dim * item


def check(made: Plan, machine: Machine, request: Request) -> None:
    """What holds for every plan."""
    memory = made.choice.memory
    if request.gpu_budget is not None:
        assert made.resident_bytes <= request.gpu_budget
    if request.host_budget is not None:
        assert made.host_bytes <= request.host_budget
    assert made.host_bytes <= machine.host_memory
    fixed = memory.slot_bytes + memory.staging_bytes + memory.tail_bytes
    parts = memory.weight_bytes + memory.activation_bytes + fixed + memory.workspace_bytes
    assert parts + made.resident_bytes <= machine.gpu_memory
    assert made.gpu_bytes <= machine.gpu_memory
    values = memory.values
    given_up = values["S_past"] + values["S_freed"]
    given_up *= values["Hkv"] * values["B"] * values["R"] * values["e"]
    assert made.resident_bytes + made.host_bytes + memory.tail_bytes + given_up >= made.kv_bytes
    assert made.max_context >= request.context
