"""What the options leave open, decided by the planner's cost model where a step begins.

The number of slots is chosen before a cache allocates anything, the head group of a prefill before
each of its chunks. Neither moves what is placed or compiles anything: a head group is another view
of the same slots. In decode all heads move together, which is fastest on every machine. What the
options give stays as it is; where the rates of the machine are not known, the defaults do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.cost_model import SYMBOLS, evaluate
from headinfer_compile.machine import Machine, load_profile, machine_with
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.plan_memory import Memory, Request, Settings
from headinfer_compile.plan_search import (
    ALL_HEADS,
    GIVEN,
    NO_FASTER,
    NOT_PROBED,
    TOO_LITTLE,
    choose_slots,
    layouts_of,
)
from headinfer_compile.plan_text import format_seconds
from headinfer_compile.plan_time import TimedChunk, timed_chunks
from headinfer_compile.runtime.budget import device_room
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.spec import Geometry
from headinfer_compile.runtime.step import DECODE_MAX_QUERIES

UNDECIDED = "the default, while nothing is streamed"
_KEPT = 1024
"""Decisions that are remembered."""


def known_machine(config: HeadInferConfig) -> Machine | None:
    """This machine where ``headinfer probe`` has measured it and ``config`` leaves a choice."""
    if "auto" not in (config.head_group, config.num_slots):
        return None
    profile = load_profile()
    return None if profile is None else machine_with(profile)


@dataclass(frozen=True)
class _Group:
    """A head group of a prefill chunk."""

    size: int
    reason: str


@dataclass
class AutoSettings:
    """The choices of one compiled graph."""

    machine: Machine | None
    """Whose rates count; None where they are not known."""
    facts: ModelFacts | None
    """Of the graph; None where it has no site or nothing is known of the machine."""
    _decided: dict[tuple[object, ...], _Group] = field(default_factory=dict)
    _decided_for: HeadInferConfig | None = None

    def __post_init__(self) -> None:
        if self.facts is not None:
            evaluate("chunk_seconds", dict.fromkeys(SYMBOLS, 1.0))  # compiles the formula

    def claim(self, session: Session, config: HeadInferConfig) -> None:
        """Let ``session`` run under ``config``; choices made under an equal one stay."""
        if session.reasons and (config is session.asked or config == session.asked):
            return
        session.configure(config)
        session.reasons = self._defaults(config)
        # Last: an equal config says that all above is done.
        session.asked = config

    def settle(self, session: Session, geometry: Geometry, past: int, new: int) -> None:
        """Choose for the step of ``new`` tokens after ``past`` others, which has not begun.

        Args:
            session: After ``claim``.
            geometry: Of the K and V of the step.
            past: Tokens cached before.
            new: New tokens.
        """
        config, asked = session.config, session.asked
        if self.machine is None or self.facts is None:
            return
        chunk = new > DECODE_MAX_QUERIES and asked.head_group == "auto"
        if not chunk and session.geometry is not None:
            return
        reasons = dict(session.reasons)
        fresh = session.geometry is None or (session.length == 0 and session.geometry != geometry)
        facts = _of_cache(self.facts, geometry)
        if fresh and asked.num_slots == "auto":
            count = choose_slots(*self._slot_request(facts, session, geometry, past, new))
            config = replace(config, num_slots=count)
            reasons["num_slots"] = NO_FASTER if count == asked.slots else TOO_LITTLE
        if chunk and past == 0:
            config = replace(config, head_group="auto")
            reasons["head_group.prefill"] = UNDECIDED
        elif chunk and not fresh:
            group = self._group(facts, session, geometry, past, new)
            heads = geometry.num_kv_heads
            config = replace(config, head_group={"prefill": group.size, "decode": heads})
            reasons["head_group.prefill"] = group.reason
        session.configure(config)
        session.reasons = reasons

    def _defaults(self, asked: HeadInferConfig) -> dict[str, str]:
        """Why the numbers are what they are before anything has been chosen."""
        why = NOT_PROBED if self.machine is None else UNDECIDED
        group_is_open = asked.head_group == "auto"
        return {
            "head_group.prefill": why if group_is_open else GIVEN,
            "head_group.decode": ALL_HEADS if group_is_open else GIVEN,
            "num_slots": why if asked.num_slots == "auto" else GIVEN,
        }

    def _slot_request(
        self, facts: ModelFacts, session: Session, geometry: Geometry, past: int, new: int
    ) -> tuple[ModelFacts, Machine, Request]:
        machine, budget = self.machine, session.options.gpu_budget
        assert machine is not None
        if geometry.device.type == "cuda":
            # As before the call: weights are there, and of the activations what is not to come.
            footprint = facts.footprint
            activations = int(geometry.batch * new * max(footprint.region, footprint.site))
            held = facts.weight_bytes + max(0, activations - session.forward_bytes)
            machine = replace(machine, gpu_memory=device_room(geometry.device) + held)
        elif budget is None:
            budget = 0
        context = max(session.announced, session.reserved, past + new)
        request = _request(session, geometry, context, new)
        host = session.options.host_budget
        return facts, machine, replace(request, gpu_budget=budget, host_budget=host)

    def _group(
        self, facts: ModelFacts, session: Session, geometry: Geometry, past: int, new: int
    ) -> _Group:
        asked = session.asked
        if asked != self._decided_for or len(self._decided) >= _KEPT:
            self._decided, self._decided_for = {}, asked
        resident = session.tail_rows + sum(
            min(block.tokens, max(0, past - session.tail_rows - block.start))
            for block in session.table.blocks
            if block.tier == "gpu"
        )
        options = session.options
        key = (geometry, options.page_tokens, options.tail_tokens, resident, past, new)
        decided = self._decided
        if key not in decided:
            assert self.machine is not None
            request = _request(session, geometry, past + new, new)
            layouts = layouts_of(facts, self.machine, request, Settings(new, asked), past + new)
            placed = [_placed(memory, resident) for memory in layouts]
            decided[key] = _fastest(timed_chunks(facts, self.machine, placed, past, new))
        return decided[key]


def _of_cache(facts: ModelFacts, geometry: Geometry) -> ModelFacts:
    """``facts`` with the K and V that the cache stores."""
    return replace(
        facts, row_elements=geometry.row_elements, itemsize=geometry.dtype.itemsize,
        num_kv_heads=geometry.num_kv_heads,
    )  # fmt: skip


def _request(session: Session, geometry: Geometry, context: int, chunk: int) -> Request:
    options = session.options
    return Request(
        context, chunk, geometry.batch, gpu_budget=0, config=session.asked,
        page_tokens=options.page_tokens, tail_tokens=options.tail_tokens,
    )  # fmt: skip


def _placed(memory: Memory, resident: int) -> Memory:
    """``memory`` with the tokens on the device that are there, which may be other than planned."""
    return replace(memory, values={**memory.values, "S_gpu": resident})


def _fastest(chunks: Sequence[TimedChunk]) -> _Group:
    """The head group of the fastest of ``chunks``, and what the others would take."""
    best = min(chunks, key=lambda chunk: chunk.seconds)
    each = ", ".join(
        f"{int(chunk.values['g_p'])}: {format_seconds(chunk.seconds)}" for chunk in chunks
    )
    return _Group(int(best.values["g_p"]), f"the fastest for this chunk, predicted by group {each}")
