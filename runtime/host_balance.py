"""How many host blocks the CPU attends: moved until the CPU and the link finish together.

Each observed site gives the time by which the CPU was ahead of the GPU when their results met. The
count moves by whole blocks, at most once a step, and rests where no move would pay.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_FIRST_SHARE = 0.5
_MARGIN = 1.05
"""A move has to pay by this much: noise is no reason."""
_LARGEST_MOVE = 8
"""A step moves at most this part of the blocks, one at least: an outlier must not decide."""
_FIRST_REST = 32
"""Steps without the CPU before one block is tried again; doubled each time."""
_LINK_RATE = 40e9
"""Bytes a second of the link, until a move has shown what a block costs there."""


@dataclass
class Balance:
    """The count of one class of sites and one number of query tokens."""

    share: float = _FIRST_SHARE
    """Of the host blocks; kept as a share so that it grows with the context."""
    link_block: float | None = None
    """Seconds of a block on the link, as the last move showed it."""
    lead_seconds: float | None = None
    """By how much the CPU was ahead at the last observation; negative: the GPU waited for it."""
    _moved: int = 0
    _before: float = 0.0
    _last_sign: int = 0
    _blocks: int = 0
    _idle: int = 0
    _rest: int = _FIRST_REST

    def begin_step(self) -> None:
        """Let the CPU try again after a rest, where it has been left out."""
        if self._blocks and self.count(self._blocks) == 0:
            self._idle += 1
            if self._idle >= self._rest:
                self._idle, self._rest = 0, 2 * self._rest
                self.share, self._moved, self._last_sign = 1 / self._blocks, 0, 0

    def count(self, blocks: int) -> int:
        """Blocks for the CPU, of ``blocks`` on the host."""
        return min(blocks, int(self.share * blocks + 0.5))

    def update(
        self, blocks: int, count: int, leads: Sequence[float], cpu_block: float, link_block: float
    ) -> None:
        """Take what sites observed while the CPU had ``count`` of ``blocks`` blocks.

        Moving a block to the CPU pays if the CPU is ahead by more than that takes it, and moving
        one back if it is behind by more than the link takes.

        Args:
            blocks: Host blocks of a site.
            count: Those that the CPU had.
            leads: Seconds by which the CPU was ahead, one a site.
            cpu_block: Seconds that one block took the CPU.
            link_block: Seconds that one takes the link, as a first guess.
        """
        if count != self.count(blocks) or not leads or cpu_block <= 0:
            return  # the share has moved since
        self._blocks, lead = blocks, statistics.median(leads)
        if self._moved:
            # A block less on the link and one more on the CPU: both show in the lead.
            seen = (self._before - lead) / self._moved - cpu_block
            self.link_block = max(seen, 0.5 * link_block)
        self._moved, self._before, self.lead_seconds = 0, lead, lead
        link_block = self.link_block or link_block
        sign = (lead > _MARGIN * cpu_block) - (-lead > _MARGIN * link_block)
        agreed, self._last_sign = sign == self._last_sign, sign
        if not sign or not agreed:
            return  # twice in a row, or it was chance
        whole = int(abs(lead) / (cpu_block + link_block))
        move = sign * max(1, min(whole, blocks // _LARGEST_MOVE))
        target = min(max(0, count + move), blocks)
        if target != count:
            self._moved, self._last_sign, self.share = target - count, 0, target / blocks


class TimedEvent(Protocol):
    """The part of a timing event that is used."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any, /) -> float: ...


@dataclass(frozen=True)
class Race:
    """One observed site: when the CPU was done, and when compute came to need it."""

    balance: Balance
    blocks: int
    count: int
    block_bytes: int
    """Of one whole block."""
    cpu_done: TimedEvent
    gpu_there: TimedEvent


class Races:
    """Observed sites whose events may still be pending; nothing here waits for them."""

    def __init__(self, largest: int = 64) -> None:
        self._pending: deque[Race] = deque(maxlen=largest)

    def add(self, race: Race) -> None:
        """Note a site whose events are recorded."""
        self._pending.append(race)

    def settle(self, cpu_rate: float) -> None:
        """Tell each balance what the sites observed, for those whose events have been reached.

        Args:
            cpu_rate: Bytes a second that the CPU attended lately.
        """
        found: dict[tuple[int, int, int], tuple[Race, list[float]]] = {}
        while self._pending:
            race = self._pending[0]
            if not (race.cpu_done.query() and race.gpu_there.query()):
                break
            self._pending.popleft()
            key = (id(race.balance), race.blocks, race.count)
            lead = race.cpu_done.elapsed_time(race.gpu_there) * 1e-3
            found.setdefault(key, (race, []))[1].append(lead)
        for race, leads in found.values():
            seconds = race.block_bytes / cpu_rate, race.block_bytes / _LINK_RATE
            race.balance.update(race.blocks, race.count, leads, *seconds)
