"""The library that wheels carry: made with a compiler, tagged, and loaded where it fits."""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
from inspect import unwrap
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

from headinfer_compile.runtime import host_build, host_compile
from headinfer_compile.runtime.host_compile import FLAGS, library_name
from packaging_harness import PACKAGE, build, copy_tree

CARRIED = f"{PACKAGE}/runtime/{library_name(*FLAGS)}"

#: Attends random pages and prints the largest error against float64.
RUN = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
import headinfer_compile
from headinfer_compile.runtime.host_attention import JobShape, attend_pages, host_kernel
from headinfer_compile.runtime.host_build import library_origin
print("package", headinfer_compile.__file__)
print("origin", library_origin())
kernel = host_kernel(2)
worst = 0.0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(5)
    shape = JobShape(dtype, 1, 2, 4, 3, 128, 96, scale=128**-0.5)
    k, v = torch.randn(2, 700, 128).to(dtype), torch.randn(2, 700, 96).to(dtype)
    q = torch.randn(1, 8, 3, 128).to(dtype)
    page = torch.cat([k.flatten(1), v.flatten(1)], 1).contiguous()
    out, lse = attend_pages(kernel, q, [(page, 700, 0)], shape)
    keys, values = (x.double().repeat_interleave(4, 0) for x in (k, v))
    scores = q[0].double() @ keys.transpose(1, 2) * shape.scale
    worst = max(worst, float((out[0] - scores.softmax(-1) @ values).abs().max()))
    worst = max(worst, float((lse[0] - scores.logsumexp(-1)).abs().max()))
print("error", worst)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without their links; wheels made from it one after the other share build/."""
    pytest.importorskip("setuptools", "77")
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that has the library ready, so that nobody waits for it, and counts its calls."""
    assert host_build.library() is not None, "the tests need a C++ compiler"
    ready = host_build.built_path(get_cxx_compiler())
    path = tmp_path / "cxx"
    path.write_text(
        f"#!/bin/sh\necho called >> '{path}.calls'\nfor at; do last=$at; done\n"
        f"cp '{ready}' \"$last\"\n",
        encoding="ascii",
    )
    path.chmod(0o700)
    return str(path)


def attends(wheel: Path, folder: Path) -> None:
    """Install a wheel and run its kernel without a compiler, in folders of its own."""
    target, empty = folder / "target", folder / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(target), str(wheel)], check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {
        "PATH": str(empty), "PYTHONPATH": str(target), "TORCH_EXTENSIONS_DIR": str(empty),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=empty, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert Path(said["package"]).is_relative_to(target)
    assert said["origin"] == "prebuilt"
    assert 0 < float(said["error"]) < 4e-6
    assert done.stderr.count("attention on the CPU") == 1, done.stderr
    assert re.search(rf"INFO .*kernel prebuilt, .*{library_name(*FLAGS)}", done.stderr)
    assert not list(empty.iterdir()), "something was built"


def test_a_wheel_carries_a_library_that_runs_without_a_compiler(
    tree: Path, tmp_path: Path, compiler: str
) -> None:
    made = build(tree, tmp_path / "out", "wheel", CXX=compiler, HEADINFER_PREBUILT="yes")
    assert made.path is not None, made.log
    local = re.sub(r"\W", "_", sysconfig.get_platform())
    assert made.path.name.endswith(f"-py3-none-{local}.whl")
    assert f"Root-Is-Purelib: false\nTag: py3-none-{local}\n" in made.text("/WHEEL")
    assert [name for name in made.names if name.endswith(".so")] == [CARRIED]
    assert f"{PACKAGE}/runtime/host_attention.cpp" in made.names
    assert f"{PACKAGE}/passes/verify.py" in made.names
    attends(made.path, tmp_path)


@pytest.mark.slow
def test_a_wheel_of_this_compiler_runs_without_it(tree: Path, tmp_path: Path) -> None:
    made = build(tree, tmp_path / "out", "wheel", HEADINFER_PREBUILT="auto")
    assert made.path is not None, made.log
    assert CARRIED in made.names
    attends(made.path, tmp_path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no C++ compiler '{compiler}'"),
        ("#!/bin/sh\necho 'x.h:1: error: no' >&2\nexit 1\n", "{compiler} failed: x.h:1: error: no"),
        # As one for another machine.
        ('#!/bin/sh\nfor at; do last=$at; done\necho no > "$last"\n', "file too short"),
    ],
    ids=["none", "fails", "for another machine"],
)
def test_without_a_library_the_wheel_is_pure(
    tree: Path, tmp_path: Path, compiler: str, script: str | None, reason: str
) -> None:
    # The folder that is packed holds the library of an earlier wheel.
    build(tree, tmp_path / "before", "wheel", CXX=compiler)
    assert list(tree.glob("build/lib*/**/*.so"))
    other = tmp_path / "other"
    if script is not None:
        other.write_text(script, encoding="ascii")
        other.chmod(0o700)
    made = build(tree, tmp_path / "out", "wheel", CXX=str(other))
    assert made.path is not None, made.log
    assert made.path.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in made.text("/WHEEL")
    assert not [name for name in made.names if name.endswith(".so")]
    why = reason.format(compiler=other)
    assert "the wheel carries no library for attention on the CPU" in made.log
    assert why in made.log
    failed = build(tree, tmp_path / "yes", "wheel", CXX=str(other), HEADINFER_PREBUILT="yes")
    assert failed.path is None and "HEADINFER_PREBUILT=yes, but" in failed.log
    assert why in failed.log


