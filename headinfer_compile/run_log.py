"""Notes what a simulated session issues on its own memory, and looks for races in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from headinfer_compile.errors import ScheduleError
from headinfer_compile.race_detector import (
    ROLES,
    Entry,
    HostWaited,
    Issued,
    Recorded,
    Region,
    Replay,
    Waited,
    byte_runs,
)
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.slots import SlotRing


class RunLog:
    """The entries of one run; ``replay`` has seen all of them."""

    def __init__(self, session: Session) -> None:
        self.entries: list[Entry] = []
        self.replay = Replay()
        self._session = session
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []
        """Keeps the address of a buffer from being given to another one."""
        self._regions: dict[tuple[object, ...], Region] = {}
        self._known: tuple[object, ...] = ()
        self._ring: SlotRing | None = None

    def op(
        self, role: str, func: Any, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Note an op at the end of a stream.

        Raises:
            ScheduleError: A copy stream works on memory that is not the session's.
        """
        self._issue(role, func._schema.name.split("::")[1], reads, writes)

    def host_function(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Note a host function at the end of the cpu stream; raises as ``op``."""
        self._issue("cpu", "host_attention", reads, writes)

    def _issue(
        self, role: str, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        self._learn_buffers()
        for tensor in (*reads, *writes):
            if role != "compute" and _address(tensor) not in self._names:
                raise ScheduleError(
                    f"a copy on {role} works on a tensor {tuple(tensor.shape)} that is not the "
                    "session's: it may be freed while the copy is under way"
                )
        found = [tuple(map(self._region, filter(self._owns, part))) for part in (reads, writes)]
        if any(found):
            self._add(Issued(ROLES.index(role), what, *found))

    def record(self, role: str, ticket: int) -> None:
        """Note the record of an event."""
        self._learn_buffers()
        self._add(Recorded(ROLES.index(role), ticket))

    def wait(self, role: str, ticket: int, label: Hashable) -> None:
        """Note a wait for a record."""
        self._add(Waited(ROLES.index(role), ticket, label))

    def host_waits(self, role: str) -> None:
        """Note that the host waits for a stream."""
        self._add(HostWaited(ROLES.index(role)))

    def check(self) -> None:
        """Check that all conflicting accesses so far are ordered by events.

        Raises:
            ScheduleError: Two are not; they and their buffer are named.
        """
        if self.replay.races:
            raise ScheduleError(f"race: {self.replay.races[0]}")

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.replay.feed(entry)

    def _owns(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._names

    def _region(self, tensor: torch.Tensor) -> Region:
        key = (
            _address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(),
            tensor.element_size(),
        )  # fmt: skip
        if key not in self._regions:
            self._regions[key] = Region(self._names[key[0]], key[0], byte_runs(tensor))
        return self._regions[key]

    def _learn_buffers(self) -> None:
        session = self._session
        if session.geometry is None:
            return
        held = session.staging is None, id(session.lane)
        known = (session.generation, session.table.changes, len(session.table.blocks), *held)
        if known != self._known:
            self._known = known
            for name, tensor in self._buffers():
                self._names[_address(tensor)] = name
                self._kept.append(tensor)
        if session.slots is not self._ring:
            # The allocator passes memory on in the order of compute: a ring that is given up may
            # be written by compute from here on, and a new one by what compute was given before.
            for ring in (self._ring, session.slots):
                if ring is not None:
                    buffers = [slot.buffer for slot in ring.slots]
                    self._names[_address(buffers[0])] = "the slots"
                    self._kept += buffers
                    whole = tuple(map(self._region, buffers))
                    self._add(Issued(0, "another use of the memory", (), whole))
            self._ring = session.slots

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        session = self._session
        yield "the tail", session.tail.all_layers[0]
        for block in session.table.blocks:
            for k, _ in block.pages.values():
                yield f"the pages of block {block.index}", k
        if session.staging is not None:
            yield "the staging buffers", session.staging.views(0, 0, 1)[0]
        if session.lane is not None:
            yield from session.lane.buffers.items()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
