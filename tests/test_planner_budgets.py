"""Automatic budgets: what control groups and other allocations leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headinfer_compile.runtime.block_plan import BlockPlan
from headinfer_compile.runtime.budget import default_gpu_budget, default_host_budget
from headinfer_compile.runtime.pages import BlockTable
from headinfer_compile.runtime.spec import Geometry

GIB = 1 << 30


def machine(root: Path, groups: dict[str, tuple[str, int, int]], membership: str) -> Path:
    """A ``/proc`` and ``/sys`` with 64 GiB available; groups give limit, use and page cache."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(membership)
    for name, (limit, used, cache) in groups.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        old = name.startswith("memory")
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(limit)
        (folder / ("memory.usage_in_bytes" if old else "memory.current")).write_text(str(used))
        prefix = "total_" if old else ""
        (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "membership", "room"),
    [
        ({}, "", 64 * GIB),
        ({"": ("max", GIB, 0)}, "0::/\n", 64 * GIB),
        ({"": (str(16 * GIB), 4 * GIB, 0)}, "0::/\n", 12 * GIB),
        # Page cache in use can be dropped.
        ({"": (str(16 * GIB), 4 * GIB, GIB)}, "0::/\n", 13 * GIB),
        # The limit of a parent counts, and so does that of a nested group.
        ({"a": (str(8 * GIB), GIB, 0), "a/b": ("max", GIB, 0)}, "0::/a/b\n", 7 * GIB),
        ({"a": ("max", GIB, 0), "a/b": (str(3 * GIB), GIB, 0)}, "0::/a/b\n", 2 * GIB),
        # A container sees its own group as the root, under a name of the outside.
        ({"": (str(9 * GIB), GIB, 0)}, "0::/outside/name\n", 8 * GIB),
        # The first version of control groups.
        ({"memory/x": (str(5 * GIB), GIB, GIB)}, "3:cpu:/\n7:memory:/x\n", 5 * GIB),
        ({"": (str(GIB), 2 * GIB, 0)}, "0::/\n", 0),
    ],
)
def test_host_budget_honours_control_groups(
    tmp_path: Path, groups: dict[str, tuple[str, int, int]], membership: str, room: int
) -> None:
    found = default_host_budget(machine(tmp_path, groups, membership))
    assert found == int(room * 0.9)


def test_host_budget_of_this_machine() -> None:
    assert 0 < default_host_budget() < 1 << 50


def test_no_gpu_budget_on_a_cpu() -> None:
    assert default_gpu_budget(torch.device("cpu"), 0) == 0


def test_other_allocations_shrink_the_room_for_resident_blocks() -> None:
    geometry = Geometry(2, 1, 2, 16, 16, torch.float32, torch.device("meta"))
    page = 1024 * geometry.token_bytes
    rooms = [5 * page]
    table = BlockTable(geometry, 1024, 8 * page, 1 << 60, lambda: rooms[0])
    assert [tier for _, tier in table.plan(6 * 1024)] == ["gpu"] * 5 + ["host"]
    table.ensure(2 * 1024)
    # Somebody else takes all but one page of what was free.
    rooms[0] = page
    table.ensure(5 * 1024)
    assert [block.tier for block in table.blocks] == ["gpu", "gpu", "gpu", "host", "host"]
    # Once a block is on the host, later ones are: the room that comes back is not used.
    rooms[0] = 100 * page
    table.ensure(7 * 1024)
    assert [block.tier for block in table.blocks][5:] == ["host", "host"]
    assert table.bytes_on("gpu") == 3 * page


@pytest.mark.parametrize("layers", [1, 32])
def test_resident_blocks_use_the_budget_up(layers: int) -> None:
    token = 4096
    for tokens in (0, 1000, 1024, 5000, 65536, 100_000, 131_071):
        plan = BlockPlan(token, layers, None, tokens * token * layers)
        plan.place(1 << 18, 16384)
        resident = plan.gpu_bytes // (token * layers)
        assert resident == tokens // 1024 * 1024
        assert resident + plan.host_bytes // (token * layers) == plan.capacity >= 1 << 18


def test_placing_at_once_is_growing_step_by_step() -> None:
    for budget in (0, 3000, 70_000):
        fast, slow = (BlockPlan(4096, 2, None, budget * 8192) for _ in range(2))
        fast.place(100_001, 16384)
        for end in range(16384, 100_001 + 16384, 16384):
            slow.grow(min(end, 100_001))
        assert fast == slow


def test_the_longest_context_is_the_last_that_fits() -> None:
    for budget in (0, 5000):
        for host in (0, 10_000, 300_000):
            plan = BlockPlan(4096, 2, None, budget * 8192)
            longest = plan.longest(host * 8192)
            fits, over = (BlockPlan(4096, 2, None, budget * 8192) for _ in range(2))
            fits.place(longest, 1)
            over.place(longest + 1, 1)
            assert fits.host_bytes <= host * 8192 < over.host_bytes
