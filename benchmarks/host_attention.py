"""How fast does the CPU attend host pages? Against a plain read of the same pages, and beside H2D.

The plain read takes the same runs of rows with the same threads and does nothing with them, so it
is what memory gives. Both take turns in each round. With a GPU, a second pass attends while pages
are copied to it all the time, which is what decode does: the sum of both rates is the bound of
three-way decode.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch

from benchmarks.common import Row, parser, prepare, provenance, say, summary, write_rows
from headinfer_compile.config import format_bytes, parse_bytes
from headinfer_compile.runtime.host_attention import (
    LEVELS,
    HostKernel,
    HostReport,
    JobShape,
    available_cores,
    host_kernel,
    worker_threads,
)
from headinfer_compile.runtime.numa import device_cpus
from headinfer_compile.runtime.slab import HostSlab

HEADS, DIM = 8, 128


class Pages:
    """Host pages ``[Hkv, 2, 1, T, D]`` in bf16, taken a layer's worth at a time, in a circle."""

    def __init__(
        self, nbytes: int, tokens: int, layer_pages: int, device: torch.device,
        cpus: frozenset[int] | None,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.page_bytes = HEADS * 2 * tokens * DIM * 2
        count = max(layer_pages, nbytes // self.page_bytes // layer_pages * layer_pages)
        self.slab = HostSlab(count * self.page_bytes, self.page_bytes, device, cpus)
        self.values = self.slab.tensor.view(torch.bfloat16).view(count, -1)
        # One random page, copied: what the pages hold does not matter, zeros might.
        self.values[0] = torch.randn(self.page_bytes // 2).to(torch.bfloat16)
        for page in self.values[1:]:
            page.copy_(self.values[0])
        self.groups = [
            self._numbers(range(first, first + layer_pages))
            for first in range(0, count, layer_pages)
        ]
        self._next = 0

    def _numbers(self, pages: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        flat = [
            number
            for at, page in enumerate(pages)
            for number in (
                self.values[page].data_ptr(), self.tokens, self.tokens, at * self.tokens,
            )
        ]  # fmt: skip
        return (ctypes.c_int64 * len(flat))(*flat)

    def take(self) -> ctypes.Array[ctypes.c_int64]:
        """The next layer's pages."""
        self._next = (self._next + 1) % len(self.groups)
        return self.groups[self._next]


class Worker:
    """Jobs of one shape."""

    def __init__(self, kernel: HostKernel, pages: Pages, group: int, queries: int) -> None:
        self.kernel, self.pages = kernel, pages
        self.shape = JobShape(torch.bfloat16, 1, HEADS, group, queries, DIM, DIM, DIM**-0.5)
        self.q = torch.randn(self.shape.rows, DIM).to(torch.bfloat16)
        self.out, self.lse = torch.empty(self.shape.rows, DIM), torch.empty(self.shape.rows)

    def job(self, report: HostReport, reads_only: bool = False) -> None:
        """Attend, or only read, one layer."""
        job = self.kernel.job(
            self.shape, report, self.q.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
            self.pages.take(), reads_only=reads_only,
        )  # fmt: skip
        self.kernel.run(job)

    def rate(self, seconds: float, reads_only: bool) -> float:
        """GB/s over ``seconds``."""
        report, start = HostReport(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            self.job(report, reads_only)
        return report.bytes / (time.perf_counter() - start) / 1e9


class Link:
    """Copies of pages to the GPU, one after the other."""

    def __init__(self, pages: Pages, device: torch.device) -> None:
        self.pages = pages
        self.target = torch.empty_like(pages.values[0], device=device)
        self.stream = torch.cuda.Stream(device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self, nbytes: int) -> int:
        """Queue copies of about ``nbytes``; returns the bytes."""
        count = max(1, nbytes // self.pages.page_bytes)
        with self.stream:
            self.begin.record(self.stream)
            for index in range(count):
                page = self.pages.values[index % len(self.pages.values)]
                self.target.copy_(page, non_blocking=True)
            self.end.record(self.stream)
        return count * self.pages.page_bytes

    def rates(self, worker: Worker | None, nbytes: int) -> tuple[float, float]:
        """GB/s of the link and of the CPU while ``nbytes`` are copied."""
        report = HostReport()
        copied, start = self.start(nbytes), time.perf_counter()
        while worker is not None and not self.end.query():
            worker.job(report)
        spent = time.perf_counter() - start
        self.end.synchronize()
        return copied / self.begin.elapsed_time(self.end) / 1e6, report.bytes / spent / 1e9


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cuda = torch.cuda.is_available()
    cli = parser("host_attention", "GB/s of attention over host pages on the CPU.")
    add = cli.add_argument
    add("--nodes", choices=["device", "all"], default="device",
        help="NUMA nodes of pages and threads: the device's, or any")  # fmt: skip
    add("--threads", type=int, nargs="+",
        help="by default 1, half, the usual number and all of the cores there")  # fmt: skip
    add("--rows", nargs="+", default=["4x1", "4x4"],
        help="query heads per KV head x query tokens")  # fmt: skip
    add("--pages", default="6GiB" if cuda else "64MiB", help="host memory to go through")
    add("--page-tokens", type=int, default=8192 if cuda else 1024)
    add("--layer-pages", type=int, default=10 if cuda else 4, help="pages of one job")
    add("--seconds", type=float, default=0.25 if cuda else 0.05, help="of each measurement")
    add("--rounds", type=int, default=3)
    add("--flags", nargs="+", default=[], help="more for the compiler, such as HA_TILE=32")
    add("--level", choices=LEVELS, help="an instruction set below the best of this machine")
    args = cli.parse_args(argv)
    setup = prepare(args)
    nbytes = parse_bytes(args.pages, "--pages")
    cpus = device_cpus(setup.device) if args.nodes == "device" else None
    cores = available_cores(cpus)
    usual = {1, cores // 2, worker_threads(cores), cores} if cuda else {1}
    near = f"/{len(cpus)}cpus" if cpus else ""
    pages = Pages(nbytes, args.page_tokens, args.layer_pages, setup.device, cpus)
    say("%s of pages of %d tokens", format_bytes(pages.values.nbytes), args.page_tokens)
    link = Link(pages, setup.device) if setup.device.type == "cuda" else None
    rows: list[Row] = []
    if link is not None:
        link.rates(None, nbytes)
    for threads in args.threads or sorted(usual - {0}):
        level = LEVELS.index(args.level) if args.level else -1
        kernel = host_kernel(threads, level, tuple(f"-D{flag}" for flag in args.flags), cpus)
        if kernel is None:
            say("no kernel: see the warning")
            return []
        for text in args.rows:
            group, queries = map(int, text.split("x"))
            worker = Worker(kernel, pages, group, queries)
            row = _measure(worker, link, args.seconds, args.rounds)
            row |= {
                "id": f"host_attention/{setup.tag}{near}/t{threads}/{text}",
                "case": "host_attention",
                "threads": threads, "cores": cores, "nodes": args.nodes,
                "cpus_of_node": len(cpus or ()), "queries_per_kv": group, "queries": queries,
                "level": LEVELS[kernel.usual_level if level < 0 else level], "flags": args.flags,
                "page_tokens": args.page_tokens,
                "layer_bytes": pages.page_bytes * args.layer_pages,
            } | provenance(setup.device, args.note)  # fmt: skip
            rows.append(row)
            write_rows(args.out, [row])
            say(
                "%2d threads, %-5s attend %s of read %s GB/s = %.3f%s", threads, text,
                row["attend_gb_s"]["median"], row["read_gb_s"]["median"], row["of_read"],
                f"; beside H2D {row['beside_gb_s']['median']} + link "
                f"{row['beside_link_gb_s']['median']} (alone {row['link_gb_s']})" if link else "",
            )  # fmt: skip
        kernel.close()
    pages.slab.close()
    return rows


def _measure(worker: Worker, link: Link | None, seconds: float, rounds: int) -> Row:
    """Rates of one kernel and shape; reading and attending take turns."""
    reads, attends, beside, beside_link = [], [], [], []
    worker.rate(seconds / 4, reads_only=False)
    for _ in range(rounds):
        reads.append(worker.rate(seconds, reads_only=True))
        attends.append(worker.rate(seconds, reads_only=False))
    row: Row = {
        "read_gb_s": summary(reads, 2), "attend_gb_s": summary(attends, 2),
    }  # fmt: skip
    row["of_read"] = round(row["attend_gb_s"]["median"] / row["read_gb_s"]["median"], 4)
    if link is not None:
        nbytes = int(seconds * 50e9)
        row["link_gb_s"] = round(link.rates(None, nbytes)[0], 2)
        for _ in range(rounds):
            of_link, of_cpu = link.rates(worker, nbytes)
            beside.append(of_cpu)
            beside_link.append(of_link)
        row |= {"beside_gb_s": summary(beside, 2), "beside_link_gb_s": summary(beside_link, 2)}
    return row


if __name__ == "__main__":
    main()
