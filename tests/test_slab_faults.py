"""Host slabs whose mapping or registration fails: said so, and nothing stays registered.

The driver is a stand-in, so that each of its calls can fail; the memory is real.
"""

from __future__ import annotations

import gc
import mmap
import threading
from typing import Any

import pytest
import torch

from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.slab import HostSlab, SlabAllocator


class Driver:
    """A CUDA runtime on which ranges are registered, or not."""

    def __init__(self, refuse_at: int | None = None, interrupt_at: int | None = None) -> None:
        self.registered: set[int] = set()
        self.calls = 0
        self._refuse_at, self._interrupt_at = refuse_at, interrupt_at

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        assert nbytes > 0 and flags == 0
        self.calls += 1
        if self.calls == self._refuse_at:
            return 2
        self.registered.add(pointer)
        if self.calls == self._interrupt_at:
            raise KeyboardInterrupt
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        if pointer not in self.registered:
            return 62
        self.registered.remove(pointer)
        return 0


@pytest.fixture
def slab_sizes(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of a slab of five registrations, and of its unit."""
    unit = 4 * mmap.PAGESIZE
    monkeypatch.setattr("headinfer_compile.runtime.slab._REGISTER_STEP_BYTES", unit)
    monkeypatch.setattr("headinfer_compile.runtime.slab.forget_cuda_error", lambda: None)
    return 5 * unit, unit


CUDA = torch.device("cuda")


@pytest.mark.parametrize("at", range(1, 6))
def test_registrations_are_given_back(
    at: int, slab_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver refuses one, or an interrupt comes right after one."""
    for driver, error in (
        (Driver(refuse_at=at), DoesNotFitError),
        (Driver(interrupt_at=at), KeyboardInterrupt),
    ):
        monkeypatch.setattr(torch.cuda, "cudart", lambda driver=driver: driver)
        with pytest.raises(error):
            HostSlab(*slab_sizes, CUDA)
        assert driver.calls == at
        gc.collect()
        assert not driver.registered


def test_a_slab_that_is_closed_or_forgotten_is_unregistered(
    slab_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    slab = HostSlab(*slab_sizes, CUDA)
    assert slab.registrations == len(driver.registered) == 5
    slab.close()
    slab.close()
    assert slab.registrations == len(driver.registered) == 0
    slab = HostSlab(*slab_sizes, CUDA)
    assert len(driver.registered) == 5
    del slab
    gc.collect()
    assert not driver.registered


def test_memory_that_cannot_be_mapped(
    slab_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(DoesNotFitError, match=r"no room for .* KV pages: lower host_bu.*Errno 12"):
        HostSlab(*slab_sizes, CUDA)


@pytest.mark.parametrize("refuse_at", [None, 1, 7])
def test_slabs_made_in_the_background(
    refuse_at: int | None, slab_sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Used, refused or not wanted any more: nothing stays registered and the thread ends."""
    monkeypatch.setattr("headinfer_compile.runtime.slab.device_cpus", lambda _: None)
    driver, threads = Driver(refuse_at=refuse_at), threading.active_count()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    allocator = SlabAllocator(CUDA)
    allocator.prepare([slab_sizes] * 3)
    slabs, refused = [], 0
    for _ in range(2):
        try:
            slabs.append(allocator.take(*slab_sizes))
        except DoesNotFitError:
            refused += 1
    assert refused == (refuse_at is not None)
    allocator.close()
    for slab in slabs:
        slab.close()
    gc.collect()
    assert not driver.registered
    assert threading.active_count() == threads
