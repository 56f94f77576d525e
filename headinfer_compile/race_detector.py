"""Finds two accesses of one buffer, on two streams, that no chain of events orders.

A simulated run is noted as it is issued: ops with the memory they read and write, records of events
and waits for them, waits of the host. ``Replay`` gives every op a vector clock over the streams and
checks each access against those that it meets. It sees the real views, rows and heads, where
``passes/verify.py`` sees whole buffers, and it needs no unlucky order: one run shows every race of
the ops in it. A run that is kept can be replayed without one of its waits.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

ROLES = ("compute", "h2d", "d2h", "cpu")
_COMPUTE, _COUNT = ROLES.index("compute"), len(ROLES)


@dataclass(eq=False)
class Region:
    """The bytes of one view of a session's buffer."""

    buffer: str
    storage: int
    runs: tuple[tuple[int, int], ...]
    """Half-open byte ranges, ascending."""
    _meets: dict[Region, bool] = field(default_factory=dict)

    def meets(self, other: Region) -> bool:
        """Whether a byte of one is a byte of the other."""
        found = self._meets.get(other)
        if found is None:
            found = self._meets[other] = other._meets[self] = self._overlaps(other)
        return found

    def _overlaps(self, other: Region) -> bool:
        at = 0
        for start, stop in self.runs:
            while at < len(other.runs) and other.runs[at][1] <= start:
                at += 1
            if at < len(other.runs) and other.runs[at][0] < stop:
                return True
        return False


def byte_runs(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """The half-open byte ranges of its storage that a view covers, ascending and joined."""
    if not tensor.numel():
        return ()
    item = tensor.element_size()
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s)
    length = 1
    while dims and dims[0][0] == length:
        length *= dims.pop(0)[1]
    offsets = [range(0, stride * count, stride) for stride, count in dims]
    starts = sorted(int(tensor.storage_offset()) + sum(at) for at in product(*offsets))
    runs: list[tuple[int, int]] = []
    for start in starts:
        first, last = start * item, (start + length) * item
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return tuple(runs)


@dataclass(frozen=True)
class Issued:
    """An op at the end of a stream."""

    stream: int
    what: str
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]


@dataclass(frozen=True)
class Recorded:
    """A record of an event at the end of a stream."""

    stream: int
    ticket: int


@dataclass(frozen=True)
class Waited:
    """A wait for a record at the end of a stream."""

    stream: int
    ticket: int
    label: Hashable
    """The wait by name, or by its place in a schedule."""


@dataclass(frozen=True)
class HostWaited:
    """The host waits for all that a stream was given."""

    stream: int


Entry = Issued | Recorded | Waited | HostWaited


@dataclass
class _Uses:
    """The last write and read of a region on each stream: tick and op."""

    writes: dict[int, tuple[int, str]] = field(default_factory=dict)
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)


class Replay:
    """The clocks after some entries of a run, and the races among them."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.needless: set[Hashable] = set()
        self.needed: set[Hashable] = set()
        """Waits by label that ordered nothing new, and that did; a label may be in both."""
        self._clocks = [[0] * _COUNT for _ in ROLES]
        self._host = [0] * _COUNT
        self._tickets: dict[int, list[int]] = {}
        self._uses: dict[int, dict[Region, _Uses]] = {}

    def feed(self, entry: Entry) -> None:
        """Go on by one entry."""
        clock = self._clocks[entry.stream]
        if isinstance(entry, Issued):
            self._issue(entry, clock)
        elif isinstance(entry, Recorded):
            self._tickets[entry.ticket] = list(map(max, clock, self._host))
        elif isinstance(entry, HostWaited):
            self._host = list(map(max, clock, self._host))
        else:
            joined = list(map(max, clock, self._host, self._tickets[entry.ticket]))
            known = joined == list(map(max, clock, self._host))
            (self.needless if known else self.needed).add(entry.label)
            clock[:] = joined

    def _issue(self, entry: Issued, clock: list[int]) -> None:
        clock[:] = map(max, clock, self._host)
        clock[entry.stream] += 1
        tick = clock[entry.stream], entry.what
        for region in entry.reads:
            self._check(entry, "reads", region, clock, ("writes",))
            self._at(region).reads[entry.stream] = tick
        for region in entry.writes:
            self._check(entry, "writes", region, clock, ("writes", "reads"))
            self._at(region).writes[entry.stream] = tick

    def _at(self, region: Region) -> _Uses:
        return self._uses.setdefault(region.storage, {}).setdefault(region, _Uses())

    def _check(
        self, entry: Issued, does: str, region: Region, clock: Sequence[int], against: Sequence[str]
    ) -> None:
        for other, uses in self._uses.get(region.storage, {}).items():
            for did in against:
                for stream, (tick, what) in getattr(uses, did).items():
                    if tick > clock[stream] and region.meets(other):
                        self.races.append(
                            f"{entry.what} on {ROLES[entry.stream]} {does} {region.buffer} while "
                            f"{what} on {ROLES[stream]} {did} it, and no event orders them"
                        )


def replay(entries: Sequence[Entry], without: Collection[Hashable] = ()) -> Replay:
    """The whole run, without the waits of some labels, up to its first race."""
    found = Replay()
    for entry in entries:
        if not (isinstance(entry, Waited) and entry.label in without):
            found.feed(entry)
            if found.races:
                break
    return found
