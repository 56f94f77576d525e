"""The edges of a schedule: each wait of each op, as the verifier and as the simulator sees it.

An edge is named by its place: the schedule, the number of its op, and the number of the wait in it.
``killed_by_verifier`` leaves one out of a proof; a simulated run whose waits are labelled by
``Places`` can be replayed without all executions of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from harness import CompiledModel
from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes import verify
from headinfer_compile.passes.happens_before import Clock, Timeline
from headinfer_compile.passes.schedule import PlanKey, Schedule
from headinfer_compile.runtime.ops import NAMESPACE
from headinfer_compile.runtime.session import Session
from headinfer_compile.simulator import Simulation
from mutator import opname

#: The schedule (and whether it is a prologue), the number of the op in it, of the wait in the op.
Edge = tuple[PlanKey, bool, int, int]


class _Leaky(Timeline):
    """A timeline that leaves out one wait, or none, and counts them."""

    def __init__(self, without: tuple[int, int] | None, numbers: dict[Node, int]) -> None:
        super().__init__()
        self.without, self.numbers = without, numbers
        self.seen: dict[tuple[int, int], bool] = {}
        """Whether a wait orders anything that is not ordered without it."""

    def issue(self, node: Node, stream: int, *events: Clock) -> None:
        """Issue without the chosen wait."""
        number, kept = self.numbers[node], []
        for index, event in enumerate(events):
            place = number, index
            if place != self.without:
                kept.append(event)
            others = [self.streams[stream], *events[:index], *events[index + 1 :]]
            known = [max(clock[i] for clock in others) for i in range(3)]
            self.seen[place] = any(event[i] > known[i] for i in range(3))
        super().issue(node, stream, *kept)


def ops_in(schedule: Schedule) -> list[Node]:
    """The ops of a schedule in order."""
    return [node for node in schedule.graph_module.graph.nodes if opname(node)]


def _prove(schedule: Schedule, prologue: bool, without: tuple[int, int] | None) -> _Leaky:
    numbers = {node: number for number, node in enumerate(ops_in(schedule))}
    timeline = _Leaky(without, numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "Timeline", lambda: timeline)
        verify.run(schedule.graph_module, schedule.key, prologue=prologue)
    return timeline


def edges_of(schedule: Schedule, prologue: bool) -> dict[Edge, bool]:
    """Every edge of a schedule, and whether it orders what nothing else orders."""
    found = _prove(schedule, prologue, None).seen
    return {(schedule.key, prologue, *place): needed for place, needed in found.items()}


def killed_by_verifier(schedule: Schedule, edge: Edge) -> bool:
    """Whether the schedule is refused without the edge."""
    try:
        _prove(schedule, edge[1], (edge[2], edge[3]))
    except ScheduleError:
        return True
    return False


class Places(TorchDispatchMode):
    """Follows which op of which schedule runs in a simulation, and labels its waits."""

    def __init__(self, simulation: Simulation, session: Session) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: dict[tuple[PlanKey, bool], Schedule] = {}
        self._schedule: tuple[PlanKey, bool] | None = None
        self._op = self._wait = -1
        simulation.place = self._place
        around = session.around_call

        @contextmanager
        def around_call() -> Iterator[None]:
            with around(), self:
                yield

        session.around_call = around_call

    def _place(self, edge: str) -> tuple[Hashable, ...]:
        if self._schedule is None or "joins" in edge:
            # Of `drain`, or of the ring when it is made.
            return (edge,)
        self._wait += 1
        return (*self._schedule, self._op, self._wait)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self._op, self._wait = self._op + 1, -1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def following(self, model: CompiledModel) -> Iterator[None]:
        """Let the schedules that a model has built tell when they run."""
        books = [(graph.schedules, False) for graph in model.graphs]
        books += [(graph.prologues, True) for graph in model.graphs]
        before = [dict(book) for book, _ in books]
        for book, prologue in books:
            book.update({key: self._follow(found, prologue) for key, found in book.items()})
        try:
            yield
        finally:
            for (book, _), original in zip(books, before, strict=True):
                assert set(book) == set(original), "a schedule that was built now was not followed"
                book.update(original)

    def _follow(self, schedule: Schedule, prologue: bool) -> Schedule:
        def function(*args: Any) -> Any:
            self._schedule, self._op = (schedule.key, prologue), -1
            self.used[self._schedule] = schedule
            try:
                return schedule.function(*args)
            finally:
                self._schedule = None

        return replace(schedule, function=function)
