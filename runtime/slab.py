"""Host memory for one token block of all layers: mapped, touched by many threads, registered.

``torch.empty(pin_memory=True)`` gives 1.6 GiB/s; mapping with huge pages, touching with all cores
and registering gives over 3 (``docs/design.md``), and the allocator's rounding to powers of two is
avoided.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.budget import refusing
from headinfer_compile.runtime.copies import forget_cuda_error
from headinfer_compile.runtime.numa import bind, device_cpus

log = logging.getLogger(__name__)

_REGISTER_STEP_BYTES = 256 << 20


class HostSlab:
    """One registered host buffer; plain memory where there is no CUDA."""

    def __init__(
        self, nbytes: int, unit_bytes: int, device: torch.device,
        cpus: frozenset[int] | None = None,
    ) -> None:  # fmt: skip
        """Map ``nbytes`` for a cache on ``device``; copies stay within multiples of ``unit_bytes``.

        A cache on the meta device, of which only the plan is wanted, takes no memory.

        Args:
            nbytes: Size.
            unit_bytes: Where registrations may end.
            device: Of the cache.
            cpus: Those near which the memory should be; None: anywhere.

        Raises:
            DoesNotFitError: The host has no such memory, or the driver refuses to pin it.
        """
        self.nbytes = nbytes
        self._registered: list[int] = []
        no_room = (
            f"the host has no room for {format_bytes(nbytes)} of KV pages: lower host_budget or "
            "the context, or free memory. What is stored is intact"
        )
        if device.type != "cuda":
            where = "meta" if device.type == "meta" else "cpu"
            with refusing(no_room), torch.inference_mode(False):
                self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=where)
            return
        # Whatever becomes of this slab, an interrupt while it is made too, nothing stays pinned.
        # Not at exit: the driver may be gone by then, and takes its registrations along.
        weakref.finalize(self, _unregister, self._registered).atexit = False
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DoesNotFitError(f"{no_room} ({error})") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._touch(cpus)
        self._register(unit_bytes)

    def _touch(self, cpus: frozenset[int] | None) -> None:
        start, workers = self.tensor.data_ptr(), min(16, len(cpus or ()) or os.cpu_count() or 1)
        step = -(-self.nbytes // workers)
        with ThreadPoolExecutor(workers, initializer=bind, initargs=(cpus,)) as pool:
            # ctypes releases the GIL, so the pages are faulted in by all threads at once.
            spans = [
                (start + at, min(step, self.nbytes - at)) for at in range(0, self.nbytes, step)
            ]
            list(pool.map(lambda span: ctypes.memset(span[0], 0, span[1]), spans))

    def _register(self, unit_bytes: int) -> None:
        cudart = torch.cuda.cudart()
        # A copy must not span two registrations, so each one ends where a page of KV ends.
        units = max(1, _REGISTER_STEP_BYTES // unit_bytes)
        step = units * unit_bytes if unit_bytes % mmap.PAGESIZE == 0 else self.nbytes
        for at in range(0, self.nbytes, step):
            pointer = self.tensor.data_ptr() + at
            # Noted first, or an interrupt right after the call would leave it registered.
            self._registered.append(pointer)
            status = cudart.cudaHostRegister(pointer, min(step, self.nbytes - at), 0)
            if int(status) != 0:
                forget_cuda_error()
                self.close()
                raise DoesNotFitError(
                    f"the driver refused to pin {format_bytes(self.nbytes)} of host memory "
                    f"({status}); lower host_budget or the context"
                )

    @property
    def registrations(self) -> int:
        """Ranges that are pinned."""
        return len(self._registered)

    def close(self) -> None:
        """Unregister; the memory goes back once no view of it is left."""
        _unregister(self._registered)


def _unregister(pointers: list[int]) -> None:
    while pointers:
        if int(torch.cuda.cudart().cudaHostUnregister(pointers[-1])) != 0:
            # The one that could not be registered.
            forget_cuda_error()
        pointers.pop()


class SlabAllocator:
    """Makes slabs ahead of use on a thread of its own, so that prefill does not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cpus = device, device_cpus(device)
        if self._cpus is not None:
            log.info("pages are placed on the NUMA node of %s, %d CPUs", device, len(self._cpus))
        name = "headinfer-slab"
        self._pool = ThreadPoolExecutor(1, name) if device.type == "cuda" else None
        self._ahead: dict[tuple[int, int], list[Future[HostSlab]]] = {}
        self._free: list[tuple[tuple[int, int], HostSlab]] = []

    @property
    def free_bytes(self) -> int:
        """Bytes of slabs that hold nothing and wait for ``take``."""
        return sum(slab.nbytes for _, slab in self._free)

    def give_back(self, slab: HostSlab, unit_bytes: int) -> None:
        """Keep a slab, which no copy uses, for another ``take`` of its size."""
        self._free.append(((slab.nbytes, unit_bytes), slab))

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Have ``(nbytes, unit_bytes)`` slabs made for ``take``, and give back any others."""
        wanted = Counter(sizes)
        for entry in list(self._free):
            size, slab = entry
            if wanted[size] > 0:
                wanted[size] -= 1
            else:
                self._free.remove(entry)
                slab.close()
        sizes = list(wanted.elements())
        if self._pool is None:
            return
        for size, futures in list(self._ahead.items()):
            while len(futures) > wanted[size]:
                self._discard(futures.pop())
            if not futures:
                del self._ahead[size]
        for size in sizes:
            futures = self._ahead.setdefault(size, [])
            if len(futures) < wanted[size]:
                futures.append(self._pool.submit(HostSlab, *size, self._device, self._cpus))

    def _discard(self, future: Future[HostSlab]) -> None:
        if not future.cancel():
            future.add_done_callback(_close_made)

    def take(self, nbytes: int, unit_bytes: int) -> HostSlab:
        """Return a slab: one that was given back, or is in preparation, or a new one.

        Raises:
            DoesNotFitError: As ``HostSlab``.
        """
        for entry in self._free:
            if entry[0] == (nbytes, unit_bytes):
                self._free.remove(entry)
                return entry[1]
        waiting = self._ahead.get((nbytes, unit_bytes))
        if waiting:
            future = waiting.pop(0)
            if not waiting:
                del self._ahead[nbytes, unit_bytes]
            return future.result()
        return HostSlab(nbytes, unit_bytes, self._device, self._cpus)

    def close(self) -> None:
        """Give back what was prepared and stop the thread."""
        for futures in self._ahead.values():
            for future in futures:
                self._discard(future)
        self._ahead.clear()
        for _, slab in self._free:
            slab.close()
        self._free.clear()
        if self._pool is not None:
            self._pool.shutdown()


def _close_made(future: Future[HostSlab]) -> None:
    if future.exception() is None:
        future.result().close()
