"""Where the bytes of a context go under one choice of settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.cost_model import evaluate
from headinfer_compile.machine import Machine
from headinfer_compile.model_facts import ModelFacts
from headinfer_compile.runtime import sizes
from headinfer_compile.runtime.block_plan import BlockPlan
from headinfer_compile.runtime.budget import ALLOCATOR_SLACK_BYTES, LIBRARY_BYTES


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
    windows = tuple(window for window in facts.windows if window is not None)
    blocks = BlockPlan(
        shape.layer_token_bytes,
        shape.num_layers,
        request.page_tokens,
        0,
        windows=windows,
        chunk=chunk,
    )
    page = blocks.tokens_of(64)
    phases = {name: sizes.phase_layout(config, shape, page, name) for name in ("prefill", "decode")}
    prefill, decode = phases["prefill"], phases["decode"]
    workspace_limit = int(config.workspace_bytes)
    heads = batch * prefill.head_group * facts.num_heads // facts.num_kv_heads
    queries: dict[int | None, int] = {}
    for window in dict.fromkeys(facts.windows):
        columns = 0 if window is None else max(prefill.slot_tokens, chunk)
        per_query = sizes.query_bytes(
            heads, facts.v_head_dim, facts.itemsize, batch=batch, mask_columns=columns
        )
        queries[window] = sizes.query_chunk(workspace_limit, per_query, chunk)
    values: dict[str, float] = dict(
        B=batch, S=context, C=chunk, L=shape.num_layers, Hq=facts.num_heads,
        Hkv=facts.num_kv_heads, D=facts.head_dim, Dv=facts.v_head_dim, e=facts.itemsize,
        R=facts.row_elements,
        g_p=prefill.head_group, g_d=decode.head_group, T_p=prefill.slot_tokens,
        T_d=decode.slot_tokens, N=config.slots, T_t=tail,
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
    if context >= tail:  # a full tail is written back at once
        blocks.place(context, chunk)
    if not blocks.host_bytes:
        values["N"] = fixed["slot"] = 0
    values["S_gpu"] = blocks.gpu_tokens
    # At the fullest: a layer with a window gives up more while the context grows.
    resident = blocks.gpu_peak_bytes
    values["S_freed"] = (
        blocks.gpu_tokens * shape.token_bytes - resident
    ) // shape.layer_token_bytes
    values["S_host"] = blocks.host_bytes // shape.token_bytes
    needed = outside + sum(fixed.values()) + resident + ALLOCATOR_SLACK_BYTES
    # The host serves the layers of all cards.
    given_up = blocks.given_up_bytes(context)
    values["S_past"] = given_up // shape.layer_token_bytes
    host_bytes = int(values["S_host"]) * facts.token_bytes * batch - given_up
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
        resident_bytes=resident,
        resident_budget=budget,
        gpu_bytes=int(evaluate("gpu_bytes", values)) if machine.gpu_memory else 0,
        gpu_needed=needed if machine.gpu_memory else 0,
        host_bytes=host_bytes,
        page_tokens=page,
        repeats={window: -(-chunk // count) for window, count in queries.items()},
        shortage=shortage,
    )
