"""The search for the settings that fit and are fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.plan_memory import Memory, Request, Settings, memory_of
from headinfer_compile.plan_time import Phase, decode_of, prefill_of

CHUNKS = (16384, 8192, 32768, 4096, 2048, 1024)
"""Prefill chunks that are tried, the one to prefer first."""
_NEW_TOKENS = 256
"""Answer length for which settings are chosen."""


@dataclass(frozen=True)
class Choice:
    """The best settings for a request."""

    memory: Memory
    prefill: Phase
    decode: Phase

    @property
    def seconds(self) -> float:
        """Of the prefill and an answer of 256 tokens: what settings are compared by."""
        return self.prefill.seconds + _NEW_TOKENS * self.decode.seconds


def choose(facts: ModelFacts, machine: Machine, request: Request) -> Choice | Memory:
    """The fastest settings that fit, or the memory of the smallest where none do."""
    best: Choice | None = None
    smallest: Memory | None = None
    for settings in _candidates(facts, request):
        memory = memory_of(facts, machine, request, settings, request.context)
        if memory.shortage is not None:
            if smallest is None or memory.gpu_needed < smallest.gpu_needed:
                smallest = memory
            continue
        found = Choice(
            memory, prefill_of(facts, machine, memory), decode_of(facts, machine, memory)
        )
        if best is None or found.seconds < best.seconds:
            best = found
    assert best is not None or smallest is not None
    return best or smallest  # type: ignore[return-value]


def _candidates(facts: ModelFacts, request: Request) -> Iterator[Settings]:
    """All settings that are tried, the ones to prefer first."""
    config = request.config
    for chunk in _chunks(request):
        for group in _groups(facts, config):
            for count in dict.fromkeys((config.num_slots, 2)):
                distance = config.prefetch_distance
                if distance != "auto":
                    distance = min(distance, count - 1)
                changed = replace(
                    config, head_group=group, num_slots=count, prefetch_distance=distance
                )
                yield Settings(chunk, changed)


def _chunks(request: Request) -> tuple[int, ...]:
    chunks = CHUNKS if request.chunk is None else (request.chunk,)
    return tuple(dict.fromkeys(min(chunk, request.context) for chunk in chunks))


def _groups(facts: ModelFacts, config: HeadInferConfig) -> list[dict[str, int]]:
    heads = facts.num_kv_heads
    if config.head_group != "auto":
        return [{p: config.per_phase("head_group", p) or heads for p in ("prefill", "decode")}]
    return [{"prefill": g, "decode": heads} for g in range(1, heads + 1) if heads % g == 0]


def smallest_settings(facts: ModelFacts, request: Request) -> Settings:
    """The settings that need least memory: if they do not fit, none do."""
    config = replace(
        request.config,
        head_group=_groups(facts, request.config)[0],
        num_slots=2,
        prefetch_distance="auto",
    )
    return Settings(min(_chunks(request)), config)


def largest_context(facts: ModelFacts, machine: Machine, request: Request) -> tuple[int, str]:
    """The most tokens that some settings hold, 0 if there are none, and what more would lack."""
    host = machine.host_memory
    if request.host_budget is not None:
        host = min(host, request.host_budget)
    token = facts.token_bytes * request.batch
    device = machine.gpus * machine.gpu_memory or request.gpu_budget or 0
    low, high = 0, (host + device) // token + 2
    limit = "GPU memory" if machine.gpu_memory else "host memory"
    while high - low > 1:
        middle = (low + high) // 2
        asked = replace(request, context=middle)
        found = memory_of(facts, machine, asked, smallest_settings(facts, asked), middle)
        if found.shortage is None:
            low = middle
        else:
            high, limit = middle, f"{found.shortage.where} memory"
    return low, limit
