"""What one op of a step is about: its layer, head group, KV block, transfer, slot.

While a step runs an op is noted as a tuple, since what that takes is added to every op; spans are
made of the notes when the step is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

#: A point in time on a stream: a CUDA event, or nanoseconds of the host's clock.
Mark = Any

#: Where an op's arguments, the handle left out, say what it is about.
_ARGUMENTS: dict[str, dict[str, int]] = {
    "pack": {"layer": 0},
    "offload": {"layer": 0},
    "tail": {"layer": 0},
    "resident": {"layer": 0, "group": 2, "block": 3},
    "prefetch": {"layer": 0, "group": 2, "block": 3, "slot": 4, "slot_of_site": 5},
    "attend": {"group": 5, "chunk": 6, "block": 7},
    "attend_merge": {"group": 7, "chunk": 8, "block": 9},
    "attend_resident": {"layer": 0},
    "attend_host": {"layer": 0, "block": 3},
    "merge_host": {"group": 5, "chunk": 6},
    "store": {"group": 3, "chunk": 4},
    "wait": {"transfer": 0},
    "release": {"transfer": 0},
}
_PICK: dict[str, Callable[[Sequence[Any]], Any]] = {
    name: itemgetter(*places.values()) for name, places in _ARGUMENTS.items()
}


@dataclass
class Span:
    """One op of one step. Times are microseconds from the start of the profile."""

    name: str
    layer: int | None = None
    group: int | None = None
    chunk: int | None = None
    block: int | None = None
    """KV block, or one of the negative spans of ``runtime/step.py``."""
    transfer: int | None = None
    slot: int | None = None
    nbytes: int = 0
    stream: str = "host"
    begin: Mark = None
    end: Mark = None
    host_begin: float = 0.0
    host_end: float = 0.0

    @property
    def label(self) -> str:
        """The name that profilers show."""
        parts = [f"headinfer.{self.name}"]
        for name in ("layer", "group", "chunk", "block", "slot"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={value}")
        return " ".join(parts)


def about(name: str, args: Sequence[Any]) -> Any:
    """What to note of an op's arguments: numbers, and no tensor."""
    pick = _PICK.get(name)
    return None if pick is None else pick(args)


def span_of(
    name: str, layer: int | None, noted: Any, num_slots: int, transfers: dict[int, Span]
) -> Span:
    """The span of an op, without its times.

    Args:
        name: Of the op.
        layer: Of the site that ran it.
        noted: From ``about``.
        num_slots: Of the ring.
        transfers: Spans of the transfers under way; one that is released is taken out.
    """
    fields = _ARGUMENTS.get(name, {})
    several = noted if len(fields) > 1 else (noted,) * len(fields)
    values = dict(zip(fields, several, strict=True))
    if name in ("wait", "release"):
        source = transfers.get(noted)
        if name == "release":
            transfers.pop(noted, None)
        if source is None:
            return Span(name, layer)
        values = {
            part: getattr(source, part) for part in ("layer", "group", "block", "transfer", "slot")
        }
    elif name == "prefetch":
        values["slot"] = (values["slot"] + values.pop("slot_of_site")) % num_slots
    return Span(name, **{"layer": layer, **values})
