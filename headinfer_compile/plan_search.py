"""The memory and the time of one choice of settings, and the search for the best choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.cost_model import evaluate
from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.runtime import sizes
from headinfer_compile.runtime.block_plan import BlockPlan
from headinfer_compile.runtime.budget import ALLOCATOR_SLACK_BYTES, LIBRARY_BYTES

CHUNKS = (16384, 8192, 32768, 4096, 2048, 1024)
"""Prefill chunks that are tried, the one to prefer first."""
_NEW_TOKENS = 256
"""Answer length for which settings are chosen."""
_SAMPLES = 48
"""Chunks of a prefill that are evaluated; the others lie between them."""


@dataclass(frozen=True)
class Request:
    """What is asked for; None is ``"auto"``."""

    context: int
    chunk: int | None = None
    batch: int = 1
    gpu_budget: int | None = None
    host_budget: int | None = None
    config: HeadInferConfig = field(default_factory=HeadInferConfig)
    page_tokens: int | None = None
    tail_tokens: int | None = None


@dataclass(frozen=True)
class Settings:
    """One choice of what the planner may choose."""

    chunk: int
    config: HeadInferConfig
    """With ``head_group``, ``slot_tokens`` and ``num_slots``."""


@dataclass(frozen=True)
class _Shape:
    """KV bytes on one card."""

    num_kv_heads: int
    head_token_bytes: int
    num_layers: int

    @property
    def layer_token_bytes(self) -> int:
        return self.num_kv_heads * self.head_token_bytes

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.layer_token_bytes


@dataclass(frozen=True)
class Shortage:
    """What a request lacks."""

    where: Literal["GPU", "host"]
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one card where there are several, but for the host's, which are of all."""

    settings: Settings
    context: int
    values: dict[str, float]
    """Of the symbols of ``cost_model``."""
    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int
    slot_bytes: int
    staging_bytes: int
    tail_bytes: int
    resident_bytes: int
    resident_budget: int
    gpu_bytes: int
    """The most that is allocated at a time."""
    gpu_needed: int
    """What must be free for it: the sum of all parts, with the allocator's slack."""
    host_bytes: int
    page_tokens: int
    """Tokens of the largest page."""
    repeats: dict[int | None, int]
    """By window: the query chunks of a prefill chunk, each of which streams the KV again."""
    shortage: Shortage | None
    """What is missing; None if it fits."""


