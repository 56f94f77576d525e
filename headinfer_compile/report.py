"""``explain``: trace a model, run or plan its steps, and say what the compiler does with it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from headinfer_compile.cache import HeadInferCache
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.config import HeadInferConfig, parse_bytes, parse_tokens
from headinfer_compile.errors import DoesNotFitError, HeadInferError, OptionError
from headinfer_compile.explanation import Call, Explanation, GraphExplanation
from headinfer_compile.known_models import known_config
from headinfer_compile.machine import Machine, Rates, describe
from headinfer_compile.model_facts import ModelFacts, shape_facts
from headinfer_compile.models import find_source, load_config
from headinfer_compile.passes.graph_utils import calls as calls_op
from headinfer_compile.plan_key import plan_key
from headinfer_compile.plan_memory import Request, Settings
from headinfer_compile.planner import Plan, make_plan
from headinfer_compile.probe import this_machine
from headinfer_compile.report_graphs import PlannedGraph, RecordedGraph, Recorder, compiled_by
from headinfer_compile.report_step import explain_step
from headinfer_compile.runtime.session import Session

_UNLIMITED_BYTES = 1 << 60
_ASSUMED_GPU_BYTES = 24 << 30


def explain(
    model: PreTrainedModel | torch.nn.Module | PretrainedConfig | str,
    *args: Any,
    context: int | str | None = None,
    chunk: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    link: str | float | None = None,
    tflops: float | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say what ``backend="headinfer"`` does with a model.

    With ``args``, the model is called with them, once and for real, and stays as it was. With
    ``context``, three steps are traced on the meta device instead, without weights, attention or
    memory: the first prefill chunk, the last whole one, and the decode step after the context.

    Args:
        model: A live model; with ``context`` also its config, a hub name, a folder or a GGUF file.
        args: Arguments of the call.
        context: Tokens of the prompt, as an int or like ``"128K"`` (K = 1024).
        chunk: Tokens of a prefill chunk; the default is the whole prompt at once.
        options: ``HeadInferConfig`` fields, as for ``torch.compile``.
        link: For the predicted times: bytes a second between host and device, or like
            ``"25GB/s"``; None: as ``headinfer probe`` has measured here, else assumed. With
            ``context`` and no GPU here, a card of 24 GiB is assumed, and the report says so.
        tflops: For the predicted times: peak of matrix products, 1e12 operations a second.
        kwargs: With ``args``: keyword arguments of the call; its cache is a new ``HeadInferCache``
            unless one is given. With ``context``: ``batch``, ``dtype`` (a torch dtype),
            and the budgets and sizes of ``HeadInferCache``, by default ``gpu_budget=0`` and a
            ``host_budget`` without end.

    Returns:
        An ``Explanation``: ``print`` it, or read its fields.

    Raises:
        OptionError: An option is invalid, or there is neither a call nor a ``context``.
        DeclinedError: An attention cannot be rewritten and ``options`` say ``strict``.
        HeadInferError: The call does not use the cache, so there is nothing to report.
    """
    config = HeadInferConfig.from_options(options)
    here = this_machine(measure=False)
    if context is not None and not torch.cuda.is_available():
        here = _assumed_gpu(here)
    machine = describe(here, link=link, tflops=tflops)
    if context is None:
        if not isinstance(model, torch.nn.Module) or not (args or kwargs):
            raise OptionError("explain needs a live model and the arguments of a call, or context=")
        if chunk is not None:
            raise OptionError("chunk= goes with context=; a call is explained as it is")
        return _explain_call(model, args, kwargs, config, machine)
    if args:
        raise OptionError("explain takes the arguments of a call or context=, not both")
    total = parse_tokens(context, "context")
    size = total if chunk is None else min(total, parse_tokens(chunk, "chunk"))
    with _without_collector():
        return _explain_context(model, total, size, config, machine, **kwargs)


def _assumed_gpu(here: Machine) -> Machine:
    """A card for the predicted times where there is none; its rates are no machine's."""
    rates = Rates(assumed=tuple(f.name for f in fields(Rates) if f.name != "assumed"))
    return replace(
        here, name="a GPU of 24 GiB", gpu_memory=_ASSUMED_GPU_BYTES, rates=rates, source="assumed"
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Suspend the cyclic collector: over the graphs of many layers it takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _explanations(recorder: Recorder, machine: Machine, name: str) -> list[GraphExplanation]:
    """What has run since the last time, as one step."""
    ran = recorder.take()
    if not ran:
        raise HeadInferError(
            "the call does not use the cache in a graph: the model keeps no KV cache, or "
            "Dynamo gave up on it (TORCH_LOGS=graph_breaks,recompiles says why)"
        )
    return [
        _explain_graph(name if len(ran) == 1 else f"{name}, graph {number}", graph, machine)
        for number, graph in enumerate(ran, start=1)
    ]


def _explain_call(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
    config: HeadInferConfig, machine: Machine,
) -> Explanation:  # fmt: skip
    kwargs = dict(kwargs)
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, HeadInferCache)]
    if found:
        cache = found[0]
    elif isinstance(model, PreTrainedModel):
        cache = kwargs[cache_argument(model)] = HeadInferCache(model.config)
    else:
        argument = cache_argument(model)
        raise OptionError(f"give {argument}=HeadInferCache.from_shape(...) for this model")
    recorder = Recorder(config, RecordedGraph, model, machine)
    past = cache.get_seq_length()
    try:
        with compiled_by(model, recorder), torch.no_grad():
            model(*args, **kwargs)
        new = cache.get_seq_length() - past
        graphs = _explanations(recorder, machine, f"{new:,} new tokens after {past:,}")
        title = f"{type(model).__name__}: one call"
        return Explanation(title, tuple(graphs), cache.stats())
    finally:
        if not found:
            cache.close()


