"""What passes share: the site record, the context of a run, and the reasons for declining."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import DeclinedError
from headinfer_compile.runtime.expand import TokenFunction
from headinfer_compile.runtime.masks import MaskForm

log = logging.getLogger(__name__)

#: The one key of ``node.meta`` that belongs to this package.
META = "headinfer"


@dataclass(frozen=True)
class AttentionSite:
    """One attention with its cache update, as found in a graph.

    ``mask`` is None until ``recover_mask`` has run.
    """

    index: int
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    is_causal: bool
    mask: MaskForm | None
    source: str
    """File and line of the model that called the attention."""
    bottom_right: bool = False
    """``is_causal`` means ``kv <= q + past`` (flash_attn) and not torch's top-left alignment."""
    soft_cap: float | None = None
    """Scores s are ``soft_cap * tanh(s / soft_cap)``."""
    sinks: int | None = None
    """Place among the site's inputs of ``Hq`` scores, each of a key whose value is zero."""
    expand: TokenFunction | None = None
    """What makes K and V of the cached rows, of which ``num_kv_heads`` is the number of heads."""
    window: int | None = None
    """``kv > q + past - window`` besides the mask, as an argument of the call; part of ``mask``
    once ``recover_mask`` has run."""


@dataclass(frozen=True)
class Decline:
    """An attention or mask that a pass left alone, and why."""

    pass_name: str
    node: str
    reason: str
    source: str


@dataclass
class PassContext:
    """State of one run of the pipeline over one graph."""

    config: HeadInferConfig
    example_inputs: Sequence[Any]
    sites: list[AttentionSite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    pass_name: str = ""

    def decline(self, node: Node, reason: str) -> None:
        """Record that the current pass leaves ``node`` alone.

        Raises:
            DeclinedError: ``config.strict`` is set.
        """
        entry = Decline(self.pass_name, node.name, reason, source_line(node))
        self.declines.append(entry)
        message = f"{entry.pass_name}: {entry.node} is left alone: {reason} (at {entry.source})"
        if self.config.strict:
            raise DeclinedError(message)
        log.warning("%s", message)


Pass = Callable[[GraphModule, PassContext], GraphModule]


def source_line(node: Node) -> str:
    """The innermost model line that made ``node``: ``path:line, in function``."""
    trace = node.stack_trace or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return "unknown line"
    parts = frames[-1].split(", ")
    return f"{parts[0][6:-1]}:{parts[1].removeprefix('line ')}, {', '.join(parts[2:])}"
