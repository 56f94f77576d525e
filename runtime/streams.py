"""Streams by role and events, with stand-ins on devices that have none.

On a CPU everything runs in program order, so the stand-ins do nothing; the calls are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from headinfer_compile.runtime.copies import launch_host_function
from headinfer_compile.runtime.host_attention import HostKernel

Uses = Callable[[], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
"""What a host function reads and writes, for who has to know."""


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that the runtime uses."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class _DoneEvent:
    """Event of a device that runs in program order."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class Streams:
    """The h2d, d2h and cpu streams of one session; compute is the caller's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.device = device
        self._nothing: AbstractContextManager[None] = nullcontext()
        self._done = _DoneEvent()
        self.timed: Callable[..., AbstractContextManager[object]] | None = None
        """Wraps the contexts of ``on``, by role, while copies are timed."""
        if self.is_cuda:
            self._h2d = torch.cuda.Stream(device)
            self._d2h = torch.cuda.Stream(device)
            self._cpu = torch.cuda.Stream(device)
            self._compute = torch.cuda.current_stream(device)

    def begin_step(self) -> None:
        """Learn which stream the caller computes on; a new one follows what the last one did."""
        if self.is_cuda:
            current = torch.cuda.current_stream(self.device)
            if current != self._compute:
                current.wait_stream(self._compute)
                self._compute = current

    def new_event(self, name: str) -> Event:
        """A fresh, unrecorded event; ``name`` says what it stands for, ``"slot.filled"`` say."""
        return torch.cuda.Event() if self.is_cuda else self._done

    def timing_event(self) -> torch.cuda.Event:
        """A fresh event that takes the time; CUDA only."""
        return torch.cuda.Event(enable_timing=True)

    def on(self, role: str) -> AbstractContextManager[object]:
        """Context that makes the stream of ``role`` (``"h2d"``, ``"d2h"`` or ``"cpu"``) current."""
        # `with stream` costs 2 us on the host, `with torch.cuda.stream(stream)` 19.
        found: AbstractContextManager[object] = self._nothing
        if self.is_cuda:
            found = self._stream(role)
        return found if self.timed is None else self.timed(role, found)

    def _stream(self, role: str) -> torch.cuda.Stream:
        return {
            "h2d": self._h2d, "d2h": self._d2h, "cpu": self._cpu, "compute": self._compute,
        }[role]  # fmt: skip

    def record(self, event: Event, role: str) -> None:
        """Record ``event`` on the stream of ``role``."""
        if self.is_cuda:
            assert isinstance(event, torch.cuda.Event)
            event.record(self._stream(role))

    def wait(self, event: Event, role: str) -> None:
        """Make the stream of ``role`` wait for ``event``; the host does not wait."""
        if self.is_cuda:
            assert isinstance(event, torch.cuda.Event)
            self._stream(role).wait_event(event)

    def join(self, role: str, other: str) -> None:
        """Make all later work of ``role`` wait for all earlier work of ``other``."""
        if self.is_cuda:
            self._stream(role).wait_stream(self._stream(other))

    def drain(self) -> None:
        """Block the host until the copy streams and the CPU lane are idle."""
        if self.is_cuda:
            for stream in (self._h2d, self._d2h, self._cpu):
                stream.synchronize()

    def call(self, kernel: HostKernel, job: int, uses: Uses) -> None:
        """Run a job on the cpu stream, after what that was given before; ``uses`` is not asked."""
        if self.is_cuda:
            launch_host_function(self.raw("cpu"), kernel.function, job)
        else:
            kernel.run(job)

    def raw(self, role: str) -> int:
        """The ``cudaStream_t`` of a role, for calls past torch."""
        return int(self._stream(role).cuda_stream)
