"""``plan``: where each byte of a model and its KV will be, and how long it takes, beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from headinfer_compile import plan_text
from headinfer_compile.config import HeadInferConfig, format_bytes, parse_bytes, parse_tokens
from headinfer_compile.cost_model import SYMBOLS, formula_text, formulas
from headinfer_compile.errors import DoesNotFitError, OptionError
from headinfer_compile.machine import Machine, describe
from headinfer_compile.model_facts import ModelFacts, facts_of
from headinfer_compile.models import DTYPES
from headinfer_compile.plan_memory import Memory, Request, Settings, memory_of
from headinfer_compile.plan_roofline import RooflineRow, roofline_rows
from headinfer_compile.plan_search import (
    Choice,
    choice_of,
    choose,
    largest_context,
    reasons_of,
    smallest_settings,
)
from headinfer_compile.plan_time import decode_of, prefill_of
from headinfer_compile.probe import this_machine
from headinfer_compile.refusal import refusal


@dataclass(frozen=True)
class PlanPoint:
    """The plan's settings at another context."""

    context: int
    gpu_bytes: int
    host_bytes: int
    prefill_seconds: float
    seconds_per_token: float


@dataclass(frozen=True)
class Plan:
    """What will be where and how long it takes; ``print`` it, or read its fields.

    Bytes of the GPU are those of one card; where there are several, of the fullest.
    """

    model: str
    context: int
    chunk: int
    batch: int
    max_context: int
    """The most tokens that fit on this machine with these budgets."""
    gpu_bytes: int
    """The most that is allocated on the device at a time."""
    host_bytes: int
    """KV pages in host memory."""
    kv_bytes: int
    """KV of all tokens, wherever they are."""
    resident_bytes: int
    """KV blocks that stay on the device."""
    prefill_seconds: float
    """Of the whole prompt, compiled already."""
    seconds_per_token: float
    settings: Mapping[str, Any]
    """What was chosen, and the compile options that say so."""
    limits: Mapping[str, str]
    """What bounds the context, the prefill and the decode."""
    warnings: tuple[str, ...]
    facts: ModelFacts = field(repr=False)
    machine: Machine = field(repr=False)
    request: Request = field(repr=False)
    choice: Choice = field(repr=False)

    @property
    def seconds(self) -> float:
        """Prefill and an answer of 256 tokens, by which settings are chosen."""
        return self.choice.seconds

    @property
    def options(self) -> dict[str, Any]:
        """Compile options that make the backend do what was planned."""
        config = self.choice.memory.settings.config
        names = ("head_group", "slot_tokens", "num_slots", "prefetch_distance", "cpu_attention")
        return {name: getattr(config, name) for name in names}

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes by what they are for; ``gpu_bytes`` is less, as not all of it is in use at once."""
        memory = self.choice.memory
        found = {
            "gpu: weights": memory.weight_bytes,
            "gpu: resident KV": memory.resident_bytes,
            "gpu: slots": memory.slot_bytes,
            "gpu: staging": memory.staging_bytes,
            "gpu: tail": memory.tail_bytes,
            "gpu: activations of a chunk": memory.activation_bytes,
            "gpu: attention workspace": memory.workspace_bytes,
            "gpu: cuBLAS": int(memory.values["library"]),
        }
        if not self.machine.gpu_memory:
            found = {name.replace("gpu:", "host:"): n for name, n in found.items()}
        return {**found, "host: KV pages": memory.host_bytes}

    @cached_property
    def roofline(self) -> tuple[RooflineRow, ...]:
        """Work, bytes and bound of matrices and attention in each phase."""
        return roofline_rows(self.facts, self.machine, self.choice.memory)

    @cached_property
    def curve(self) -> tuple[PlanPoint, ...]:
        """Memory and time against the context, up to the largest that fits."""
        contexts, at = [], 1024
        while at < self.max_context:
            contexts.append(at)
            at *= 2
        points = []
        for context in [*contexts, self.max_context]:
            asked, settings = replace(self.request, context=context), self.choice.settings
            memory = memory_of(self.facts, self.machine, asked, settings, context)
            if memory.shortage is not None:
                # The largest context may need a smaller chunk than this plan's.
                settings = smallest_settings(asked)
            found = choice_of(self.facts, self.machine, asked, settings)
            memory = found.memory
            points.append(
                PlanPoint(
                    context,
                    memory.gpu_bytes,
                    memory.host_bytes,
                    found.prefill.seconds,
                    found.decode.seconds,
                )
            )
        return tuple(points)

    @cached_property
    def head_groups(self) -> dict[str, dict[int, float]]:
        """Why these head groups: by phase, the seconds of the phase under each of them."""
        chosen, heads = self.choice.memory.settings, self.facts.num_kv_heads
        found: dict[str, dict[int, float]] = {"prefill": {}, "decode": {}}
        for group in (g for g in range(1, heads + 1) if heads % g == 0):
            for phase, seconds in found.items():
                groups = {**self.settings["head_group"], phase: group}
                settings = replace(chosen, config=replace(chosen.config, head_group=groups))
                memory = memory_of(self.facts, self.machine, self.request, settings, self.context)
                timed = prefill_of if phase == "prefill" else decode_of
                seconds[group] = timed(self.facts, self.machine, memory).seconds
        return found

    @property
    def reasons(self) -> dict[str, str]:
        """Why the settings are these, by the option and the phase."""
        return reasons_of(self.machine, self.request, self.choice)

    @property
    def formulas(self) -> dict[str, str]:
        """The cost model in symbols."""
        return {name: formula_text(name) for name in formulas()}

    @property
    def symbols(self) -> dict[str, str]:
        """What the symbols of ``formulas`` stand for."""
        return dict(SYMBOLS)

    def __str__(self) -> str:
        return plan_text.render(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as nested dicts, lists, strings and numbers."""
        rates = dataclasses.asdict(self.machine.rates)
        names = ("name", "gpu_memory", "host_memory", "gpus", "source")
        return {
            "model": self.model,
            "context": self.context,
            "max_context": self.max_context,
            "chunk": self.chunk,
            "batch": self.batch,
            "gpu_bytes": self.gpu_bytes,
            "host_bytes": self.host_bytes,
            "kv_bytes": self.kv_bytes,
            "resident_bytes": self.resident_bytes,
            "tiers": self.tiers,
            "prefill_seconds": self.prefill_seconds,
            "seconds_per_token": self.seconds_per_token,
            "prefill_parts": self.choice.prefill.parts,
            "decode_parts": self.choice.decode.parts,
            "settings": dict(self.settings),
            "limits": dict(self.limits),
            "head_groups": self.head_groups,
            "prefill_groups": [list(item) for item in self.choice.prefill.groups],
            "reasons": self.reasons,
            "roofline": [dataclasses.asdict(row) for row in self.roofline],
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "machine": {**{name: getattr(self.machine, name) for name in names}, "rates": rates},
            "formulas": self.formulas,
            "warnings": list(self.warnings),
        }


