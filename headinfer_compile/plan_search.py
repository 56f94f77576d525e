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
GIVEN = "given"
ALL_HEADS = "all heads: a larger copy is a faster one, and nothing else depends on it"
TOO_LITTLE = "more would leave too little of the device for KV"
NOT_PROBED = "the default: no rates of this machine are known (headinfer probe measures them)"
NO_FASTER = "others are no faster"
_MOST_TOKENS = 1 << 32
_NEW_TOKENS = 256
"""Answer length for which settings are chosen."""


@dataclass(frozen=True)
class Choice:
    """The best settings for a request."""

    settings: Settings
    """With a head group for prefill left open where each chunk may take its own."""
    memory: Memory
    """Under the head group of the last chunk; the device's peak is that of all of them."""
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
    timed: set[tuple[float, ...]] = set()
    for settings in _candidates(request):
        memory = memory_of(facts, machine, request, settings, request.context)
        if memory.shortage is not None:
            if smallest is None or memory.gpu_needed < smallest.gpu_needed:
                smallest = memory
            continue
        # Slots take no time: the same chunk with the same blocks on the host is no faster.
        placement = tuple(memory.values[name] for name in ("C", "S_gpu", "S_host"))
        if placement in timed:
            continue
        timed.add(placement)
        found = choice_of(facts, machine, request, settings)
        if best is None or found.seconds < best.seconds:
            best = found
    assert best is not None or smallest is not None
    return best or smallest  # type: ignore[return-value]


def choice_of(facts: ModelFacts, machine: Machine, request: Request, settings: Settings) -> Choice:
    """How long settings that fit take, the head groups of the prefill chosen where left open."""
    layouts = layouts_of(facts, machine, request, settings, request.context)
    prefill = prefill_of(facts, machine, *layouts)
    by_group = {int(memory.values["g_p"]): memory for memory in layouts}
    used = [by_group[group] for _, group in prefill.groups]
    memory = replace(
        used[-1],
        workspace_bytes=max(item.workspace_bytes for item in used),
        gpu_bytes=max(item.gpu_bytes for item in used),
    )
    return Choice(settings, memory, prefill, decode_of(facts, machine, memory))


def reasons_of(machine: Machine, request: Request, choice: Choice) -> dict[str, str]:
    """Why the settings of ``choice`` are these, by the name of the option and the phase."""
    asked, config = request.config, choice.settings.config
    if asked.head_group != "auto":
        prefill = decode = GIVEN
    elif config.head_group == "auto":
        groups = (f"{group} after {start:,} tokens" for start, group in choice.prefill.groups)
        prefill, decode = f"for each chunk the fastest: {', '.join(groups)}", ALL_HEADS
    else:
        prefill = decode = "of the settings" if machine.is_known else NOT_PROBED
    slots = NO_FASTER if config.slots == asked.slots else TOO_LITTLE
    return {
        "head_group.prefill": prefill,
        "head_group.decode": decode,
        "num_slots": slots if asked.num_slots == "auto" else GIVEN,
        "prefill_chunk_size": "the fastest that fits" if request.chunk is None else GIVEN,
    }


def choose_slots(facts: ModelFacts, machine: Machine, request: Request) -> int:
    """The number of slots that ``choose`` finds, timing no more than it takes to tell.

    Args:
        facts: The model.
        machine: Memory and rates.
        request: With a chunk.
    """
    memories = [
        memory_of(facts, machine, request, settings, request.context)
        for settings in _candidates(request)
    ]
    fitting = [memory for memory in memories if memory.shortage is None]
    if not fitting:
        return min(memories, key=lambda memory: memory.gpu_needed).settings.config.slots
    best = fitting[0]
    for other in fitting[1:]:
        if other.values["S_gpu"] > best.values["S_gpu"] and _is_faster(
            facts, machine, request, other, best
        ):
            best = other
    return best.settings.config.slots


def _is_faster(
    facts: ModelFacts, machine: Machine, request: Request, more: Memory, less: Memory
) -> bool:
    """Whether to keep ``more`` on the device is faster; it is never slower in any phase."""
    decode, before = (decode_of(facts, machine, memory).seconds for memory in (more, less))
    if decode < before:
        return True
    found, held = (choice_of(facts, machine, request, m.settings) for m in (more, less))
    return found.seconds < held.seconds


def _candidates(request: Request) -> Iterator[Settings]:
    """All settings that are tried, the ones to prefer first."""
    for chunk in _chunks(request):
        for count in _slot_counts(request.config):
            yield Settings(chunk, replace(request.config, num_slots=count))


def _chunks(request: Request) -> tuple[int, ...]:
    chunks = CHUNKS if request.chunk is None else (request.chunk,)
    return tuple(dict.fromkeys(min(chunk, request.context) for chunk in chunks))


def _slot_counts(config: HeadInferConfig) -> tuple[int, ...]:
    """Numbers of slots that are tried: one must be free for the block that is attended."""
    if config.num_slots != "auto":
        return (config.num_slots,)
    if config.prefetch_distance == "auto" or config.prefetch_distance == 1:
        return (config.slots, 2)
    return (config.slots,)


def layouts_of(
    facts: ModelFacts, machine: Machine, request: Request, settings: Settings, context: int
) -> list[Memory]:
    """The memory under each head group that a prefill chunk may take, the one to prefer first.

    Where the options leave it open, these are the divisors of the number of heads; all of them
    with the same slots, so that a ring serves one chunk after the other.
    """
    heads, config = facts.num_kv_heads, settings.config
    if config.head_group != "auto":
        return [memory_of(facts, machine, request, settings, context)]
    found: list[Memory] = []
    for group in (g for g in range(1, heads + 1) if heads % g == 0):
        explicit = replace(config, head_group={"prefill": group, "decode": heads})
        memory = memory_of(facts, machine, request, replace(settings, config=explicit), context)
        if not found or _slot_size(memory) == _slot_size(found[0]):
            found.append(memory)
    return found


def _slot_size(memory: Memory) -> float:
    values = memory.values
    return max(values["g_p"] * values["T_p"], values["g_d"] * values["T_d"])


def smallest_settings(request: Request) -> Settings:
    """The settings that need least memory: if they do not fit, none do."""
    count = min(_slot_counts(request.config))
    config = replace(request.config, num_slots=count)
    return Settings(min(_chunks(request)), config)


def largest_context(facts: ModelFacts, machine: Machine, request: Request) -> tuple[int, str]:
    """The most tokens that some settings hold, 0 if there are none, and what more would lack."""

    def lacks(context: int) -> str | None:
        asked = replace(request, context=context)
        found = memory_of(facts, machine, asked, smallest_settings(asked), context)
        return None if found.shortage is None else f"{found.shortage.where} memory"

    low, high, limit = 0, 1024, lacks(1024)
    while limit is None:
        if high >= _MOST_TOKENS:
            return high, "nothing: every layer has a window"
        low, high = high, 2 * high
        limit = lacks(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = lacks(middle)
        low, high, limit = (middle, high, limit) if found is None else (low, middle, found)
    return low, limit
