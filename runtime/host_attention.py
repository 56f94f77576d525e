"""Exact attention over host pages on the CPU: jobs for the C++ kernel of ``host_attention.cpp``.

Legend: B batch, Hq query heads, Hkv KV heads, n query tokens, D head dim of K, Dv of V, T tokens of
a page. A page is ``[Hkv, 2, B, T, D]`` (``spec.kv_views``).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from headinfer_compile.errors import HostAttentionError
from headinfer_compile.runtime.host_build import library
from headinfer_compile.runtime.numa import bind, num_cores

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What pages may hold."""

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets in rising order; a machine that runs one runs those before it."""

_MESSAGES = {
    1: "a job with impossible sizes",
    2: "no memory for partial results",
    3: "an unknown error",
}


class _Numbers(ctypes.Structure):
    """``struct Numbers`` of the source."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "size", "dtype", "level", "batch", "kv_heads", "group", "queries", "head_dim",
            "v_head_dim", "num_pages", "q", "out", "lse", "starts", "pages", "reads_only",
        )
    ]  # fmt: skip


class HostReport(ctypes.Structure):
    """What the jobs of one owner did, counted while they run; ``struct Report`` of the source."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("error", "jobs", "nanoseconds", "bytes", "failed")
    ]

    error: int
    jobs: int
    nanoseconds: int
    """Sum of the times of the jobs."""
    bytes: int
    """K and V that were attended."""
    failed: int
    """Jobs done before the first one that failed since ``take_error``."""

    def take_error(self) -> str | None:
        """What the first job that failed since the last call says, if one has."""
        code, self.error = self.error, 0
        return _MESSAGES[code] if code else None


@dataclass(frozen=True)
class JobShape:
    """What the jobs of a site have in common."""

    dtype: torch.dtype
    batch: int
    num_kv_heads: int
    queries_per_kv: int
    queries: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float = 0.0
    """Scores s become ``softcap * tanh(s / softcap)``; 0: they do not."""

    @property
    def rows(self) -> int:
        """Query rows of all heads, ``B * Hq * n``."""
        return self.batch * self.num_kv_heads * self.queries_per_kv * self.queries


@dataclass
class HostKernel:
    """The library with a pool of threads of its own."""

    lib: ctypes.CDLL
    threads: int
    level: int = -1
    """Index into ``LEVELS``; -1: ``usual_level``."""
    cpus: frozenset[int] | None = None
    """Those that the threads stay on; None: any of the process."""

    def __post_init__(self) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.lib.host_attention_level.restype = number
        self.lib.host_attention_usual_level.restype = number
        self.lib.host_attention_pool.argtypes = [number]
        self.lib.host_attention_pool.restype = pointer
        self.lib.host_attention_close.argtypes = [pointer]
        self.lib.host_attention_job.argtypes = [pointer] * 3 + [ctypes.c_float] * 2
        self.lib.host_attention_job.restype = pointer
        self.lib.host_attention_run.argtypes = [pointer]
        self.lib.host_attention_run.restype = None
        if self.cpus is None:
            self._pool = self.lib.host_attention_pool(self.threads)
        else:
            # Threads stay where the one that starts them may run; the caller is left where it is.
            with ThreadPoolExecutor(1, initializer=bind, initargs=(self.cpus,)) as starter:
                self._pool = starter.submit(self.lib.host_attention_pool, self.threads).result()
        address = ctypes.cast(self.lib.host_attention_run, pointer).value
        assert address is not None
        self.function: int = address
        """Address of the host function: takes a job, runs it and frees it."""

    @property
    def best_level(self) -> int:
        """The highest of ``LEVELS`` that this machine runs."""
        return int(self.lib.host_attention_level())

    @property
    def usual_level(self) -> int:
        """The fastest of ``LEVELS`` here: products of bf16 pairs do not pay on every machine."""
        return int(self.lib.host_attention_usual_level())

    def job(
        self, shape: JobShape, report: HostReport, q: int, out: int, lse: int,
        pages: ctypes.Array[ctypes.c_int64], starts: int = 0, reads_only: bool = False,
    ) -> int:  # fmt: skip
        """Make a job for ``run``, or for a host function of a stream; it is freed when it has run.

        Args:
            shape: Sizes and dtype.
            report: Where the job counts; it must stay until the job has run.
            q: Address of ``[B, Hq, n, D]`` in the pages' dtype.
            out: Address of fp32 ``[B, Hq, n, Dv]``.
            lse: Address of fp32 ``[B, Hq, n]``.
            pages: Four numbers a page: address, T, valid rows, position of the first row. They and
                starts are copied; all other memory must stay until the job has run.
            starts: Address of int64 ``[B, n]``, the first position that each query sees; 0: all.
            reads_only: Only read the pages, as a measure of the memory.

        Returns:
            The address of the job.

        Raises:
            HostAttentionError: There is no memory for it.
        """
        numbers = _Numbers(
            ctypes.sizeof(_Numbers), DTYPES[shape.dtype], self.level, shape.batch,
            shape.num_kv_heads, shape.queries_per_kv, shape.queries, shape.head_dim,
            shape.v_head_dim, len(pages) // 4, q, out, lse, starts, ctypes.addressof(pages),
            reads_only,
        )  # fmt: skip
        made = self.lib.host_attention_job(
            self._pool, ctypes.byref(report), ctypes.byref(numbers), shape.scale,
            shape.softcap,
        )  # fmt: skip
        if not made:
            raise HostAttentionError("no memory for a job of the attention on the CPU")
        return int(made)

    def run(self, job: int) -> None:
        """Run a job here and now."""
        self.lib.host_attention_run(job)

    def close(self) -> None:
        """Stop the threads; no job may be under way."""
        if self._pool:
            self.lib.host_attention_close(self._pool)
            self._pool = None


def host_kernel(
    threads: int, level: int = -1, flags: tuple[str, ...] = (), cpus: frozenset[int] | None = None
) -> HostKernel | None:
    """The kernel with ``threads`` threads of its own; None where it cannot be built (said once)."""
    found = library(flags)
    return None if found is None else HostKernel(found, threads, level, cpus)


def attend_pages(
    kernel: HostKernel,
    q: torch.Tensor,
    pages: Sequence[tuple[torch.Tensor, int, int]],
    shape: JobShape,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend host pages and wait for the result.

    Args:
        kernel: From ``host_kernel``.
        q: ``[B, Hq, n, D]``, contiguous, in the pages' dtype.
        pages: Buffer ``[Hkv, 2, B, T, D]`` (or its K and V one after the other where D != Dv),
            valid rows, and the position of the first row.
        shape: Sizes.
        starts: int64 ``[B, n]``: the first position that each query sees.

    Returns:
        fp32 out ``[B, Hq, n, Dv]`` and fp32 LSE ``[B, Hq, n]``; a query that sees no row has zeros
        and -inf.

    Raises:
        HostAttentionError: The kernel says why.
    """
    heads = shape.num_kv_heads * shape.queries_per_kv
    out = torch.empty(shape.batch, heads, shape.queries, shape.v_head_dim)
    lse = torch.empty(shape.batch, heads, shape.queries)
    per_token = shape.batch * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)
    flat = [
        number
        for buffer, rows, position in pages
        for number in (buffer.data_ptr(), buffer.numel() // per_token, rows, position)
    ]
    report = HostReport()
    job = kernel.job(
        shape, report, q.data_ptr(), out.data_ptr(), lse.data_ptr(),
        (ctypes.c_int64 * len(flat))(*flat), 0 if starts is None else starts.data_ptr(),
    )  # fmt: skip
    kernel.run(job)
    error = report.take_error()
    if error is not None:
        raise HostAttentionError(f"attention on the CPU failed: {error}")
    return out, lse


def available_cores(cpus: frozenset[int] | None = None) -> int:
    """Cores that this process may use: affinity, the cgroup's quota and ``torch.set_num_threads``.

    torch counts physical cores unless it was told otherwise, so hyper-threads do not count either.

    Args:
        cpus: Of these CPUs alone.
    """
    counts = [torch.get_num_threads()]
    if cpus is not None:
        counts.append(num_cores(cpus))
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    groups = Path("/proc/self/cgroup")
    own = groups.read_text() if groups.is_file() else ""
    quota = cgroup_cores(Path("/sys/fs/cgroup"), own)
    if quota is not None:
        counts.append(quota)
    return max(1, min(counts))


def worker_threads(cores: int) -> int:
    """Threads for the kernel: an eighth of the cores stays for launches, the driver and the model.

    On 16 cores beside the link, 15 threads were a fifth faster than 12, and 16 slowed the copies.
    """
    return max(1, cores - max(1, cores // 8))


def cgroup_cores(root: Path, own: str = "") -> int | None:
    """Whole cores of the CPU quota of cgroup v2 or v1; None where there is no quota.

    Args:
        root: Where the groups are mounted.
        own: The groups of the process, as ``/proc/self/cgroup`` lists them: the quotas of each
            group around one hold too.
    """
    folders = {root: None, root / "cpu": None}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        group = top / path.strip("/")
        folders |= {folder: None for folder in (group, *group.parents) if top in folder.parents}
    quotas = [quota for quota in map(_quota_cores, folders) if quota is not None]
    return min(quotas) if quotas else None


def _quota_cores(folder: Path) -> int | None:
    """Whole cores of the quota of one group."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        files = [folder / name for name in names]
        if not all(file.is_file() for file in files):
            continue
        words = [word for file in files for word in file.read_text().split()]
        if len(words) == 2 and words[0].isdigit():
            return max(1, int(words[0]) // int(words[1]))
    return None


@functools.cache
def shared_kernel(threads: int, cpus: frozenset[int] | None = None) -> HostKernel | None:
    """The kernel that the caches of this process share: threads of several would only crowd."""
    return host_kernel(threads, cpus=cpus)
