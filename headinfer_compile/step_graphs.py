"""CUDA graphs of whole decode steps whose KV is resident (``cuda_graphs=True``).

A step is captured by running the same regions and schedules under capture; every length they need
is read from device memory (``runtime/paged.py``). What changes from step to step on the host, the
committed length and integers that the graph returns, is computed beside the replay.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.passes.graph_utils import node_value
from headinfer_compile.runtime.cudagraph import CapturedStep
from headinfer_compile.runtime.session import Session

if TYPE_CHECKING:
    from headinfer_compile.executor import CompiledGraph

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 2
"""Steps run before a capture, so that kernels are compiled and workspaces allocated."""


class StepGraphs:
    """The captured steps of one Dynamo graph, one for each cache."""

    def __init__(self, owner: CompiledGraph) -> None:
        self._owner = owner
        self._captured: weakref.WeakKeyDictionary[Session, tuple[Any, CapturedStep]]
        self._captured = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakKeyDictionary[Session, tuple[Any, int]]
        self._seen = weakref.WeakKeyDictionary()
        self._reason: str | None = None
        self._scalars: Callable[..., Sequence[Any]] | None = None

    def run(self, session: Session, args: Sequence[Any]) -> Any:
        """Replay the step if it was captured, else run it, capturing it once it has warmed up."""
        past = self._past(args)
        if past is None or not session.can_capture(past):
            return self._owner.forward(*args)
        session.specs = self._owner.specs
        session.begin(past, 1)
        mask = self._padding_mask(args)
        if mask is not None and session.learn_padding(mask):
            return self._owner.forward(*args)
        tables = session.sync_paged(mask)
        state = (session.generation, tables.version, len(session.table.blocks))
        held = self._captured.get(session)
        if held is None or held[0] != state or not held[1].matches(args):
            seen, count = self._seen.get(session, (None, 0))
            count = count + 1 if seen == state else 1
            self._seen[session] = (state, count)
            if count <= _WARM_UP_STEPS or session.tail_rows == 0:
                return self._owner.forward(*args)
            session.observer = None  # its marks cannot be captured
            held = (state, CapturedStep(self._owner.forward, args, self._mask_index))
            self._captured[session] = held
            log.info("captured a decode step of %d tokens as a CUDA graph", past + 1)
        outputs = held[1].replay(args)
        session.counters.op_calls["replay"] += 1
        assert self._scalars is not None
        for index, value in enumerate(self._scalars(*args)):
            if value is not None:
                outputs[index] = value
        return tuple(outputs)

    def _past(self, args: Sequence[Any]) -> int | None:
        """The past length of this call, or None if it has no graph; says why once."""
        if self._reason is None:
            self._reason = self._analyse()
            if self._reason:
                log.info("no CUDA graph of this Dynamo graph: %s", self._reason)
        return None if self._reason else int(args[self._past_index])

    def _analyse(self) -> str:
        graph = self._owner.graph_module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        sites = [node for node in graph.nodes if node.op == "call_module" and "site_" in node.name]
        if len(sites) != len(self._owner.sites) or self._owner.report.declines:
            return "an attention is not rewritten"
        _, q, _, _, masks, past = sites[0].args
        if not isinstance(q, Node) or node_value(q).shape[2] != 1:
            return "it is no one-token decode"
        if not isinstance(past, Node) or past not in placeholders:
            return "the past length is no input of the graph"
        for node in graph.nodes:
            if node.op == "call_module" and "site_" not in node.name:
                scalar = next((a for a in node.all_input_nodes if not _is_tensor(a)), None)
                if scalar is not None and not isinstance(node_value(scalar), tuple):
                    return f"{node.name} computes with the length {scalar.name}: pass position_ids"
        self._past_index = placeholders.index(past)
        self._mask_index = None
        form = self._owner.specs[0].mask
        if form.padding is not None:
            assert isinstance(masks, (list, tuple))
            if masks[form.padding] not in placeholders:
                return "the padding mask is computed in the graph"
            self._mask_index = placeholders.index(masks[form.padding])
        self._scalars = _scalar_outputs(self._owner.graph_module)
        return ""

    def _padding_mask(self, args: Sequence[Any]) -> torch.Tensor | None:
        return None if self._mask_index is None else args[self._mask_index]


def _is_tensor(node: Node) -> bool:
    return isinstance(node_value(node), torch.Tensor)


def _scalar_outputs(gm: GraphModule) -> Callable[..., Sequence[Any]]:
    """A function of the graph's inputs that returns its integer outputs, None for its tensors."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)

    def copy(node: Node) -> Node:
        if node not in copies:
            for source in node.all_input_nodes:
                copy(source)
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        return copies[node]

    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    graph.output(
        tuple(
            (None if _is_tensor(item) else copy(item)) if isinstance(item, Node) else item
            for item in returned
        )
    )
    forward: Callable[..., Sequence[Any]] = GraphModule(torch.nn.Module(), graph).forward
    return forward