def shape_of(facts: ModelFacts, request: Request, gpus: int) -> _Shape:
    """KV on the card that holds most layers."""
    layers = -(-facts.num_layers // gpus)
    return _Shape(facts.num_kv_heads, request.batch * facts.head_token_bytes, layers)


def weights_on_card(facts: ModelFacts, gpus: int) -> int:
    """Weight bytes of the card that holds most of them, with layers spread evenly."""
    if gpus == 1:
        return facts.weight_bytes
    layers = -(-facts.num_layers // gpus)
    return layers * facts.layer_weight_bytes // facts.num_layers + facts.end_weight_bytes


def memory_of(
    facts: ModelFacts, machine: Machine, request: Request, settings: Settings, context: int
) -> Memory:
    """Where the bytes of ``context`` tokens go under ``settings``."""
    config, batch, gpus = settings.config, request.batch, machine.gpus
    shape = shape_of(facts, request, gpus)
    chunk = min(settings.chunk, context)
    tail = sizes.tail_tokens(shape, request.tail_tokens)
    blocks = BlockPlan(shape.layer_token_bytes, shape.num_layers, request.page_tokens, 0)
    page = blocks.tokens_of(64)
    phases = {name: sizes.phase_layout(config, shape, page, name) for name in ("prefill", "decode")}
    prefill, decode = phases["prefill"], phases["decode"]
    workspace_limit = int(config.workspace_bytes)
    heads = batch * prefill.head_group * facts.num_heads // facts.num_kv_heads
    queries: dict[int | None, int] = {}
    for window in facts.windows:
        columns = 0 if window is None else max(prefill.slot_tokens, chunk)
        per_query = sizes.query_bytes(
            heads, facts.v_head_dim, facts.itemsize, batch=batch, mask_columns=columns
        )
        queries[window] = sizes.query_chunk(workspace_limit, per_query, chunk)
    values: dict[str, float] = dict(
        B=batch, S=context, C=chunk, L=shape.num_layers, Hq=facts.num_heads,
        Hkv=facts.num_kv_heads, D=facts.head_dim, Dv=facts.v_head_dim, e=facts.itemsize,
        g_p=prefill.head_group, g_d=decode.head_group, T_p=prefill.slot_tokens,
        T_d=decode.slot_tokens, N=config.num_slots, T_t=tail,
        Q=max(queries.values()),
        T_s=sizes.staging_tokens(shape, request.page_tokens) if chunk > tail else 0,
        weights=weights_on_card(facts, gpus), library=LIBRARY_BYTES if machine.gpu_memory else 0,
        a_region=facts.footprint.region, a_site=facts.footprint.site,
        a_moved=facts.footprint.elementwise, s_cpu=0,
    )  # fmt: skip
    activations = int(evaluate("activation_bytes", values))
    fixed = {name: int(evaluate(f"{name}_bytes", values)) for name in ("slot", "staging", "tail")}
    outside = int(values["weights"] + values["library"]) + activations + workspace_limit
    room = machine.gpu_memory - outside - sum(fixed.values()) - ALLOCATOR_SLACK_BYTES
    budget = max(0, room)
    if request.gpu_budget is not None:
        given = request.gpu_budget * shape.num_layers // facts.num_layers
        budget = min(given, budget) if machine.gpu_memory else given
    elif not machine.gpu_memory:
        budget = 0
    blocks.gpu_budget = budget
    if context > tail:
        blocks.place(context, chunk)
    if not blocks.host_bytes:
        values["N"] = fixed["slot"] = 0
    values["S_gpu"] = blocks.gpu_bytes // shape.token_bytes
    values["S_host"] = blocks.host_bytes // shape.token_bytes
    needed = outside + sum(fixed.values()) + blocks.gpu_bytes + ALLOCATOR_SLACK_BYTES
    host_bytes = int(values["S_host"]) * facts.token_bytes * batch
    host_limit = machine.host_memory
    if request.host_budget is not None:
        host_limit = min(host_limit, request.host_budget)
    shortage = None
    if machine.gpu_memory and needed > machine.gpu_memory:
        shortage = Shortage("GPU", needed, machine.gpu_memory)
    elif host_bytes > host_limit:
        shortage = Shortage("host", host_bytes, host_limit)
    return Memory(
        settings=settings,
        context=context,
        values=values,
        weight_bytes=int(values["weights"]),
        activation_bytes=activations,
        workspace_bytes=int(evaluate("workspace_bytes", values)),
        slot_bytes=fixed["slot"],
        staging_bytes=fixed["staging"],
        tail_bytes=fixed["tail"],
        resident_bytes=blocks.gpu_bytes,
        resident_budget=budget,
        gpu_bytes=int(evaluate("gpu_bytes", values)) if machine.gpu_memory else 0,
        gpu_needed=needed if machine.gpu_memory else 0,
        host_bytes=host_bytes,
        page_tokens=page,
        repeats={window: -(-chunk // count) for window, count in queries.items()},
        shortage=shortage,
    )


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase and what they are made of."""

    seconds: float
    parts: dict[str, float]
    """Seconds of each of the parts that run beside each other."""
    bound: str
    """The part that takes longest."""


def prefill_of(facts: ModelFacts, machine: Machine, memory: Memory) -> Phase:
    """Seconds of the whole prefill, chunk by chunk."""
    chunk, context = int(memory.values["C"]), memory.context
    starts = range(0, context, chunk)
    total = {"chunk": 0.0, "matrices": 0.0, "attention": 0.0, "memory": 0.0, "link": 0.0}
    total["host"] = 0.0
    for start, weight in _sampled(starts):
        values = chunk_values(facts, machine, memory, start, min(chunk, context - start))
        total["chunk"] += weight * evaluate("chunk_seconds", values)
        for part in ("matrices", "attention", "memory", "link", "host"):
            total[part] += weight * evaluate(f"prefill_{part}_seconds", values)
    device = total["matrices"] + total["attention"] + total["memory"]
    bounds = {"link": total["link"], "calls of the host": total["host"]}
    heaviest = max(("matrices", "attention", "memory"), key=lambda part: total[part])
    name = {"matrices": "matrix products", "attention": "attention", "memory": "device memory"}
    bounds[name[heaviest]] = device
    seconds = total.pop("chunk")
    return Phase(seconds, total, max(bounds, key=lambda part: bounds[part]))


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
        "M": facts.matrix_elements, "M_head": facts.head_elements, "F": rates.matmul,
        "A": rates.attention, "A_c": rates.causal, "hbm": rates.hbm, "link": rates.link(run),
        "d2h": rates.d2h[-1][1], "t_layer": rates.layer_seconds, "t_block": rates.block_seconds,
    }  # fmt: skip


def decode_of(facts: ModelFacts, machine: Machine, memory: Memory) -> Phase:
    """Seconds of the decode step after the context."""
    values, rates = memory.values, machine.rates
    seen = _seen(facts, memory.context)
    stored = memory.context - int(values["S_gpu"])
    streamed = [max(0, min(rows, stored)) if values["S_host"] else 0 for rows in seen]
    groups = -(-facts.num_kv_heads // int(values["g_d"]))
    units = groups * sum(-(-rows // int(values["T_d"])) for rows in streamed)
    run = values["g_d"] * values["T_d"] * values["B"] * facts.head_token_bytes
    found = {
        **values, "L": facts.num_layers, "K": sum(seen), "K_host": sum(streamed), "U": units,
        "read": facts.read_bytes, "hbm": rates.hbm, "link": rates.link(run),
        "dram": rates.dram_beside_link, "t_layer": rates.layer_seconds,
        "t_block": rates.block_seconds,
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
