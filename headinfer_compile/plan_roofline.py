"""Work, bytes and bound of each part of a phase: the rows of ``Plan.roofline``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.plan_memory import Memory
from headinfer_compile.plan_time import chunk_values


@dataclass(frozen=True)
class RooflineRow:
    """One kind of work in one step: the last prefill chunk, or a decode step; all layers."""

    phase: Literal["prefill", "decode"]
    part: str
    flop: float
    hbm_bytes: float
    link_bytes: float
    intensity: float
    """Operations per byte of device memory."""
    link_intensity: float | None
    """Operations per byte of the link; None where it carries none."""
    bound: str
    """What takes longest: operations, device memory or the link."""
    attainable: float
    """Operations a second under that bound."""
    seconds: float


def roofline_rows(facts: ModelFacts, machine: Machine, memory: Memory) -> tuple[RooflineRow, ...]:
    """Rows for the last chunk of the prefill and the decode step after it."""
    chunk = int(memory.values["C"])
    past = max(0, memory.context - chunk)
    rows: list[RooflineRow] = []
    phases: tuple[tuple[Literal["prefill", "decode"], int, int], ...] = (
        ("prefill", past, min(chunk, memory.context)),
        ("decode", memory.context, 1),
    )
    for phase, before, new in phases:
        values = chunk_values(facts, machine, memory, before, new)
        batch, item = values["B"], facts.itemsize
        row_bytes = batch * facts.num_kv_heads * facts.head_token_bytes
        pair = 2 * batch * facts.num_heads * (facts.head_dim + facts.v_head_dim)
        attended = values["K"] * new + values["X"]
        streamed = row_bytes * (values["K_host"] if phase == "prefill" else values["K_host_once"])
        read = facts.read_bytes
        moved = batch * new * values["a_moved"] if phase == "prefill" else 0.0
        queries = batch * new * facts.num_layers * facts.num_heads
        touched = row_bytes * (values["K"] + new * facts.num_layers)
        touched += queries * (facts.head_dim + facts.v_head_dim) * item
        matrices = 2 * batch * (facts.matrix_elements * new + facts.head_elements)
        link = machine.rates.link(memory.page_tokens * row_bytes)
        rates = machine.rates
        rows += [
            _row(phase, "matrices", matrices, read + moved, 0.0, rates.matmul, rates.hbm, link),
            _row(
                phase, "attention", pair * attended, touched, streamed, rates.attention, rates.hbm,
                values["link"] if phase == "prefill" else link,
            ),
        ]  # fmt: skip
    return tuple(rows)


def _row(
    phase: Literal["prefill", "decode"], part: str, flop: float, hbm_bytes: float,
    link_bytes: float, peak: float, hbm: float, link: float,
) -> RooflineRow:  # fmt: skip
    times = {
        "operations": flop / peak,
        "device memory": hbm_bytes / hbm,
        "link": link_bytes / link,
    }
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    return RooflineRow(
        phase=phase,
        part=part,
        flop=flop,
        hbm_bytes=hbm_bytes,
        link_bytes=link_bytes,
        intensity=flop / hbm_bytes,
        link_intensity=flop / link_bytes if link_bytes else None,
        bound=bound,
        attainable=flop / seconds,
        seconds=seconds,
    )
