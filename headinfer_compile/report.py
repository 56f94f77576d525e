"""``explain``: trace a model, run or plan its steps, and say what the compiler does with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from headinfer_compile.backend import compile_graph
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.config import HeadInferConfig, parse_tokens
from headinfer_compile.errors import HeadInferError, OptionError
from headinfer_compile.executor import CompiledGraph
from headinfer_compile.explanation import (
    Call,
    Explanation,
    GraphExplanation,
    SiteSchedule,
    StepPlan,
)
from headinfer_compile.models import find_source, load_config
from headinfer_compile.passes.graph_utils import calls as calls_op
from headinfer_compile.passes.pipeline import Dump, build_schedule
from headinfer_compile.passes.schedule import PlanContext, PlanKey
from headinfer_compile.plan_key import chained_key
from headinfer_compile.runtime.ops import session_of
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.step import Step

_UNLIMITED_BYTES = 1 << 60


def explain(
    model: PreTrainedModel | torch.nn.Module | PretrainedConfig | str,
    *args: Any,
    context: int | str | None = None,
    chunk: int | str | None = None,
    options: Mapping[str, Any] | None = None,
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
        kwargs: With ``args``: keyword arguments of the call; ``past_key_values`` is a new
            ``HeadInferCache`` unless given. With ``context``: ``batch``, ``dtype`` (a torch dtype),
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
    if context is None:
        if not isinstance(model, torch.nn.Module) or not (args or kwargs):
            raise OptionError("explain needs a live model and the arguments of a call, or context=")
        if chunk is not None:
            raise OptionError("chunk= goes with context=; a call is explained as it is")
        return _explain_call(model, args, kwargs, config)
    if args:
        raise OptionError("explain takes the arguments of a call or context=, not both")
    total = parse_tokens(context, "context")
    size = total if chunk is None else min(total, parse_tokens(chunk, "chunk"))
    return _explain_context(model, total, size, config, **kwargs)


@dataclass
class _RecordedGraph(CompiledGraph):
    """Runs as ever and notes the plan key of every site."""

    has_run: bool = False
    keys: dict[int, PlanKey] = field(default_factory=dict)
    session: Session | None = None
    step: Step | None = None

    def forward(self, *args: Any) -> Any:
        self._begin()
        return super().forward(*args)

    def run_site(
        self, index: int, handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        out = super().run_site(index, handle, q, k, v, masks, past)
        self._note(index, session_of(handle))
        return out

    def _begin(self) -> None:
        self.keys, self.session, self.step = {}, None, None
        self.has_run = True

    def _note(self, index: int, session: Session) -> None:
        following = self.site_specs[index + 1] if index + 1 < len(self.sites) else None
        self.session, self.step = session, session.step
        self.keys[index] = chained_key(
            session, self.site_specs[index], following, self.site_specs[0], self.config
        )


@dataclass
class _PlannedGraph(_RecordedGraph):
    """Notes the plan key of every site and attends nothing; for tensors on the meta device."""

    def run_site(
        self, index: int, handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        session = session_of(handle)
        if session.step is None:
            self.start(session, k, v, past)
        self._note(index, session)
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)

    def forward(self, *args: Any) -> Any:
        self._begin()
        return _MetaInterpreter(self.graph_module).run(*args)


class _MetaInterpreter(Interpreter):
    """Begins the step at a cache update too: no site does where none could be rewritten."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (torch.ops.headinfer.update_kv, torch.ops.headinfer.update_kv.default):
            handle, k, v, _, past = args
            if session_of(handle).step is None:
                session_of(handle).start(k, v, past, 0)
        return super().call_function(target, args, kwargs)


class _Recorder:
    """A Dynamo backend that keeps every graph it compiles."""

    def __init__(self, config: HeadInferConfig, graph_type: type[_RecordedGraph]) -> None:
        self.graphs: list[_RecordedGraph] = []
        self._config, self._graph_type = config, graph_type

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(
            gm, example_inputs, self._config, graph_type=self._graph_type, keep_text=True
        )
        if isinstance(compiled, _RecordedGraph):
            self.graphs.append(compiled)
            if self._graph_type is _PlannedGraph:
                compiled.positions_index = None  # nothing can be read on the meta device
        return compiled

    def explanations(self, name: str) -> list[GraphExplanation]:
        """What has run since the last time, as one step."""
        ran = [graph for graph in self.graphs if graph.has_run]
        graphs = [
            _explain_graph(name if len(ran) == 1 else f"{name}, graph {number}", graph)
            for number, graph in enumerate(ran, start=1)
        ]
        for graph in ran:
            graph.has_run = False
        if not graphs:
            raise HeadInferError(
                "the call does not use the cache in a graph: the model keeps no KV cache, or "
                "Dynamo gave up on it (TORCH_LOGS=graph_breaks,recompiles says why)"
            )
        return graphs


