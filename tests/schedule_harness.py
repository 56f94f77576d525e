"""Plan keys and schedules for the tests of the plan passes and of the verifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import GraphModule

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes.pipeline import Dump, build_prologue, build_schedule
from headinfer_compile.passes.schedule import PieceKind, PlanContext, PlanKey, Schedule

CONFIG = HeadInferConfig()


class Quiet(Dump):
    """Wants no text: torch keeps a handler for traces until it compiles its first frame."""

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def wanted(self) -> bool:
        """Nobody reads."""
        return False


def plan_key(**fields: Any) -> PlanKey:
    """A prefill chunk over two host blocks with two slots, changed by ``fields``.

    ``following=True`` lets the next site be like this one.
    """
    following = fields.pop("following", False)
    default: dict[str, Any] = {
        "spec": 0, "phase": "prefill", "one_query": False, "causal": True, "appends": False,
        "has_tail": False, "pieces": (PieceKind("new", True),), "groups": 1, "chunks": 1,
        "resident": 0, "host": 2, "num_slots": 2, "distance": 1, "padded": False,
    }  # fmt: skip
    key = PlanKey(**{**default, **fields})
    return replace(key, next_transfers=key.transfers()[: key.entry]) if following else key


def decode_key(**fields: Any) -> PlanKey:
    """One token that joins a tail."""
    default: dict[str, Any] = {
        "phase": "decode", "one_query": True, "appends": True, "has_tail": True, "pieces": (),
    }  # fmt: skip
    return plan_key(**{**default, **fields})


def build(key: PlanKey, config: HeadInferConfig = CONFIG) -> Schedule:
    """The proved schedule of a key."""
    schedule, _ = build_schedule(PlanContext(key, config), Quiet(), keep_text=False)
    return schedule


def build_cold(key: PlanKey) -> Schedule:
    """The proved prologue of a key."""
    return build_prologue(PlanContext(replace(key, next_transfers=()), CONFIG))


def ops_of(gm: GraphModule, name: str) -> list[torch.fx.Node]:
    """Nodes that call ``headinfer.<name>``, in order."""
    target = getattr(torch.ops.headinfer, name).default
    return [node for node in gm.graph.nodes if node.target is target]


@st.composite
def plan_keys(draw: st.DrawFn, largest: int = 4) -> PlanKey:
    """Any geometry that the runtime can ask for, small."""
    num_slots = draw(st.integers(2, 4))
    fields: dict[str, Any] = {
        "groups": draw(st.integers(1, 3)),
        "resident": draw(st.integers(0, 2)),
        "host": draw(st.integers(0, largest)),
        "num_slots": num_slots,
        "distance": draw(st.integers(0, num_slots - 1)),
        "has_tail": draw(st.booleans()),
        "padded": draw(st.booleans()),
    }
    tiers = st.booleans()
    kind = draw(st.sampled_from(("chunk", "one token", "few tokens")))
    if kind == "chunk":
        tail = (PieceKind("tail", draw(tiers)),) if fields["has_tail"] else ()
        new = draw(st.lists(tiers, min_size=1, max_size=4))
        pieces = (*tail, *(PieceKind("new", to_host) for to_host in new))
        fields |= {"chunks": draw(st.integers(1, 3)), "causal": draw(st.booleans())}
        key = plan_key(**fields, pieces=pieces)
    else:
        pieces = (PieceKind("tail", draw(tiers)),) if draw(st.booleans()) else ()
        fused = kind == "one token" and fields["groups"] == 1 and draw(st.booleans())
        cpu = draw(st.integers(0, 2))
        key = decode_key(
            **fields, pieces=pieces, one_query=kind == "one token", fused=fused, cpu=cpu
        )
    if key.distance and draw(st.booleans()):
        following = replace(
            key, groups=draw(st.integers(1, 3)), host=draw(st.integers(0, largest)), spec=1
        )
        key = replace(key, next_transfers=following.transfers()[: following.entry])
    return key