def plan(
    m: str | PretrainedConfig | PreTrainedModel,
    *,
    context: int | str,
    chunk: int | str | None = None,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    gpu_budget: int | str = "auto",
    host_budget: int | str = "auto",
    gpus: int = 1,
    gpu_memory: int | str | None = None,
    host_memory: int | str | None = None,
    link: float | str | None = None,
    tflops: float | None = None,
) -> Plan:
    """Plan a model at a context, on this machine or on one that is described.

    Args:
        m: A name known offline (``llama-3-8b``), a hub name, a folder, a config or a live model.
        context: Tokens of prompt and answer, as an int or like ``"128K"`` (K = 1024).
        chunk: Tokens of a prefill chunk; None: the planner's choice.
        batch: Sequences at once.
        dtype: Of weights and KV; None: the model's own.
        gpu_budget: Bytes of KV that may stay on the device; ``"auto"``: what the rest leaves.
        host_budget: Bytes of KV in host memory; ``"auto"``: all that the machine has for it.
        gpus: Cards that the layers are spread over; more than one is planned and not yet run.
        gpu_memory: Bytes of a card, such as ``"24GiB"``; None: this machine's.
        host_memory: Bytes of host memory for KV; None: this machine's, less a margin.
        link: Rate of the link each way, such as ``"25GB/s"``; None: as measured here.
        tflops: Peak matrix rate, 1e12 operations a second; None: as measured here.

    Raises:
        OptionError: An argument is malformed.
        DoesNotFitError: It does not fit; the message says what is needed and what would fit.
        OSError: There is no such model.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise OptionError(f"batch={batch!r}: expected a count of at least 1")
    request = Request(
        context=parse_tokens(context, "context"),
        chunk=None if chunk is None else parse_tokens(chunk, "chunk"),
        batch=batch,
        gpu_budget=None if gpu_budget == "auto" else parse_bytes(gpu_budget, "gpu_budget"),
        host_budget=None if host_budget == "auto" else parse_bytes(host_budget, "host_budget"),
    )
    described = None not in (gpu_memory, host_memory, link, tflops)
    # A GPU that is only described has nothing to do with what could be measured here.
    described = described or (gpu_memory is not None and not torch.cuda.is_available())
    facts = facts_of(m, dtype=_dtype(dtype))
    here = this_machine(measure=not described, model=m if isinstance(m, PreTrainedModel) else None)
    machine = describe(
        here, gpu_memory=gpu_memory, host_memory=host_memory, link=link, tflops=tflops, gpus=gpus
    )
    if not machine.gpu_memory and not isinstance(m, PreTrainedModel):
        # Weights and KV share the host's memory.
        left = machine.host_memory - facts.weight_bytes
        machine = replace(machine, host_memory=max(0, left))
    return make_plan(facts, machine, request)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def make_plan(
    facts: ModelFacts, machine: Machine, request: Request, settings: Settings | None = None
) -> Plan:
    """Plan with facts that are known already.

    Args:
        facts: The model.
        machine: Memory and rates.
        request: What is asked for.
        settings: Plan for these and not for the best ones.

    Raises:
        DoesNotFitError: As ``plan``.
    """
    if settings is None:
        found = choose(facts, machine, request)
    else:
        memory = memory_of(facts, machine, request, settings, request.context)
        found = memory
        if memory.shortage is None:
            found = choice_of(facts, machine, request, settings)
    longest, limit = largest_context(facts, machine, request)
    if isinstance(found, Memory):
        raise DoesNotFitError(refusal(facts, machine, request, found, longest))
    memory = found.memory
    return Plan(
        model=facts.name,
        context=request.context,
        chunk=int(memory.values["C"]),
        batch=request.batch,
        max_context=longest,
        gpu_bytes=memory.gpu_bytes,
        host_bytes=memory.host_bytes,
        kv_bytes=facts.token_bytes * request.batch * request.context,
        resident_bytes=memory.resident_bytes,
        prefill_seconds=found.prefill.seconds,
        seconds_per_token=found.decode.seconds,
        settings=_settings(memory),
        limits={
            "context": f"{limit}: {longest:,} tokens are the most",
            "prefill": found.prefill.bound,
            "decode": found.decode.bound,
        },
        warnings=tuple(_warnings(facts, machine, request)),
        facts=facts,
        machine=machine,
        request=request,
        choice=found,
    )


def _settings(memory: Memory) -> dict[str, Any]:
    values, config = memory.values, memory.settings.config
    return {
        "prefill_chunk_size": int(values["C"]),
        "head_group": {"prefill": int(values["g_p"]), "decode": int(values["g_d"])},
        "slot_tokens": {"prefill": int(values["T_p"]), "decode": int(values["T_d"])},
        "num_slots": config.slots,
        "page_tokens": memory.page_tokens,
        "tail_tokens": int(values["T_t"]),
        "resident_tokens": int(values["S_gpu"]),
        "gpu_budget": memory.resident_budget,
    }


def _warnings(facts: ModelFacts, machine: Machine, request: Request) -> list[str]:
    found = []
    if facts.max_positions is not None and request.context > facts.max_positions:
        found.append(
            f"{request.context:,} tokens, but the model was made for {facts.max_positions:,}: "
            "expect nonsense beyond"
        )
    if facts.declined:
        found.append(
            f"{len(facts.declined)} attentions of this model are not rewritten, so its KV would be "
            f"materialised layer by layer; the plan is for when they are. {facts.declined[0]}"
        )
    if machine.gpus > 1:
        found.append("layers on several GPUs are planned only: the runtime supports one GPU")
    if machine.rates.assumed:
        found.append(f"assumed, neither measured nor described: {', '.join(machine.rates.assumed)}")
    return found


def adaptive_head_group(facts: ModelFacts, machine: Machine, context: int, chunk: int) -> int:
    """The head group of the paper's rule: the largest whose two whole-head slots fit on the GPU.

    HeadInfer (arXiv 2502.12574, section 3) keeps all tokens of a head group in each of two slots.

    Args:
        facts: The model.
        machine: Its GPU memory counts.
        context: Tokens.
        chunk: Prefill chunk.

    Raises:
        DoesNotFitError: Not even one head fits.
    """
    groups = [g for g in range(facts.num_kv_heads, 0, -1) if facts.num_kv_heads % g == 0]
    for group in groups:
        config = HeadInferConfig(head_group=group, slot_tokens=context, num_slots=2)
        request = Request(context, chunk, gpu_budget=0, config=config)
        memory = memory_of(facts, machine, request, Settings(chunk, config), context)
        if memory.shortage is None or memory.shortage.where != "GPU":
            return group
    raise DoesNotFitError(
        f"two slots of one whole head of {context:,} tokens do not fit in "
        f"{format_bytes(machine.gpu_memory)} of GPU memory: use blocks, which need no such slots"
    )
