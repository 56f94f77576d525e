"""Default budgets: what is free, less what the forward needs; and what a refused byte says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from headinfer_compile.errors import DoesNotFitError

_HOST_MARGIN = 0.1
ALLOCATOR_SLACK_BYTES = 512 << 20
"""Device bytes left for the allocator's fragments and for kernels that load later."""
LIBRARY_BYTES = 32 << 20
"""What cuBLAS keeps on a stream, at most."""


def device_room(device: torch.device) -> int:
    """Bytes that this process may still allocate on a CUDA device: free there, or freed before.

    Other processes and a limit set by ``set_per_process_memory_fraction`` count.
    """
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    reserved = torch.cuda.memory_reserved(device)
    return min(free, limit - reserved) + reserved - torch.cuda.memory_allocated(device)


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Make an allocation that is refused inside say what to do.

    Raises:
        DoesNotFitError: ``message``, from the allocator's own error.
    """
    try:
        yield
    except DoesNotFitError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DoesNotFitError(message) from error
    except RuntimeError as error:
        # The only sign that torch's CPU allocator gives.
        if "can't allocate memory" not in str(error):
            raise
        raise DoesNotFitError(message) from error


def default_gpu_budget(device: torch.device, needed_bytes: int) -> int:
    """Bytes for resident blocks: free on ``device`` less ``needed_bytes`` and allocator slack.

    On a CPU there is no device memory to spare: 0.
    """
    if device.type != "cuda":
        return 0
    return max(0, device_room(device) - needed_bytes - ALLOCATOR_SLACK_BYTES)


def default_host_budget(root: Path = Path("/")) -> int:
    """Bytes of host memory for pages: what is available under all limits, less a tenth.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return max(0, int(min(available, *_cgroup_rooms(root)) * (1 - _HOST_MARGIN)))


def _cgroup_rooms(root: Path) -> list[int]:
    """What each control group of this process leaves; page cache that can be dropped is free."""
    rooms = [sys.maxsize]
    membership = root / "proc/self/cgroup"
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the group of the outside may be named, which is not there: the root counts.
        relative = Path(name.lstrip("/"))
        for group in (relative, *relative.parents):
            rooms += _room_of(base / group, *files)
    return rooms


def _room_of(group: Path, limit_file: str, usage_file: str, cache: str) -> list[int]:
    limit_path, usage_path, stat = group / limit_file, group / usage_file, group / "memory.stat"
    if not (limit_path.exists() and usage_path.exists()):
        return []
    limit = limit_path.read_text().strip()
    if limit == "max":
        return []
    used = int(usage_path.read_text())
    for line in stat.read_text().splitlines() if stat.exists() else ():
        name, count = line.split()
        if name == cache:
            used -= min(used, int(count))
    return [max(0, int(limit) - used)]
