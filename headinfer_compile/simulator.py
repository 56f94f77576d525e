"""Runs a cache's steps on CPU as its streams would, in any order that the events allow.

Inside a simulated call no tensor op runs when it is issued: it goes to the queue of its stream
(compute, h2d, d2h, cpu) with the events around it, as the runtime records and waits for them. A
seeded generator decides how far each queue runs ahead of the others. What a stream has not computed
yet reads as NaN, and so does a slot or staging buffer that was given up. When no edge is missing,
every seed gives bitwise the same result; without an edge that is needed, some seed gives another,
and whatever the seed, the log of the run shows the race (``run_log.py``). Regions must be lowered
with ``lowering="eager"``: Inductor's kernels do not go through the dispatcher.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headinfer_compile.cache import HeadInferCache
from headinfer_compile.errors import HeadInferError
from headinfer_compile.race_detector import ROLES
from headinfer_compile.run_log import RunLog
from headinfer_compile.runtime.host_attention import HostKernel
from headinfer_compile.runtime.ops import NAMESPACE
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.streams import Event, Streams, Uses

_RATES = (0.0, 0.05, 0.6, 0.95)
"""Chances that a stream runs one more op after the host has issued one: from idle to keeping up."""

_PACE_CHANGES = 0.25
"""Chance that a call draws new rates: a stream that idles has to do so over several calls."""

_aten = torch.ops.aten
#: Ops that give the host a value, so that it waits for compute.
_HOST_READS = frozenset(
    (
        _aten._local_scalar_dense.default,
        _aten.equal.default,
        _aten.is_nonzero.default,
        _aten.nonzero.default,
    )
)
#: Ops that only make memory.
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)


@dataclass
class _Ticket:
    """One record of an event: what a wait issued after it waits for."""

    role: str
    number: int
    done: bool = False


@dataclass
class _Entry:
    """One entry of a queue."""

    run: Callable[[], object] | None = None
    waits_for: _Ticket | None = None
    records: _Ticket | None = None


class SimulatedEvent:
    """An event that remembers its last record."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.name = name
        self.ticket: _Ticket | None = None
        self._simulation = simulation

    def query(self) -> bool:
        """Whether the last record has been reached."""
        return self.ticket is None or self.ticket.done

    def synchronize(self) -> None:
        """Run until the last record has been reached."""
        if self.ticket is not None:
            self._simulation.reach(self.ticket)


