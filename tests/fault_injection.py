"""Raises at any op, allocation, kernel choice or line of a step, and keeps the books.

``Ops`` sees every operator of a compiled call, ours and those that they call. ``Lines`` sees every
line of the package that runs, clean-up after an error among them: an interrupt of the user comes
between any two. Both count first and raise at one number later. ``Books`` are what a cache says of
itself, ``contents`` the numbers that it holds.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headinfer_compile
from headinfer_compile import HeadInferCache
from headinfer_compile.runtime.ops import NAMESPACE
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.slab import HostSlab
from headinfer_compile.runtime.slots import SlotRing
from headinfer_compile.runtime.token_block import TokenBlock

_ROOT = Path(headinfer_compile.__file__).resolve().parent.parent
_FOLDERS = tuple(str(_ROOT / name) for name in ("headinfer_compile", "runtime"))

Failure = Callable[[], BaseException]


class Ops(TorchDispatchMode):
    """Raises at operator ``at`` of the calls of a cache (None: only notes their names)."""

    def __init__(self, cache: HeadInferCache, at: int | None, failure: Failure) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.raised: BaseException | None = None
        self._at, self._failure = at, failure
        cache.session.around_call = self._around

    @contextmanager
    def _around(self) -> Iterator[None]:
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(self.names) == self._at:
            self.raised = self._failure()
        self.names.append(func.name())
        if self.raised is not None:
            raise self.raised
        if func.namespace == NAMESPACE:
            # The implementation is called here, so that what it calls is seen too.
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Lines:
    """Raises ``KeyboardInterrupt`` at place ``at`` of the package (None: only counts).

    Places are the lines that run, the returns, and the returns of C functions called. Python itself
    handles a signal where a function is entered, at a jump backwards and after a call of C code, so
    these are all places that Ctrl-C can come to, and more: a line without a call, too.

    The trace function is held while it is set. CPython 3.11 does not hold it where it makes a frame
    object for a function that is entered: that may start the garbage collector, which may call a
    traced ``__del__``, and if the trace function raises in it, it is unset and freed. What has its
    memory by then is called (``TypeError: 'traceback' object is not callable``). Ten lines without
    this package do the same, and not if they hold the function. A signal frees nothing.

    The garbage collector rests meanwhile, so that the places of two runs are the same.
    """

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self.place = ""
        self._at = at
        self._collects = gc.isenabled()
        self._held = (self._trace, self._profile)

    def __enter__(self) -> Lines:
        gc.disable()
        trace, profile = self._held
        sys.setprofile(profile)
        sys.settrace(trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_FOLDERS):
            return None
        if event in ("line", "return"):
            self._count(frame, event)
        return self._held[0]

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_return" and frame.f_code.co_filename.startswith(_FOLDERS):
            self._count(frame, f"return of {called.__name__}")

    def _count(self, frame: FrameType, event: str) -> None:
        self.count += 1
        if self.count - 1 == self._at:
            self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} ({event})"
            raise KeyboardInterrupt(self.place)


@dataclass(frozen=True)
class Books:
    """What a cache holds, by its own account."""

    tokens: int
    tail_rows: int
    blocks: int
    host_bytes: int
    fixed_bytes: int
    registrations: int
    slots_in_use: int
    threads: int


def books_of(cache: HeadInferCache) -> Books:
    """The books of a cache between two calls, which must agree with each other."""
    session, stats = cache.session, cache.stats()
    assert session.step is None and not session.managed
    assert cache.length == stats.tokens == session.length
    slots = session.slots.slots if session.slots is not None else []
    in_use = sum(not slot.released for slot in slots)
    assert in_use == len(session.in_flight)
    for index, token in enumerate(session.ring):
        slot = slots[(session.base + index) % len(slots)] if slots else None
        assert slot is None or slot.transfer == token
    blocks = session.table.blocks if session.geometry is not None else []
    return Books(
        tokens=stats.tokens,
        tail_rows=session.tail_rows,
        blocks=len(blocks),
        host_bytes=stats.host_bytes,
        fixed_bytes=stats.fixed_bytes,
        registrations=sum(slab.registrations for block in blocks for slab in block.slabs.values()),
        slots_in_use=in_use,
        threads=threading.active_count(),
    )


def contents(cache: HeadInferCache) -> list[Tensor]:
    """Copies of all K and V that later calls read: in pages, in the tail, in transfers under way.

    Two caches with equal books and contents go on alike.
    """
    held: list[Tensor] = []
    session = cache.session
    if session.geometry is None:
        return held
    stored = session.length - session.tail_rows
    for block in session.table.blocks:
        rows = max(0, min(block.tokens, stored - block.start))
        held += [kv[:, :, :rows] for page in block.pages.values() for kv in page]
    held += [kv[:, :, : session.tail_rows] for page in session.tail.layers.values() for kv in page]
    if session.slots is not None:
        busy = [slot.views for slot in session.slots.slots if not slot.released]
        held += [kv for views in busy if views is not None for kv in views]
    return [kv.clone() for kv in held]


def failures() -> list[BaseException]:
    """What an op or an allocation may raise."""
    return [
        RuntimeError("the op failed"),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ]


def live_objects() -> Counter[str]:
    """Objects of the runtime that are alive."""
    gc.collect()
    kinds = (Session, HostSlab, SlotRing, TokenBlock)
    return Counter(type(item).__name__ for item in gc.get_objects() if type(item) in kinds)
