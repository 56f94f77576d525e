"""The attention kernel of the CPU against float64: every level, dtype, shape and mask it takes."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import host_attention as benchmark
from headinfer_compile.errors import HostAttentionError
from headinfer_compile.runtime import host_attention, host_build
from headinfer_compile.runtime.host_attention import (
    DTYPES,
    LEVELS,
    HostKernel,
    HostReport,
    JobShape,
    attend_pages,
    host_kernel,
)

#: B, Hkv, query heads per KV head, query tokens, D, Dv.
SHAPES = [
    (1, 2, 4, 1, 128, 128),
    (2, 2, 1, 1, 64, 64),
    (1, 1, 7, 3, 80, 80),
    (1, 2, 3, 2, 96, 64),
    (2, 1, 16, 1, 192, 128),
    (1, 1, 2, 33, 256, 256),
    (1, 1, 1, 64, 64, 128),
    (1, 2, 5, 1, 37, 19),
    (2, 2, 5, 4, 128, 96),
    (1, 1, 1, 1, 3, 5),
]
#: Tokens of each page and valid rows; ragged at both ends of a tile.
PAGES = [(64, 64), (700, 613), (128, 77), (16, 3)]


EMULATED = "amx, emulated"


@pytest.fixture(scope="module", params=[*LEVELS, EMULATED])
def kernel(request: pytest.FixtureRequest) -> Iterator[HostKernel]:
    """The kernel with two threads, at each level that this machine runs; tiles also emulated."""
    name = request.param
    level = LEVELS.index("amx" if name == EMULATED else name)
    made = host_kernel(2, level, ("-DHA_AMX_EMULATE",) if name == EMULATED else ())
    assert made is not None, "the tests need a C++ compiler"
    if level > made.best_level:
        pytest.skip(f"this machine has no {name}")
    yield made
    made.close()


class Problem:
    """Random pages in page layout, and what they hold row by row."""

    def __init__(self, shape: JobShape, seed: int, layout: list[tuple[int, int]] = PAGES) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        batch, heads, dim, v_dim = shape.batch, shape.num_kv_heads, shape.head_dim, shape.v_head_dim
        self.pages, keys, values, at = [], [], [], []
        position = 5
        for tokens, rows in layout:
            size = heads * batch * tokens * (dim + v_dim)
            buffer = torch.randn(size, generator=generator).to(shape.dtype)
            by_head = buffer.view(heads, -1)
            k, v = by_head[:, : batch * tokens * dim], by_head[:, batch * tokens * dim :]
            keys.append(k.view(heads, batch, tokens, dim)[:, :, :rows].transpose(0, 1))
            values.append(v.view(heads, batch, tokens, v_dim)[:, :, :rows].transpose(0, 1))
            self.pages.append((buffer, rows, position))
            at.append(torch.arange(position, position + rows))
            position += tokens
        q_heads = heads * shape.queries_per_kv
        self.q = torch.randn(batch, q_heads, shape.queries, dim, generator=generator)
        self.q = self.q.to(shape.dtype)
        self.k, self.v, self.at = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(at)

    def reference(self, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` in float64."""
        shape = self.shape
        k, v = (x.double().repeat_interleave(shape.queries_per_kv, 1) for x in (self.k, self.v))
        scores = self.q.double() @ k.transpose(-1, -2) * shape.scale
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        if starts is not None:
            hidden = self.at < starts[:, None, :, None]
            scores = scores.masked_fill(hidden, -math.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
        return weights @ v, lse


def job_shape(
    sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, softcap: float = 0.0
) -> JobShape:
    return JobShape(dtype, *sizes, scale=sizes[4] ** -0.5, softcap=softcap)


def check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Equal up to the rounding of fp32 sums."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_are_attended(
    kernel: HostKernel, dtype: torch.dtype, sizes: tuple[int, int, int, int, int, int]
) -> None:
    problem = Problem(job_shape(sizes, dtype), seed=sum(sizes))
    check(attend_pages(kernel, problem.q, problem.pages, problem.shape), problem.reference())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_each_query_sees_rows_from_its_start_on(
    kernel: HostKernel, dtype: torch.dtype, softcap: float
) -> None:
    shape = job_shape((2, 2, 3, 4, 96, 64), dtype, softcap)
    problem = Problem(shape, seed=3)
    # A band over the past, past all padding; the last query of the second row sees nothing.
    starts = torch.tensor([[0, 200, 201, 202], [68, 69, 900, 10_000]])
    found = attend_pages(kernel, problem.q, problem.pages, shape, starts)
    check(found, problem.reference(starts))
    assert (found[1][1, :, 3] == -math.inf).all()
    assert (found[0][1, :, 3] == 0).all()