def test_a_wheel_can_be_pure_by_choice(tree: Path, tmp_path: Path, compiler: str) -> None:
    made = build(tree, tmp_path / "out", "wheel", CXX=compiler, HEADINFER_PREBUILT="no")
    assert made.path is not None and made.path.name.endswith("-py3-none-any.whl")
    assert not [name for name in made.names if name.endswith(".so")]
    assert not Path(f"{compiler}.calls").exists()
    failed = build(tree, tmp_path / "bad", "wheel", CXX=compiler, HEADINFER_PREBUILT="1")
    assert failed.path is None
    assert "HEADINFER_PREBUILT='1': expected auto, yes or no" in failed.log


def test_editable_installs_and_sdists_hold_no_library(
    tree: Path, tmp_path: Path, compiler: str
) -> None:
    editable = build(tree, tmp_path / "editable", "editable", CXX=compiler)
    assert editable.path is not None and editable.path.name.endswith("-py3-none-any.whl")
    assert not [name for name in editable.names if name.endswith(".so")]
    sdist = build(tree, tmp_path / "sdist", "sdist", CXX=compiler)
    assert sdist.path is not None, sdist.log
    assert not Path(f"{compiler}.calls").exists()
    with tarfile.open(sdist.path) as archive:
        names = archive.getnames()
        assert not [name for name in names if name.endswith(".so")]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    # What a wheel needs is in there.
    made = build(unpacked, tmp_path / "out", "wheel", CXX=compiler, HEADINFER_PREBUILT="yes")
    assert CARRIED in made.names


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process finds the library that came with it, and nothing that was found before."""
    monkeypatch.setattr(host_build, "FOLDER", tmp_path)
    monkeypatch.setattr(host_build, "prebuilt", functools.cache(unwrap(host_build.prebuilt)))
    monkeypatch.setattr(host_build, "library", functools.cache(unwrap(host_build.library)))
    return tmp_path / library_name(*FLAGS)


def test_a_library_that_does_not_load_gives_way_to_one_that_is_built(
    carried: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carried.write_bytes(b"of another machine")
    with caplog.at_level(logging.INFO, logger=host_build.__name__):
        assert host_build.library() is not None and host_build.library() is not None
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in lines] == ["WARNING", "INFO"]
    assert "the prebuilt kernel does not load" in lines[0][1] and str(carried) in lines[0][1]
    assert re.search("kernel built (before|now by)", lines[1][1])
    assert host_build.library_origin() == f"built by {get_cxx_compiler()}"


def test_a_library_of_other_sources_is_not_loaded(
    carried: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = carried.with_name(f"host_attention_{platform.machine()}_0123456789abcdef.so")
    other.write_bytes(b"never opened")
    with caplog.at_level(logging.INFO, logger=host_build.__name__):
        assert host_build.prebuilt() is None and host_build.prebuilt() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{other} is of another machine or source, not used" in line
    # The name says for which machine it is.
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert library_name(*FLAGS).startswith("host_attention_vax_")
    assert library_name(*FLAGS)[-19:] != carried.name[-19:]


def test_where_the_library_comes_from_is_told_without_building_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "sh")
    assert host_build.library_origin() == "built on first use, by sh"
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert host_build.library_origin() == "none, there is no C++ compiler '/no/such/compiler'"
    assert not (tmp_path / "cache").exists()
    host_build.built_path("/no/such/compiler").parent.mkdir(parents=True)
    host_build.built_path("/no/such/compiler").touch()
    assert host_build.library_origin() == "built by /no/such/compiler"


def test_flags_of_an_experiment_are_never_those_of_the_wheel(
    compiler: str, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried.write_bytes(host_build.built_path(get_cxx_compiler()).read_bytes())
    found = host_build.library()
    assert found is not None and found is host_build.prebuilt()
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(carried.parent))
    tried = host_build.library(("-DHA_TILE=32",))
    assert tried is not None and tried is not found
    assert host_compile.library_name(*FLAGS, "-DHA_TILE=32") != carried.name
    assert Path(f"{compiler}.calls").read_text(encoding="ascii") == "called\n"
