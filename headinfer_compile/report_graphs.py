"""How ``explain`` watches a model: graphs that note what they run, and who keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from headinfer_compile.backend import compile_graph
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.executor import CompiledGraph
from headinfer_compile.machine import Machine
from headinfer_compile.passes.schedule import PlanKey
from headinfer_compile.plan_key import chained_key
from headinfer_compile.prediction import RegionWork
from headinfer_compile.runtime.ops import session_of
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.step import Step


@dataclass
class RecordedGraph(CompiledGraph):
    """Runs as ever and notes the plan key of every site."""

    has_run: bool = False
    keys: dict[int, PlanKey] = field(default_factory=dict)
    """By index of the site."""
    bases: dict[int, int] = field(default_factory=dict)
    """The ring slot at which the site began."""
    session: Session | None = None
    step: Step | None = None
    weights: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Elements and bytes of the parameters, by index of the graph's input."""
    embeddings: frozenset[int] = frozenset()
    """Which of them are read by rows and not multiplied by, at first."""

    def forward(self, *args: Any) -> Any:
        self._begin()
        return super().forward(*args)

    def run_site(
        self, index: int, handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        out = super().run_site(index, handle, q, k, v, masks, past)
        session = session_of(handle)
        key = self._note(index, session)
        # The site has moved the base on.
        self.bases[index] = (session.base - len(key.transfers())) % key.num_slots
        return out

    def _begin(self) -> None:
        self.keys, self.bases, self.session, self.step = {}, {}, None, None
        self.has_run = True

    def _note(self, index: int, session: Session) -> PlanKey:
        following = self.site_specs[index + 1] if index + 1 < len(self.sites) else None
        self.session, self.step = session, session.step
        key = chained_key(
            session, self.site_specs[index], following, self.site_specs[0], session.config
        )
        self.keys[index] = key
        return key

    def regions(self, tokens: int) -> dict[str, RegionWork]:
        """What each region needs for a step of ``tokens`` tokens, by name."""
        nodes = list(self.graph_module.graph.nodes)
        order = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
        names = {region.name for region in self.report.regions.regions}
        found: dict[str, RegionWork] = {}
        for node in nodes:
            if node.op != "call_module" or node.target not in names:
                continue
            inputs = {order[arg] for arg in node.all_input_nodes if arg in order}
            used = [self.weights[i] for i in inputs if i in self.weights]
            rows = self.embeddings & inputs if not found else frozenset()
            skipped = [self.weights[i] for i in rows]
            elements = sum(count for count, _ in used) - sum(count for count, _ in skipped)
            nbytes = sum(size for _, size in used) - sum(size for _, size in skipped)
            found[str(node.target)] = RegionWork(str(node.target), nbytes, 2 * elements * tokens)
        return found


@dataclass
class PlannedGraph(RecordedGraph):
    """Notes the plan key of every site and attends nothing; for tensors on the meta device."""

    def run_site(
        self, index: int, handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        session = session_of(handle)
        if session.step is None:
            self.start(session, k, v, past)
        key = self._note(index, session)
        self.bases[index] = session.base
        session.base = (session.base + len(key.transfers())) % key.num_slots
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


class Recorder:
    """A Dynamo backend that keeps every graph it compiles."""

    def __init__(
        self,
        config: HeadInferConfig,
        graph_type: type[RecordedGraph],
        model: torch.nn.Module,
        machine: Machine | None = None,
    ) -> None:
        """Keep what ``machine``, where its rates are known, makes of the options left open."""
        self.graphs: list[RecordedGraph] = []
        self._config, self._graph_type = config, graph_type
        self._machine = machine if machine is not None and machine.is_known else None
        embeddings = (m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        self._embeddings = {id(module.weight) for module in embeddings}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(
            gm, example_inputs, self._config, graph_type=self._graph_type, keep_text=True,
            machine=self._machine,
        )  # fmt: skip
        if isinstance(compiled, RecordedGraph):
            self.graphs.append(compiled)
            weights = {
                index: value
                for index, value in enumerate(example_inputs)
                if isinstance(value, torch.nn.Parameter)
            }
            compiled.weights = {i: (value.numel(), value.nbytes) for i, value in weights.items()}
            compiled.embeddings = frozenset(
                index for index, value in weights.items() if id(value) in self._embeddings
            )
            if self._graph_type is PlannedGraph:
                compiled.positions_index = None  # nothing can be read on the meta device
        return compiled

    def take(self) -> list[RecordedGraph]:
        """The graphs that have run since the last time."""
        ran = [graph for graph in self.graphs if graph.has_run]
        for graph in ran:
            graph.has_run = False
        return ran


@contextmanager
def compiled_by(model: torch.nn.Module, backend: Recorder) -> Iterator[None]:
    """Let calls of ``model`` go through ``backend``, and afterwards as before."""
    before = model._compiled_call_impl
    model.compile(backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = before
