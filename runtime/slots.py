"""The ring of GPU byte buffers that prefetches fill, with a tag and two events each.

The bytes do not depend on the context: a slot holds one KV block, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headinfer_compile.errors import ScheduleError
from headinfer_compile.runtime.spec import Geometry, kv_views
from headinfer_compile.runtime.streams import Event, Streams

Views = tuple[torch.Tensor, torch.Tensor]

NEVER_USED = -1
"""Release token of a slot that no transfer has used since the ring was last drained."""


@dataclass
class Slot:
    """One buffer of the ring."""

    buffer: torch.Tensor
    filled: Event
    """Recorded on h2d when the copy into the slot is queued."""
    freed: Event
    """Recorded on compute after the last reader of the slot is queued."""
    transfer: int = NEVER_USED
    tag: tuple[object, ...] | None = None
    views: Views | None = None
    released: bool = True


class SlotRing:
    """``num_slots`` buffers of ``slot_bytes`` bytes."""

    def __init__(
        self, geometry: Geometry, num_slots: int, slot_bytes: int, streams: Streams
    ) -> None:
        self.geometry = geometry
        self.slot_bytes = slot_bytes
        with torch.inference_mode(False):
            buffer = torch.empty((num_slots, slot_bytes), dtype=torch.uint8, device=geometry.device)
            rows = [row.view(geometry.dtype) for row in buffer.unbind()]
        self.nbytes = buffer.nbytes
        self.slots = [
            Slot(row, streams.new_event("slot.filled"), streams.new_event("slot.freed"))
            for row in rows
        ]
        self._transfers = 0
        self._views: dict[tuple[int, int, int, int], Views] = {}

    def acquire(self, index: int, after: int, tag: tuple[object, ...]) -> tuple[int, Slot]:
        """Claim slot ``index`` for a new transfer; the one before was released as ``after``.

        Raises:
            ScheduleError: The slot holds another transfer, or one that is still being read.
        """
        slot = self.slots[index]
        if slot.transfer != after or not slot.released:
            state = "released" if slot.released else "not released"
            raise ScheduleError(
                f"prefetch into slot {index} after release {after}, but the slot holds transfer "
                f"{slot.transfer}, {state}: the schedule is missing a release"
            )
        self._transfers += 1
        slot.transfer, slot.tag, slot.released = self._transfers, tag, False
        return self._transfers, slot

    def find(self, transfer: int) -> Slot:
        """The slot that ``transfer`` filled.

        Raises:
            ScheduleError: No slot holds it any more.
        """
        for slot in self.slots:
            if slot.transfer == transfer and not slot.released:
                return slot
        raise ScheduleError(
            f"transfer {transfer} is in no slot: it was overwritten or released before its last use"
        )

    def view(self, index: int, heads: int, rows: int, tokens: int) -> Views:
        """Slot ``index`` as K ``[heads, rows, tokens, D]`` and V ``[heads, rows, tokens, Dv]``."""
        key = (index, heads, rows, tokens)
        if key not in self._views:
            if len(self._views) > 256:
                self._views.clear()
            geometry = self.geometry.with_batch(rows)
            self._views[key] = kv_views(self.slots[index].buffer, geometry, heads, tokens)
        return self._views[key]

    def forget(self) -> None:
        """Mark every slot unused; the caller has ordered later work after all reads and copies."""
        for slot in self.slots:
            slot.transfer, slot.tag, slot.released = NEVER_USED, None, True
