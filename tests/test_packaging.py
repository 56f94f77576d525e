"""The package as it is shipped, and the rules that hold over its whole source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from packaging_harness import FOLDERS, PACKAGE, ROOT, copy_tree

#: Layers, lowest first: a module imports its own layer and those below.
BASE = {f"{PACKAGE}.config", f"{PACKAGE}.errors"}
MODEL_NAMES = re.compile(
    r"llama|qwen|gemma|mistral|mixtral|smollm|deepseek|\bphi[-_]?\d|gpt[-_]?(2|j|neo|oss)|falcon"
    r"|\bopt\b[-_]\d|bloom|olmo|\bglm",
    re.IGNORECASE,
)


def sources() -> Iterator[tuple[str, Path]]:
    """Module name and file of every Python file that is shipped."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{package}.{path.stem}".removesuffix(".__init__"), path


def python_files() -> list[Path]:
    """Every Python file of the repository, once."""
    folders = [*FOLDERS, "tests", "benchmarks", "examples"]
    found = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted({*found, ROOT / "setup.py"})


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of this package that the file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found.update(inside or {node.module})
    return {name for name in found if name.split(".")[0] == PACKAGE}


def layer(module: str) -> int:
    """0 for config and errors, 1 for runtime, 2 for passes, 3 for the rest."""
    if module in BASE:
        return 0
    return {"runtime": 1, "passes": 2}.get([*module.split("."), ""][1], 3)


def test_imports_point_one_way() -> None:
    known = {name for name, _ in sources()}
    wrong = [
        f"{module} imports {target}"
        for module, path in sources()
        for target in sorted(imported_modules(path, known))
        if layer(target) > layer(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_round_the_package() -> None:
    wrong = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] in ("passes", "runtime") for name in names):
                wrong.append(f"{path.relative_to(ROOT)}: {names}")
    assert not wrong, "\n".join(wrong)


def test_runtime_does_not_know_fx_and_passes_do_not_know_cuda() -> None:
    wrong = []
    for module, path in sources():
        text = path.read_text(encoding="utf-8")
        if layer(module) == 1 and re.search(r"torch\.fx|from torch import fx", text):
            wrong.append(f"{module} uses torch.fx")
        if layer(module) == 2 and "torch.cuda" in text:
            wrong.append(f"{module} uses torch.cuda")
    assert not wrong, "\n".join(wrong)


def test_passes_and_runtime_name_no_model() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for module, path in sources()
        if layer(module) in (1, 2)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MODEL_NAMES.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_ascii() -> None:
    wrong = []
    for path in python_files():
        data = path.read_bytes()
        if data.count(b"\n") > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {data.count(bytes([10]))} lines")
        if not data.isascii():
            wrong.append(f"{path.relative_to(ROOT)}: not ASCII")
    assert not wrong, "\n".join(wrong)


def test_passes_and_runtime_are_links_into_the_package() -> None:
    for name in ("passes", "runtime"):
        link = ROOT / PACKAGE / name
        assert link.is_symlink(), link
        assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_a_second_copy_of_the_modules_cannot_be_imported(name: str) -> None:
    import_module(f"{PACKAGE}.{name}")
    with pytest.raises(ImportError, match=f"use '{PACKAGE}.{name}'"):
        import_module(name)
    assert name not in sys.modules


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of a pure wheel built from a copy of the tree that has lost its links."""
    pytest.importorskip("setuptools", "77")
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(tree)], capture_output=True, text=True, check=False,
        env={**os.environ, "HEADINFER_PREBUILT": "no"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return {name: wheel.read(name).decode() for name in wheel.namelist()}


def test_the_wheel_holds_every_module(wheel_files: dict[str, str]) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for folder, package in FOLDERS.items()
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in (ROOT / folder).glob(pattern)
    }
    assert f"{PACKAGE}/runtime/host_attention.cpp" in expected
    data = {
        f"{PACKAGE}/{path.name}"
        for path in (ROOT / PACKAGE).iterdir()
        if path.suffix in (".html", ".css", ".js", ".typed")
    }
    assert f"{PACKAGE}/html_page.html" in data
    shipped = {name for name in wheel_files if ".dist-info/" not in name}
    assert shipped == expected | data


def test_the_wheel_declares_the_backend_and_the_command(wheel_files: dict[str, str]) -> None:
    text = next(text for name, text in wheel_files.items() if name.endswith("entry_points.txt"))
    assert "[torch_dynamo_backends]\nheadinfer = headinfer_compile.backend:headinfer" in text
    assert "[console_scripts]\nheadinfer = headinfer_compile.cli:main" in text


def test_no_folder_of_code_is_left_out_of_the_package_list() -> None:
    nested = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).glob("*/**/*.py")
        if not (ROOT / folder / path.relative_to(ROOT / folder).parts[0]).is_symlink()
    ]
    assert not nested, f"passes/ and runtime/ stay flat, the package list names no more: {nested}"