def test_the_usual_level_runs_here_and_is_that_of_jobs_that_name_none() -> None:
    usual = host_kernel(1)
    assert usual is not None and 0 <= usual.usual_level <= usual.best_level
    named = host_kernel(1, usual.usual_level)
    assert named is not None
    problem = Problem(job_shape((1, 2, 4, 1, 80, 96), torch.bfloat16), seed=7)
    found = [attend_pages(k, problem.q, problem.pages, problem.shape) for k in (usual, named)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    usual.close()
    named.close()


def test_large_scores_do_not_overflow(kernel: HostKernel) -> None:
    problem = Problem(JobShape(torch.float32, 1, 1, 2, 1, 64, 64, scale=40.0), seed=1)
    found = attend_pages(kernel, problem.q, problem.pages, problem.shape)
    wanted = problem.reference()
    torch.testing.assert_close(found[1].double(), wanted[1], atol=0, rtol=1e-6)
    torch.testing.assert_close(found[0].double(), wanted[0], atol=2e-3, rtol=2e-3)


def test_the_result_does_not_depend_on_the_threads() -> None:
    shape = job_shape((1, 2, 4, 1, 64, 64), torch.bfloat16)
    problem = Problem(shape, seed=4, layout=[(4096, 4096), (4096, 3000)])
    results = []
    for threads in (1, 2, 5):
        kernel = host_kernel(threads)
        assert kernel is not None
        results += [attend_pages(kernel, problem.q, problem.pages, shape) for _ in range(4)]
        kernel.close()
    check(results[0], problem.reference())
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_jobs_of_several_callers_take_turns() -> None:
    kernel = host_kernel(2)
    assert kernel is not None
    shape = job_shape((1, 2, 4, 1, 64, 64), torch.float32)
    problems = [Problem(shape, seed) for seed in range(4)]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def call(index: int) -> None:
        for _ in range(20):
            problem = problems[index]
            found[index] = attend_pages(kernel, problem.q, problem.pages, shape)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for index, problem in enumerate(problems):
        check(found[index], problem.reference())
    kernel.close()


def test_a_job_counts_what_it_reads() -> None:
    kernel = host_kernel(1)
    assert kernel is not None
    problem = Problem(job_shape((1, 2, 4, 1, 64, 32), torch.bfloat16), seed=0)
    report = HostReport()
    flat = [n for b, rows, at in problem.pages for n in (b.data_ptr(), b.numel() // 192, rows, at)]
    pages = (ctypes.c_int64 * len(flat))(*flat)
    out, lse = torch.full((8, 32), 7.0), torch.full((8,), 7.0)
    for reads_only in (True, False):
        job = kernel.job(
            problem.shape, report, problem.q.data_ptr(), out.data_ptr(), lse.data_ptr(), pages,
            reads_only=reads_only,
        )  # fmt: skip
        kernel.run(job)
        assert bool((out == 7).all()) is reads_only
    rows = sum(rows for _, rows in PAGES)
    assert (report.jobs, report.bytes, report.error) == (2, 2 * rows * 2 * 96 * 2, 0)
    assert report.nanoseconds > 0
    kernel.close()


def test_a_bad_job_is_an_error_and_no_number() -> None:
    kernel = host_kernel(1)
    assert kernel is not None
    shape = job_shape((1, 1, 1, 1, 8, 8), torch.float32)
    report = HostReport()
    out, lse = torch.zeros(8), torch.zeros(1)
    pages = (ctypes.c_int64 * 4)(out.data_ptr(), 4, 5, 0)
    kernel.run(kernel.job(shape, report, out.data_ptr(), out.data_ptr(), lse.data_ptr(), pages))
    assert out.isnan().all() and lse.isnan().all()
    assert report.take_error() == "a job with impossible sizes"
    assert report.take_error() is None and report.bytes == 0
    with pytest.raises(HostAttentionError, match="impossible sizes"):
        attend_pages(kernel, out, [(torch.zeros(16), 5, 0)], shape)
    kernel.close()


def test_on_arm64_it_builds_and_is_right(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    program = tmp_path / "check"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-static"]
    source = Path(__file__).with_name("host_attention_check.cpp")
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([emulator, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"error {done.stdout}{done.stderr}"
    assert 0 < float(done.stdout) < 4e-6


def test_without_a_compiler_it_says_so_once_and_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for compiler, reason in (
        ("/no/such/compiler", "there is no C\\+\\+ compiler '/no/such/compiler'"),
        ("false", "false failed"),
    ):
        monkeypatch.setenv("CXX", compiler)
        host_build.library.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert host_kernel(1) is None and host_kernel(1) is None
        (message,) = [record.getMessage() for record in caplog.records]
        assert re.search(reason, message)
        caplog.clear()
    host_build.library.cache_clear()
    assert not list((tmp_path / "headinfer_compile").iterdir())


def test_threads_follow_affinity_quota_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    quota: int | None = None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(host_attention, "cgroup_cores", lambda *_: quota)
    assert host_attention.available_cores() == 12
    quota = 6
    assert host_attention.available_cores() == 6
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert host_attention.available_cores() == 2
    # One core at least is left to the thread that launches.
    assert [host_attention.worker_threads(n) for n in (1, 2, 4, 16)] == [1, 1, 3, 14]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_the_threads_stay_on_the_cores_of_the_process() -> None:
    allowed = os.sched_getaffinity(0)
    before = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert host_attention.available_cores() == 1
        kernel = host_kernel(3)
        assert kernel is not None
        made = set(os.listdir("/proc/self/task")) - before
        assert len(made) == 2
        assert all(os.sched_getaffinity(int(task)) == {min(allowed)} for task in made)
        kernel.close()
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_quota_counts_whole_cores(tmp_path: Path) -> None:
    cores = host_attention.cgroup_cores
    assert cores(tmp_path) is None
    for text, wanted in (("max 100000", None), ("650000 100000", 6), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert cores(tmp_path, "0::/\n") == wanted


def test_the_smallest_quota_of_the_groups_around_holds(tmp_path: Path) -> None:
    inner = tmp_path / "pod" / "box"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "pod" / "cpu.max").write_text("400000 100000\n")
    own = "0::/pod/box\n"
    assert host_attention.cgroup_cores(tmp_path, own) == 4
    (inner / "cpu.max").write_text("200000 100000\n")
    assert host_attention.cgroup_cores(tmp_path, own) == 2
    # Of another process.
    assert host_attention.cgroup_cores(tmp_path, "0::/other\n") is None


def test_the_quota_of_the_older_cgroups(tmp_path: Path) -> None:
    for folder, own in (("cpu", ""), ("cpu/pod", "5:memory:/x\n4:cpu,cpuacct:/pod\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cpu.cfs_period_us").write_text("100000\n")
        for quota, cores in (("350000", 3), ("50000", 1), ("-1", None)):
            (tmp_path / folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            assert host_attention.cgroup_cores(tmp_path, own) == cores


def test_the_benchmark_compares_with_a_plain_read(tmp_path: Path) -> None:
    sizes = ["--pages", "1MiB", "--page-tokens", "64", "--layer-pages", "2", "--seconds", "0.01"]
    how = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--rows", "4x1", "2x3"]
    rows = benchmark.main([*sizes, *how, "--out", str(tmp_path / "rows.json")])
    assert [(row["queries_per_kv"], row["queries"]) for row in rows] == [(4, 1), (2, 3)]
    for row in rows:
        assert row["of_read"] == pytest.approx(
            row["attend_gb_s"]["median"] / row["read_gb_s"]["median"], rel=1e-3
        )
        assert row["layer_bytes"] == 2 * 64 * 8 * 128 * 2 * 2
