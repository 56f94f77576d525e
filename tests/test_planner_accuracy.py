"""``benchmarks/plan_accuracy.py`` runs where there is no GPU; its times hold on one only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_accuracy, plan_sweep
from benchmarks.common import read_rows
from headinfer_compile.machine import load_profile


@pytest.fixture(autouse=True)
def own_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmark keeps what it probes, and the backend chooses by it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("headinfer_compile.auto_settings.load_profile", load_profile)


def test_an_entry_is_outside_beyond_its_tolerance() -> None:
    assert plan_accuracy.entry(1.09, 1.0, "seconds")["ok"]
    assert not plan_accuracy.entry(1.11, 1.0, "seconds")["ok"]
    assert not plan_accuracy.entry(0.96, 1.0, "gpu_bytes")["ok"]
    assert plan_accuracy.entry(0, 0, "host_bytes")["ok"]
    assert not plan_accuracy.entry(1, 0, "host_bytes")["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0", "64KiB"])
def test_planned_host_bytes_are_measured(budget: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    args = "--lowering eager --device cpu --model tiny --context 300 --chunk 96 --page-tokens 32"
    rows = plan_accuracy.main([*args.split(), "--budgets", budget, "--out", str(out)])
    (row,) = rows
    assert [kept["id"] for kept in read_rows(out)] == [row["id"]]
    entries: dict[str, Any] = row["entries"]
    assert set(entries) == {"host_bytes", "prefill_seconds", "seconds_per_token"}
    assert entries["host_bytes"]["error"] == 0 and entries["host_bytes"]["measured"] > 0
    assert row["resident_bytes"] == row["predicted_resident_bytes"]
    assert row["sites_rewritten"] == 2 and row["eager_updates"] == 0 and row["h2d_bytes"] > 0


@pytest.mark.slow
def test_a_synthetic_cell_times_its_last_chunk(tmp_path: Path) -> None:
    args = "--lowering eager --device cpu --model tiny --context 300 --chunk 96 --page-tokens 32"
    more = ["--budgets", "0", "--synthetic-from", "256", "--out", str(tmp_path / "rows.json")]
    (row,) = plan_accuracy.main([*args.split(), *more])
    assert row["synthetic"] and row["timed"] == "last chunk"
    assert row["entries"]["host_bytes"]["error"] == 0


@pytest.mark.slow
def test_the_sweep_compares_auto_with_fixed_settings(tmp_path: Path) -> None:
    args = "--lowering eager --device cpu --model tiny --rounds 1 --steps 2 --settings :num_slots=2"
    base = "headinfer:0:page_tokens=32:tail_tokens=8"
    rows = plan_sweep.main([*args.split(), "--base", base, "--out", str(tmp_path / "rows.json")])
    assert [row["setting"] for row in rows] == ["auto", "num_slots=2"]
    for part in ("prefill_seconds", "seconds_per_token"):
        assert min(row["behind"][part] for row in rows) == 0 < min(row[part] for row in rows)
