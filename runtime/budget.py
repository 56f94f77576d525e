"""Default budgets: what is free, less what the forward needs; and what a refused byte says."""

from __future__ import annotations

import os
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


def default_host_budget() -> int:
    """Bytes of host memory for pages: what is available under the cgroup's limit, less a tenth."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    limit_file, usage_file = cgroup / "memory.max", cgroup / "memory.current"
    if limit_file.exists() and usage_file.exists():
        limit = limit_file.read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int(usage_file.read_text()))
    return max(0, int(available * (1 - _HOST_MARGIN)))