class Simulation:
    """The queues of one simulated cache.

    ``edges`` counts the waits that were issued, by name: ``"h2d waits for slot.freed"``,
    ``"compute joins d2h"``. ``dropped`` counts those that were left out.
    """

    def __init__(self, session: Session, seed: int, drop: str | None, only: int | None) -> None:
        self.edges: Counter[str] = Counter()
        self.dropped = 0
        self.role = "compute"
        self.executing = False
        self.finished = False
        self.log = RunLog(session)
        self.place: Callable[[str], tuple[Hashable, ...]] | None = None
        """Says where in a schedule the host is, to label the waits in ``log``; else by number."""
        self._session = session
        self._drop, self._only = drop, only
        self._random = random.Random(seed)
        self._queues: dict[str, deque[_Entry]] = {role: deque() for role in ROLES}
        self._tickets = 0
        self._mode = _Deferring(self)
        self._in_call = self._deferring = False
        self.new_pace()

    def new_pace(self) -> None:
        """Draw anew how fast each stream runs."""
        self._rates = {role: self._random.choice(_RATES) for role in ROLES}

    # -- what the host issues ---------------------------------------------------------------

    def issue(self, role: str, entry: _Entry) -> None:
        """Append to the queue of a stream, then let the streams run as far as chance takes them."""
        self._queues[role].append(entry)
        if self.finished or (role == "compute" and not self._in_call):
            # Outside of a call compute ops run when they are called, so all before them has to.
            self.finish(role)
            return
        for other in self._random.sample(ROLES, len(ROLES)):
            while self._random.random() < self._rates[other] and self._step(other):
                pass

    def record(self, event: SimulatedEvent, role: str) -> None:
        """Record ``event``; a slot or staging buffer that it gives up reads as NaN from here on."""
        for buffer in self._given_up_by(event):
            self.issue(role, _Entry(run=partial(buffer.fill_, float("nan"))))
        event.ticket = self._new_ticket(role)

    def wait(self, role: str, ticket: _Ticket | None, edge: str) -> None:
        """Make a stream wait for a record, unless this edge is the one to leave out."""
        index = self.edges[edge]
        self.edges[edge] += 1
        if edge == self._drop and self._only in (None, index):
            self.dropped += 1
        elif ticket is not None:
            label = (edge, index) if self.place is None else self.place(edge)
            self.log.wait(role, ticket.number, label)
            self.issue(role, _Entry(waits_for=ticket))

    def join(self, role: str, other: str) -> None:
        """Make a stream wait for all that another was given so far."""
        self.wait(role, self._new_ticket(other), f"{role} joins {other}")

    def _new_ticket(self, role: str) -> _Ticket:
        self._tickets += 1
        ticket = _Ticket(role, self._tickets)
        self.log.record(role, ticket.number)
        self.issue(role, _Entry(records=ticket))
        return ticket

    # -- what the streams do ----------------------------------------------------------------

    def _step(self, role: str) -> bool:
        """Run the head of a queue; False when it is empty or has to wait."""
        queue = self._queues[role]
        if not queue or (queue[0].waits_for is not None and not queue[0].waits_for.done):
            return False
        entry = queue.popleft()
        if entry.run is not None:
            before, self.executing = self.executing, True
            # Inference mode lets normal and inference tensors be written alike, whoever runs this.
            with torch.inference_mode(), torch._C._DisableAutocast():
                entry.run()
            self.executing = before
        if entry.records is not None:
            entry.records.done = True
        return True

    def reach(self, ticket: _Ticket) -> None:
        """Run until a record is reached, other streams only as far as it needs them."""
        while not ticket.done:
            self._advance(ticket.role)

    def finish(self, role: str) -> None:
        """Run a queue to its end, other streams only as far as it needs them."""
        while self._queues[role]:
            self._advance(role)

    def _advance(self, role: str) -> None:
        if not self._step(role):
            ticket = self._queues[role][0].waits_for
            assert ticket is not None
            self.reach(ticket)

    def synchronize(self) -> None:
        """Run everything, as a device-wide synchronisation would."""
        for role in ROLES:
            self.host_waits(role)

    def host_waits(self, role: str) -> None:
        """Let the host wait for a stream."""
        self.finish(role)
        self.log.host_waits(role)

    def _given_up_by(self, event: SimulatedEvent) -> Sequence[torch.Tensor]:
        session = self._session
        if event.name == "slot.freed" and session.slots is not None:
            return [slot.buffer for slot in session.slots.slots if slot.freed is event]
        if event.name == "staging.copied" and session.staging is not None:
            staging = session.staging
            index = next(i for i, copied in enumerate(staging.copied) if copied is event)
            return staging.views(index, 0, staging.tokens)
        return ()

    # -- where ops are deferred -------------------------------------------------------------

    @contextmanager
    def call(self, synchronize: bool) -> Iterator[None]:
        """Defer the ops of one compiled call; ``synchronize`` as ``simulated``."""
        if self._random.random() < _PACE_CHANGES:
            self.new_pace()
        self._in_call = True
        try:
            with self.on("compute"):
                yield
        finally:
            self._in_call = False
        if synchronize:
            self.host_waits("compute")

    @contextmanager
    def on(self, role: str) -> Iterator[None]:
        """Defer the ops of this context to the queue of ``role``."""
        before, self.role = self.role, role
        entering = not self._deferring
        self._deferring = True
        try:
            with self._mode if entering else nullcontext():
                yield
        finally:
            self.role = before
            self._deferring = not entering


