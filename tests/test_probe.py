"""The machine profile: what a probe finds, where it is kept, and when it is not used."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from headinfer_compile import plan
from headinfer_compile.cli import main
from headinfer_compile.machine import (
    Machine,
    MachineProfile,
    Rates,
    describe,
    load_profile,
    profile_from_json,
    profile_path,
    save_profile,
)
from headinfer_compile.probe import probe, this_machine
from headinfer_compile.runtime.host_build import library_origin


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def measured() -> MachineProfile:
    return probe()


def test_a_probe_finds_every_rate_within_30_seconds(measured: MachineProfile) -> None:
    print(measured)
    assert measured.seconds < 30
    rates = measured.rates
    for name in ("duplex", "hbm", "dram", "dram_beside_link", "matmul", "attention", "causal"):
        assert getattr(rates, name) > 1e6, name
    for table in (rates.h2d, rates.d2h):
        sizes = [size for size, _ in table]
        assert len(table) >= 3 and sizes == sorted(sizes) and all(rate > 0 for _, rate in table)
    assert dict(rates.attention_kernels) and rates.attention == max(
        rate for _, rate in rates.attention_kernels
    )
    assert 0 < rates.layer_seconds < 1 and 0 < rates.block_seconds < 1
    assert rates.assumed == ()
    assert measured.host_available > 0


def test_a_profile_is_kept_for_the_user_alone(measured: MachineProfile) -> None:
    assert load_profile() is None
    path = save_profile(measured)
    assert path == profile_path()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert load_profile() == measured
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_old_profile_expires(measured: MachineProfile) -> None:
    save_profile(dataclasses.replace(measured, measured_at=time.time() - 31 * 24 * 3600))
    assert load_profile() is None
    # One from the future was made by a clock that was wrong.
    save_profile(dataclasses.replace(measured, measured_at=time.time() + 3600))
    assert load_profile() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rates": 3}'])
def test_a_broken_profile_is_not_used(
    text: str, measured: MachineProfile, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_profile(measured)
    path.write_text(text)
    assert load_profile() is None
    assert "cannot be used" in caplog.text


def test_a_profile_of_another_version_is_passed_over_quietly(
    measured: MachineProfile, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_profile(measured)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": data["version"] - 1}))
    with caplog.at_level(logging.INFO):
        assert load_profile() is None
    (record,) = [r for r in caplog.records if r.name.startswith("headinfer_compile")]
    assert record.levelno == logging.INFO and "headinfer probe" in record.message


def test_a_profile_that_others_may_write_is_not_used(measured: MachineProfile) -> None:
    path = save_profile(measured)
    os.chmod(path, 0o666)
    assert load_profile() is None


def test_this_machine_without_a_probe_says_what_it_assumes() -> None:
    machine = this_machine(measure=False)
    assert machine.source == "assumed" and "hbm" in machine.rates.assumed
    described = describe(machine, link="25GB/s", tflops=100)
    assert "h2d" not in described.rates.assumed and "hbm" in described.rates.assumed


def test_a_plan_uses_the_kept_profile(measured: MachineProfile) -> None:
    save_profile(measured)
    made = plan("llama-3-8b", context="4K", host_memory="64GiB")
    assert made.machine.rates.matmul == measured.rates.matmul
    assert measured.device in str(made)
    assert not any("assumed" in warning for warning in made.warnings)


def test_a_described_machine_does_not_depend_on_this_one(measured: MachineProfile) -> None:
    words: dict[str, Any] = dict(gpu_memory="24GiB", host_memory="64GiB", link="25GB/s", tflops=99)
    before = plan("llama-3-8b", context="64K", **words)
    save_profile(measured)
    assert plan("llama-3-8b", context="64K", **words).to_json() == before.to_json()


def test_command(measured: MachineProfile, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--kept"]) == 1
    assert "run headinfer probe" in capsys.readouterr().err
    save_profile(measured)
    assert main(["probe", "--kept", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert profile_from_json(found) == measured
    assert main(["probe", "--kept"]) == 0
    shown = capsys.readouterr().out
    assert "link: host to device" in shown and "TFLOP/s" in shown
    assert f"kernel of attention on the CPU: {found['host_kernel']}\n" in shown
    assert found["host_kernel"] == library_origin()


def test_rates_between_the_measured_sizes() -> None:
    rates = Rates(h2d=((1 << 20, 10e9), (4 << 20, 20e9)))
    assert rates.link(1) == 10e9 and rates.link(1 << 30) == 20e9
    assert 10e9 < rates.link(2 << 20) < 20e9
    assert Machine("m", 0, 0, rates).rates.link(4 << 20) == 20e9