@contextmanager
def _compiled_by(model: torch.nn.Module, backend: _Recorder) -> Iterator[None]:
    """Let calls of ``model`` go through ``backend``, and afterwards as before."""
    before = model._compiled_call_impl
    model.compile(backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = before


def _explain_call(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: HeadInferConfig
) -> Explanation:
    kwargs = dict(kwargs)
    cache = kwargs.get("past_key_values")
    given = isinstance(cache, HeadInferCache)
    if not given:
        if not isinstance(model, PreTrainedModel):
            raise OptionError("give past_key_values=HeadInferCache.from_shape(...) for this model")
        cache = kwargs["past_key_values"] = HeadInferCache(model.config)
    assert isinstance(cache, HeadInferCache)
    recorder = _Recorder(config, _RecordedGraph)
    past = cache.get_seq_length()
    try:
        with _compiled_by(model, recorder), torch.no_grad():
            model(*args, **kwargs)
        new = cache.get_seq_length() - past
        graphs = recorder.explanations(f"{new:,} new tokens after {past:,}")
        title = f"{type(model).__name__}: one call"
        return Explanation(title, tuple(graphs), cache.stats())
    finally:
        if not given:
            cache.close()


def _explain_context(
    model: Any,
    context: int,
    chunk: int,
    config: HeadInferConfig,
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
    recorder = _Recorder(config, _PlannedGraph)
    with (
        HeadInferCache(meta.config, **sizes) as cache,
        _compiled_by(meta, recorder),
        torch.no_grad(),
    ):
        for start in [*starts, context]:
            new = min(chunk, context - start) if start < context else 1
            if start not in names:
                cache.session.begin(start, new)
                for spec in range(len(cache.session.specs)):
                    cache.session.query_chunks(spec)  # counts its workspace
                cache.session.commit()
                cache.length = start + new
                continue
            meta(torch.empty(batch, new, dtype=torch.int64, device="meta"), past_key_values=cache)
            graphs += recorder.explanations(f"{names[start]}: {new:,} new tokens after {start:,}")
        session = cache.session
        if session.table.bytes_on("host"):
            session.slot_ring()
        title = (
            f"{type(meta).__name__}: {context:,} tokens of context in chunks of {chunk:,}, batch "
            f"{batch}, {str(meta.dtype).removeprefix('torch.')}, traced without weights"
        )
        return Explanation(title, tuple(graphs), cache.stats())


def _meta_model(model: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of the same config on the meta device."""
    if isinstance(model, str):
        model = load_config(find_source(model))
    found = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(found, PretrainedConfig):
        raise OptionError(
            f"context= needs a transformers model, config or name, not {type(model).__name__}: "
            "call explain(model, *args) for another model"
        )
    config = copy.deepcopy(found)
    dtype = dtype or getattr(model, "dtype", None)
    live = isinstance(model, PreTrainedModel)
    make = type(model)._from_config if live else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        made: PreTrainedModel = make(config, dtype=dtype or torch.float32)
    made.eval()
    return made


def _explain_graph(name: str, graph: _RecordedGraph) -> GraphExplanation:
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
    return GraphExplanation(name, graph.report, tuple(calls), _explain_step(graph))


def _explain_step(graph: _RecordedGraph) -> StepPlan | None:
    session, step = graph.session, graph.step
    if session is None or step is None:
        return None
    geometry = session.geometry
    assert geometry is not None
    layers: dict[PlanKey, list[int]] = {}
    h2d_rows = 0
    for index, key in graph.keys.items():
        layers.setdefault(key, []).append(graph.sites[index].layer)
        blocks = step.blocks[graph.specs[key.spec]]
        h2d_rows += key.chunks * sum(block.rows for block in blocks if block.tier == "host")
    d2h_rows = sum(
        segment.rows
        for piece in step.pieces
        for segment in piece.segments
        if segment.block.tier == "host"
    )
    schedules = []
    for key, found in layers.items():
        # What has run is built again for the text of its passes, and has been dumped already.
        dump = Dump(None) if key in graph.schedules else graph.dump
        built, passes = build_schedule(PlanContext(key, graph.config), dump, keep_text=True)
        schedule = session.schedule_overrides.get(key) or graph.schedules.get(key, built)
        schedules.append(SiteSchedule(tuple(found), schedule, tuple(passes)))
    layout = session.layout(step.phase)
    return StepPlan(
        past=step.past,
        new=step.new,
        phase=step.phase,
        head_group=layout.head_group,
        slot_tokens=layout.slot_tokens,
        query_chunk=max(step.query_chunk.values()),
        h2d_bytes=h2d_rows * geometry.layer_token_bytes,
        d2h_bytes=d2h_rows * geometry.layer_token_bytes * len(graph.keys),
        schedules=tuple(schedules),
    )