class _Deferring(TorchDispatchMode):
    """Puts every op into the queue of the current stream; its results are NaN until it has run."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._simulation = simulation

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        simulation = self._simulation
        if simulation.executing:
            return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            # The op itself runs on the host; what it calls is deferred.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func in _HOST_READS:
            simulation.host_waits("compute")
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if written:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
            reads = [tensor for tensor in tensors if all(tensor is not w for w in written)]
            simulation.log.op(simulation.role, func, reads, written)
            simulation.issue(simulation.role, _Entry(run=partial(func, *args, **kwargs)))
            return written[0] if len(written) == 1 else tuple(written)
        return self._defer_functional(func, args, kwargs)

    def _defer_functional(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Run once on whatever is there, for the shapes; a view is then already what it should be.
        results = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        held = {_storage(tensor) for tensor in inputs}
        fresh = [
            (index, leaf)
            for index, leaf in enumerate(tree_leaves(results))
            if _is_tensor(leaf) and _storage(leaf) not in held
        ]
        if not fresh or not (inputs or func in _ALLOCATIONS):
            return results
        for _, leaf in fresh:
            leaf.fill_(float("nan") if leaf.is_floating_point() else 0)
        if func not in _ALLOCATIONS:

            def run() -> None:
                computed = tree_leaves(func(*args, **kwargs))
                for index, leaf in fresh:
                    leaf.copy_(computed[index])

            self._simulation.log.op(self._simulation.role, func, inputs, ())
            self._simulation.issue(self._simulation.role, _Entry(run=run))
        return results


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an op writes."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs[argument.name])
    return found


class SimulatedStreams(Streams):
    """``Streams`` whose work goes through a ``Simulation``."""

    def __init__(self, device: torch.device, simulation: Simulation) -> None:
        super().__init__(device)
        self._simulation = simulation

    def new_event(self, name: str) -> Event:
        return SimulatedEvent(self._simulation, name)

    def on(self, role: str) -> AbstractContextManager[object]:
        return self._simulation.on(role)

    def record(self, event: Event, role: str) -> None:
        assert isinstance(event, SimulatedEvent)
        self._simulation.record(event, role)

    def wait(self, event: Event, role: str) -> None:
        assert isinstance(event, SimulatedEvent)
        self._simulation.wait(role, event.ticket, f"{role} waits for {event.name}")

    def join(self, role: str, other: str) -> None:
        self._simulation.join(role, other)

    def call(self, kernel: HostKernel, job: int, uses: Uses) -> None:
        self._simulation.log.host_function(*uses())
        self._simulation.issue("cpu", _Entry(run=partial(kernel.run, job)))

    def drain(self) -> None:
        for role in ROLES[1:]:
            self._simulation.host_waits(role)


@contextmanager
def simulated(
    cache: HeadInferCache,
    *,
    seed: int,
    synchronize: bool = True,
    drop: str | None = None,
    only: int | None = None,
) -> Iterator[Simulation]:
    """Run the compiled calls of a new cache in an order drawn from ``seed``.

    Args:
        cache: A cache on CPU that has served no call.
        seed: Equal seeds give equal orders.
        synchronize: Finish compute at the end of each call, as reading the logits does. Without it
            results are complete only after ``Simulation.synchronize`` or the end of the context.
        drop: Name of an edge to leave out (``Simulation.edges`` has the names).
        only: Leave out only the occurrence with this index.

    Yields:
        The simulation. After the context the cache goes on without delays.

    Raises:
        HeadInferError: The cache has been used.
    """
    session = cache.session
    if session.geometry is not None:
        raise HeadInferError("a cache can be simulated only from its first call on: make a new one")
    simulation = Simulation(session, seed, drop, only)
    session.make_streams = partial(SimulatedStreams, simulation=simulation)
    session.around_call = partial(simulation.call, synchronize)
    try:
        yield simulation
    finally:
        simulation.synchronize()
        simulation.finished = True
        session.around_call = nullcontext
