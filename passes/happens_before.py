"""Vector clocks over the streams of a schedule: which op comes after which, and who may conflict.

An op comes after what its stream did before and after the events it waits for; nothing else orders
anything. A buffer remembers its last write and its last read on each stream, which is enough to
find every pair of accesses that nothing orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from headinfer_compile.errors import ScheduleError

STREAM_NAMES = ("compute", "h2d", "d2h", "cpu")
COMPUTE, H2D, D2H, CPU = range(4)

#: How many ops of each stream come before.
Clock = tuple[int, int, int, int]


def not_proved(node: Node | None, reason: str) -> ScheduleError:
    """The error of a schedule that breaks a rule at ``node`` (None: as a whole)."""
    where = f"{node.name}: " if node is not None else ""
    return ScheduleError(f"the schedule is not proved and was not run: {where}{reason}")


@dataclass
class _Buffer:
    writer: Node | None
    """None: an op of an earlier site; also in ``readers``."""
    written: tuple[int, int]
    """Stream of the write and its place there."""
    readers: dict[int, tuple[Node | None, int]]


@dataclass
class Timeline:
    """The ops issued so far and the accesses of each buffer."""

    streams: list[Clock] = field(default_factory=list)
    """The clock of the last op of each stream."""
    clocks: dict[Node, Clock] = field(default_factory=dict)
    """What an op that waits for this node comes after."""
    buffers: dict[str, _Buffer] = field(default_factory=dict)

    def enter(self, name: str, stream: int, tick: int, read: Mapping[int, int]) -> None:
        """Declare a buffer that earlier sites wrote and read: stream and place of the last ones."""
        readers: dict[int, tuple[Node | None, int]] = {on: (None, at) for on, at in read.items()}
        self.buffers[name] = _Buffer(None, (stream, tick), readers)

    def issue(self, node: Node, stream: int, *events: Clock) -> None:
        """Put an op that waits for ``events`` at the end of a stream."""
        ticks = list(self.streams[stream])
        for event in events:
            ticks = list(map(max, ticks, event))
        ticks[stream] += 1
        compute, h2d, d2h, cpu = ticks
        self.streams[stream] = self.clocks[node] = (compute, h2d, d2h, cpu)

    def read(self, node: Node, stream: int, name: str) -> None:
        """Let an issued op read a buffer.

        Raises:
            ScheduleError: The last write may still be under way.
        """
        buffer, clock = self.buffers[name], self.clocks[node]
        if clock[buffer.written[0]] < buffer.written[1]:
            raise _race(node, stream, "reads", name, buffer.writer, buffer.written[0], "writes")
        buffer.readers[stream] = (node, clock[stream])

    def write(self, node: Node, stream: int, name: str) -> None:
        """Let an issued op write a buffer.

        Raises:
            ScheduleError: A read or write before it may still be under way.
        """
        buffer, clock = self.buffers[name], self.clocks[node]
        for other, (reader, tick) in buffer.readers.items():
            if clock[other] < tick:
                raise _race(node, stream, "writes", name, reader, other, "reads")
        if clock[buffer.written[0]] < buffer.written[1]:
            raise _race(node, stream, "writes", name, buffer.writer, buffer.written[0], "writes")
        buffer.writer, buffer.written, buffer.readers = node, (stream, clock[stream]), {}


def _race(
    node: Node, stream: int, does: str, name: str, other: Node | None, other_stream: int, did: str
) -> ScheduleError:
    earlier = other.name if other is not None else "an op of an earlier site"
    return not_proved(
        node,
        f"on {STREAM_NAMES[stream]} it {does} {name} while {earlier} on "
        f"{STREAM_NAMES[other_stream]} {did} it: the edge from {earlier} to {node.name} is missing",
    )
