"""How long a prefill and a decode step take under one choice of settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.cost_model import evaluate
from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.plan_memory import Memory

_SAMPLES = 48
"""Chunks of a prefill that are evaluated; the others lie between them."""


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase and what they are made of."""

    seconds: float
    parts: dict[str, float]
    """Seconds of each of the parts that run beside each other."""
    bound: str
    """The part that takes longest."""
    groups: tuple[tuple[int, int], ...] = ()
    """Of a prefill: its head groups, each after the token from which on it is used."""


@dataclass(frozen=True)
class TimedChunk:
    """A prefill chunk under one layout."""

    seconds: float
    values: dict[str, float]
    """Of the symbols of ``cost_model``."""


def timed_chunks(
    facts: ModelFacts, machine: Machine, layouts: Sequence[Memory], past: int, new: int
) -> list[TimedChunk]:
    """The ``new`` tokens after ``past`` others under each of ``layouts``.

    A chunk runs under the fastest of them, and the first of equal ones: ``min`` of the seconds.
    """
    found = []
    for memory in layouts:
        values = chunk_values(facts, machine, memory, past, new)
        found.append(TimedChunk(evaluate("chunk_seconds", values), values))
    return found


def prefill_of(facts: ModelFacts, machine: Machine, *layouts: Memory) -> Phase:
    """Seconds of the whole prefill, chunk by chunk, each under the fastest of ``layouts``."""
    chunk, context = int(layouts[0].values["C"]), layouts[0].context
    starts = range(0, context, chunk)
    total = {"chunk": 0.0, "matrices": 0.0, "attention": 0.0, "memory": 0.0, "link": 0.0}
    total["host"] = 0.0
    groups: list[tuple[int, int]] = []
    for start, weight in _sampled(starts):
        chunks = timed_chunks(facts, machine, layouts, start, min(chunk, context - start))
        found = min(chunks, key=lambda item: item.seconds)
        total["chunk"] += weight * found.seconds
        for part in ("matrices", "attention", "memory", "link", "host"):
            total[part] += weight * evaluate(f"prefill_{part}_seconds", found.values)
        group = int(found.values["g_p"])
        if not groups or groups[-1][1] != group:
            groups.append((start, group))
    device = total["matrices"] + total["attention"] + total["memory"]
    bounds = {"link": total["link"], "calls of the host": total["host"]}
    heaviest = max(("matrices", "attention", "memory"), key=lambda part: total[part])
    name = {"matrices": "matrix products", "attention": "attention", "memory": "device memory"}
    bounds[name[heaviest]] = device
    seconds = total.pop("chunk")
    return Phase(seconds, total, max(bounds, key=lambda part: bounds[part]), tuple(groups))


def _sampled(starts: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Some of ``starts`` with the number that each stands for."""
    count = len(starts)
    if count <= _SAMPLES:
        yield from ((start, 1.0) for start in starts)
        return
    for i in range(_SAMPLES):
        low, high = i * count // _SAMPLES, (i + 1) * count // _SAMPLES
        yield starts[(low + high) // 2], float(high - low)


def _seen(facts: ModelFacts, past: int) -> list[int]:
    return [past if window is None else min(past, window) for window in facts.windows]


def chunk_values(
    facts: ModelFacts, machine: Machine, memory: Memory, past: int, new: int
) -> dict[str, float]:
    """Values of the symbols for the ``new`` tokens after ``past`` others."""
    values = memory.values
    resident, slot = int(values["S_gpu"]), int(values["T_p"])
    seen = _seen(facts, past)
    streamed = [max(0, min(rows, past - resident)) for rows in seen]
    repeats = [memory.repeats[window] for window in facts.windows]
    groups = -(-facts.num_kv_heads // int(values["g_p"]))
    units = groups * sum(-(-rows // slot) * r for rows, r in zip(streamed, repeats, strict=True))
    pairs = sum(
        new * new / 2 if window is None or window >= new else window * (new - window / 2)
        for window in facts.windows
    )
    rates = machine.rates
    run = values["g_p"] * memory.page_tokens * values["B"] * facts.head_token_bytes
    return {
        **values, "n": new, "L": facts.num_layers, "K": sum(seen),
        "K_host_once": sum(streamed),
        "K_host": sum(rows * r for rows, r in zip(streamed, repeats, strict=True)),
        "X": pairs, "J": sum(-(-rows // slot) for rows in seen), "U": units,
        "L_stream": sum(rows > 0 for rows in streamed), "M": facts.matrix_elements,
        "M_head": facts.head_elements, "F": rates.matmul,
        "A": rates.attention, "A_c": rates.causal, "hbm": rates.hbm, "link": rates.link(run),
        "d2h": rates.d2h[-1][1], "t_call": rates.call_seconds, "t_layer": rates.layer_seconds,
        "t_stream": rates.stream_seconds, "t_block": rates.block_seconds,
    }  # fmt: skip


def decode_of(facts: ModelFacts, machine: Machine, memory: Memory) -> Phase:
    """Seconds of the decode step after the context."""
    values, rates = memory.values, machine.rates
    seen = _seen(facts, memory.context)
    stored = memory.context - int(values["S_gpu"])
    streamed = [max(0, min(rows, stored)) if values["S_host"] else 0 for rows in seen]
    groups = -(-facts.num_kv_heads // int(values["g_d"]))
    blocks = groups * sum(-(-rows // int(values["T_d"])) for rows in streamed)
    run = values["g_d"] * memory.page_tokens * values["B"] * facts.head_token_bytes
    share = _cpu_share(memory.settings.config, machine, rates.link(run))
    units = math.ceil((1 - share) * blocks)
    found = {
        **values, "s_cpu": share, "L": facts.num_layers, "K": sum(seen),
        "K_host": sum(streamed), "U": units, "L_stream": sum(rows > 0 for rows in streamed),
        "read": facts.read_bytes, "t_stream": rates.stream_seconds,
        "hbm": rates.hbm, "link": rates.link(run),
        "dram": rates.dram_beside_link, "t_call": rates.call_seconds,
        "t_layer": rates.layer_seconds, "t_block": rates.block_seconds,
    }  # fmt: skip
    parts = {
        part: evaluate(f"decode_{part}_seconds", found)
        for part in ("memory", "link", "cpu", "host")
    }
    names = {
        "memory": "device memory",
        "link": "link",
        "cpu": "host memory",
        "host": "calls of the host",
    }
    bound = names[max(parts, key=lambda part: parts[part])]
    return Phase(evaluate("token_seconds", found), parts, bound)


def _cpu_share(config: HeadInferConfig, machine: Machine, link: float) -> float:
    """The share of the host KV that the CPU attends: ``"auto"`` lets both finish together."""
    if config.cpu_attention == "off" or not machine.gpu_memory:
        return 0.0
    if config.cpu_attention == "auto":
        dram = machine.rates.dram_beside_link
        return dram / (dram + link)
    return float(config.cpu_attention)