def _explain_context(
    model: Any,
    context: int,
    chunk: int,
    config: HeadInferConfig,
    machine: Machine,
    *,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> Explanation:
    config = replace(config, lowering="eager", cuda_graphs=False)
    meta = _meta_model(model, dtype)
    sizes = {"gpu_budget": 0, "host_budget": _UNLIMITED_BYTES, **sizes}
    starts = range(0, context, chunk)
    # The last whole chunk; a shorter one after it says less.
    later = (context // chunk - 1) * chunk or starts[-1]
    names = {later: "later chunk", 0: "first chunk" if later else "prefill", context: "decode"}
    graphs: list[GraphExplanation] = []
    recorder = Recorder(config, PlannedGraph, meta, machine)
    with (
        HeadInferCache(meta.config, **sizes) as cache,
        compiled_by(meta, recorder),
        torch.no_grad(),
    ):
        cache.session.reserved = context  # as generate announces it
        for start in [*starts, context]:
            new = min(chunk, context - start) if start < context else 1
            if start not in names:
                _skip_chunk(recorder.graphs[-1], cache, start, new)
                continue
            ids = torch.empty(batch, new, dtype=torch.int64, device="meta")
            meta(ids, **{cache_argument(meta): cache})
            name = f"{names[start]}: {new:,} new tokens after {start:,}"
            graphs += _explanations(recorder, machine, name)
        session = cache.session
        if session.table.bytes_on("host"):
            session.slot_ring()
        title = (
            f"{type(meta).__name__}: {context:,} tokens of context in chunks of {chunk:,}, batch "
            f"{batch}, {str(meta.dtype).removeprefix('torch.')}, traced without weights"
        )
        facts = shape_facts(meta, type(meta).__name__)
        settings = Settings(chunk, _as_run(config, session, machine))
        request = Request(context, chunk, batch, config=config)
        planned = _plan_of(facts, machine, request, settings, sizes)
        return Explanation(title, tuple(graphs), cache.stats(), planned)


def _as_run(asked: HeadInferConfig, session: Session, machine: Machine) -> HeadInferConfig:
    """``asked`` with what the steps of ``session`` took where it was left open."""
    group, geometry = asked.head_group, session.geometry
    if group == "auto" and not machine.is_known and geometry is not None:
        group = {"prefill": 1, "decode": geometry.num_kv_heads}  # nothing was chosen
    return replace(asked, num_slots=session.config.slots, head_group=group)


def _plan_of(
    facts: ModelFacts,
    machine: Machine,
    request: Request,
    settings: Settings,
    sizes: Mapping[str, Any],
) -> Plan | None:
    """The plan of what is explained, with its settings; None where it does not fit here."""
    given: dict[str, Any] = {
        name: parse_bytes(value, name) if name.endswith("budget") else value
        for name, value in sizes.items()
        if name in ("gpu_budget", "host_budget", "page_tokens", "tail_tokens") and value != "auto"
    }
    request = replace(request, **given)
    try:
        return make_plan(facts, machine, request, settings)
    except DoesNotFitError:
        return None


def _meta_model(model: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of the same config on the meta device."""
    if isinstance(model, str):
        model = known_config(model) or load_config(find_source(model))
    found = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(found, PretrainedConfig):
        raise OptionError(
            f"context= needs a transformers model, config or name, not {type(model).__name__}: "
            "call explain(model, *args) for another model"
        )
    config = copy.deepcopy(found)
    own = getattr(model, "dtype", None)
    dtype = dtype or (getattr(torch, own) if isinstance(own, str) else own)
    live = isinstance(model, PreTrainedModel)
    make = type(model)._from_config if live else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        made: PreTrainedModel = make(config, dtype=dtype or torch.float32)
    made.eval()
    return made


def _skip_chunk(graph: RecordedGraph, cache: HeadInferCache, start: int, new: int) -> None:
    """Let a chunk pass that looks like ``graph``: its workspace and its turns of the ring count."""
    session = cache.session
    assert session.geometry is not None
    graph.auto.settle(session, session.geometry, start, new)
    session.forms = graph.forms
    session.begin(start, new)
    moved = {
        spec: len(plan_key(session, spec, session.config).transfers())
        for spec in set(graph.site_specs)
    }
    session.base += sum(moved[spec] for spec in graph.site_specs)
    session.base %= session.config.slots
    session.commit()
    cache.length = start + new


def _explain_graph(name: str, graph: RecordedGraph, machine: Machine) -> GraphExplanation:
    structures = {region.name: region.key for region in graph.report.regions.regions}
    calls: list[Call] = []
    for node in graph.graph_module.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target in structures:
            calls.append(Call("region", target, structures[target]))
        elif node.op == "call_module":
            index = int(target.removeprefix("site_"))
            spec = graph.site_specs[index]
            calls.append(Call("site", target, f"class {spec}", graph.sites[index].layer))
        elif calls_op(node, torch.ops.headinfer.update_kv.default):
            calls.append(Call("update_kv", node.name, "update_kv", node.args[3]))
    return GraphExplanation(name, graph.report, tuple(calls), explain_step(graph, machine))
