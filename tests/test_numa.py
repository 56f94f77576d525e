"""Nodes of memory: which CPUs are near a device, and that pages and threads stay with them.

The tree that tells of nodes is a stand-in; the threads and their affinity are real.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headinfer_compile.runtime import numa, slab
from headinfer_compile.runtime.host_attention import (
    HostKernel,
    JobShape,
    attend_pages,
    available_cores,
    host_kernel,
)
from headinfer_compile.runtime.numa import bind, device_cpus, num_cores
from headinfer_compile.runtime.slab import HostSlab, SlabAllocator

CUDA = torch.device("cuda")

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")


def plant(sys: Path, nodes: dict[int, str], device_node: int | None) -> None:
    """Lists of CPUs by node, and the node of the device 0001:af:02.0."""
    for node, cpus in nodes.items():
        folder = sys / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    if device_node is not None:
        device = sys / "bus" / "pci" / "devices" / "0001:af:02.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{device_node}\n")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device at that address."""
    found = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xAF, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)


@pytest.mark.parametrize(
    ("nodes", "device_node", "wanted"),
    [
        ({0: "0-3,8-11", 1: "4-7"}, 0, {0, 1, 2, 3, 8, 9, 10, 11}),
        ({0: "0-3,8-11", 1: "4-7,12-99"}, 1, {4, 5, 6, 7}),  # 12 and on are not this process's
        ({0: "0", 10: "1-11"}, 10, set(range(1, 12))),
        ({0: "0-3", 1: "4-7"}, -1, None),  # as in a virtual machine
        ({0: "0-3", 1: "4-7"}, None, None),  # as in a container that hides devices
        ({0: "0-3", 1: "4-7"}, 2, None),
        ({0: "0-11"}, 0, None),
        ({}, 0, None),
        ({0: "0-11", 1: ""}, 1, None),  # memory without a CPU
        ({0: "0-11", 1: ""}, 0, None),  # all CPUs are near
        ({0: "0-11", 1: "12-23"}, 1, None),  # none of this process is
    ],
    ids=str,
)
def test_the_cpus_of_the_node_of_a_device(
    nodes: dict[int, str], device_node: int | None, wanted: set[int] | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(tmp_path, nodes, device_node)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert device_cpus(CUDA, tmp_path) == wanted
    assert device_cpus(torch.device("cpu"), tmp_path) is None
    assert device_cpus(torch.device("meta"), tmp_path) is None


def test_a_core_counts_once_whatever_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert num_cores(frozenset(range(5)), tmp_path) == 5
    for cpu in range(8):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert num_cores(frozenset(range(8)), tmp_path) == 4
    assert num_cores(frozenset({0, 1, 4}), tmp_path) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("headinfer_compile.runtime.host_attention.cgroup_cores", lambda *_: None)
    assert available_cores() == 64
    # None of these is a CPU here, so that none has siblings.
    assert available_cores(frozenset(range(10**6, 10**6 + 7))) == 7


class Driver:
    """A CUDA runtime that registers everything."""

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0


@pytest.mark.parametrize("bound", [True, False])
def test_pages_are_touched_first_by_threads_that_stay_near(
    bound: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = os.sched_getaffinity(0)
    near = frozenset({max(allowed)}) if bound else None
    seen: dict[int, set[int]] = {}
    touch = ctypes.memset

    def touched(address: int, value: int, nbytes: int) -> Any:
        seen[address] = os.sched_getaffinity(0)
        return touch(address, value, nbytes)

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(ctypes, "memset", touched)
    monkeypatch.setattr(slab, "device_cpus", lambda _: near)
    nbytes = 64 * mmap.PAGESIZE
    with caplog.at_level(logging.INFO, logger=slab.__name__):
        allocator = SlabAllocator(CUDA)
    assert len(caplog.records) == bound
    allocator.prepare([(nbytes, mmap.PAGESIZE)])
    for _ in range(2):  # one made ahead, one made by the caller
        seen.clear()
        made = allocator.take(nbytes, mmap.PAGESIZE)
        assert not made.tensor.any()
        assert seen and set(map(frozenset, seen.values())) == {near or frozenset(allowed)}
        made.close()
    allocator.close()
    assert os.sched_getaffinity(0) == allowed


def problem() -> tuple[JobShape, torch.Tensor, torch.Tensor]:
    torch.manual_seed(11)
    shape = JobShape(torch.bfloat16, 1, 2, 4, 1, 64, 64, scale=0.125)
    return shape, torch.randn(1, 8, 1, 64).bfloat16(), torch.randn(2 * 2 * 3000 * 64).bfloat16()


def made_threads(kernel_cpus: frozenset[int] | None) -> tuple[HostKernel, list[set[int]]]:
    """A kernel of three threads, and where the two that it started may run."""
    before = set(os.listdir("/proc/self/task"))
    kernel = host_kernel(3, cpus=kernel_cpus)
    assert kernel is not None, "the tests need a C++ compiler"
    until = time.monotonic() + 10
    # The thread that started them is listed until the kernel has done with it.
    while len(made := set(os.listdir("/proc/self/task")) - before) > 2:
        assert time.monotonic() < until, made
        time.sleep(0.001)
    return kernel, [os.sched_getaffinity(int(task)) for task in made]


def test_the_threads_of_a_kernel_stay_on_its_cpus() -> None:
    allowed, running = os.sched_getaffinity(0), threading.active_count()
    shape, q, page = problem()
    results = []
    for cpus in (None, frozenset({min(allowed)}), frozenset({max(allowed)})):
        kernel, where = made_threads(cpus)
        assert where == [set(cpus or allowed)] * 2
        results.append(attend_pages(kernel, q, [(page, 3000, 0)], shape))
        kernel.close()
    assert os.sched_getaffinity(0) == allowed and threading.active_count() == running
    k, v = page.double().view(2, 2, 3000, 64).repeat_interleave(4, 0).unbind(1)
    weights = (q[0].double() @ k.transpose(1, 2) * shape.scale).softmax(-1)
    torch.testing.assert_close(results[0][0][0].double(), weights @ v, atol=4e-6, rtol=4e-6)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_cpus_that_cannot_be_had_are_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = os.sched_getaffinity(0)
    bind(None)
    nowhere = frozenset({1000})
    with caplog.at_level(logging.WARNING, logger=numa.__name__):
        kernel, where = made_threads(nowhere)
    assert where == [allowed] * 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "cannot be bound to CPUs" in line
    shape, q, page = problem()
    assert attend_pages(kernel, q, [(page, 3000, 0)], shape)[0].isfinite().all()
    kernel.close()
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    made = HostSlab(4 * mmap.PAGESIZE, mmap.PAGESIZE, CUDA, nowhere)
    assert not made.tensor.any()
    made.close()
