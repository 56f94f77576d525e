"""Slow copies, other work, blocking launches, no caching allocator: bitwise the same logits.

Each disturbance is a process of its own (``stress_worker.py``); all run at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.slab import HostSlab
from stress_worker import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Disturbance:
    """What a process is disturbed by, and for how many seeds."""

    seeds: int
    disturb: str = "none"
    environment: tuple[tuple[str, str], ...] = ()


DISTURBANCES = {
    "slow copies": Disturbance(10, "slow"),
    "other work": Disturbance(2, "busy"),
    "blocking launches": Disturbance(2, environment=(("CUDA_LAUNCH_BLOCKING", "1"),)),
    "no caching allocator": Disturbance(2, environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)),
    "slow copies, no caching allocator": Disturbance(
        2, "slow", (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    ),
}
UNDISTURBED = Disturbance(10)


def start(disturbance: Disturbance, seed: int) -> subprocess.Popen[str]:
    """The worker over ``disturbance.seeds`` seeds from ``seed`` on."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    seeds = [str(seed + index) for index in range(disturbance.seeds)]
    return subprocess.Popen(
        [sys.executable, "tests/stress_worker.py", "--disturb", disturbance.disturb,
         "--seeds", *seeds],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **dict(disturbance.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def digests(run_seed: int) -> dict[str, dict[str, str]]:
    """The digests of every process, by disturbance; ``""`` is the undisturbed one."""
    seed = run_seed % 10**6
    cases = {"": UNDISTURBED, **DISTURBANCES}
    workers = {name: start(case, seed) for name, case in cases.items()}
    found = {}
    for name, worker in workers.items():
        out, err = worker.communicate(timeout=600)
        assert worker.returncode == 0, f"{name or 'undisturbed'}: {err[-3000:]}"
        record = json.loads(out.splitlines()[-1])
        print(f"{name or 'undisturbed'}: {record['seconds']:.1f} s")
        found[name] = record["digests"]
    return found


@pytest.mark.parametrize("name", DISTURBANCES)
def test_logits_are_bitwise_those_of_the_undisturbed_run(
    name: str, digests: dict[str, dict[str, str]]
) -> None:
    found, wanted = digests[name], digests[""]
    assert len(found) == len(CASES) * DISTURBANCES[name].seeds
    assert {case: found[case] == wanted[case] for case in found} == dict.fromkeys(found, True)


def test_seeds_make_a_difference(digests: dict[str, dict[str, str]]) -> None:
    for case in CASES:
        of_case = {found for name, found in digests[""].items() if name.startswith(case)}
        assert len(of_case) == UNDISTURBED.seeds


def test_a_refused_registration_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver refuses a range that is registered already; later kernels are not told."""
    cudart = torch.cuda.cudart()
    pinned: list[int] = []

    def register(pointer: int, nbytes: int, flags: int) -> Any:
        if not pinned:
            assert int(cudart.cudaHostRegister(pointer, nbytes, flags)) == 0
            pinned.append(pointer)
        return cudart.cudaHostRegister(pointer, nbytes, flags)

    def unregister(pointer: int) -> Any:
        return cudart.cudaHostUnregister(pointer)

    fake = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    with pytest.raises(DoesNotFitError, match="refused to pin"):
        HostSlab(1 << 20, 1 << 20, torch.device("cuda"))
    assert float((torch.ones(8, device="cuda") + 1).sum()) == 16
    monkeypatch.undo()
    slab = HostSlab(1 << 20, 1 << 20, torch.device("cuda"))
    assert slab.registrations == 1
    slab.close()
    assert slab.registrations == 0
