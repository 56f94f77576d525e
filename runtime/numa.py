"""Which cores are near a device, on hosts whose memory is in several NUMA nodes.

Memory comes from the node of the thread that touches it first, as long as that has room, so binding
threads places pages too: no policy is set, and one that the user sets (``numactl``) holds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_SYS = Path("/sys")


def device_cpus(device: torch.device, sys: Path = _SYS) -> frozenset[int] | None:
    """The CPUs of this process on the NUMA node of a CUDA device.

    Args:
        device: The device.
        sys: Where the kernel tells of nodes and devices.

    Returns:
        None where that is no choice: one node, an unknown one, or a process that may run on no CPU
        of the node or only on those.
    """
    if device.type != "cuda" or not hasattr(os, "sched_getaffinity"):
        return None
    nodes = sys / "devices" / "system" / "node"
    if sum(1 for _ in nodes.glob("node[0-9]*")) < 2:
        return None
    found: Any = torch.cuda.get_device_properties(device)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    node = _read(sys / "bus" / "pci" / "devices" / address / "numa_node") or "-1"
    # A virtual machine that does not know says -1.
    allowed = frozenset(os.sched_getaffinity(0))
    near = _cpus(_read(nodes / f"node{node}" / "cpulist")) & allowed
    return near if near and near != allowed else None


def num_cores(cpus: frozenset[int], sys: Path = _SYS) -> int:
    """Physical cores among these CPUs: hyper-threads of one core count once."""
    folder = sys / "devices" / "system" / "cpu"
    siblings = {
        _read(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        for cpu in cpus
    }
    return len(siblings)


def bind(cpus: frozenset[int] | None) -> None:
    """Keep the calling thread, and those that it starts, on these CPUs; None: where it is."""
    if cpus is None:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.warning("a thread stays where it is, it cannot be bound to CPUs: %s", error)


def _read(path: Path) -> str:
    """The text of a small file, or nothing."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _cpus(text: str) -> frozenset[int]:
    """The CPUs of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
