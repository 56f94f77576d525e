"""The source tree as it is packed, and the build backend run on a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "headinfer_compile"
FOLDERS = {PACKAGE: PACKAGE, "passes": f"{PACKAGE}.passes", "runtime": f"{PACKAGE}.runtime"}
"""Import name of each folder that holds the package's code."""


def copy_tree(to: Path) -> Path:
    """Copy what is packed to the folder ``to``; the two links get lost on the way."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (to / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        (to / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                (to / folder / path.name).write_bytes(path.read_bytes())
    return to


@dataclass(frozen=True)
class Built:
    """What the build backend did."""

    path: Path | None
    """What it made; None where it failed."""
    log: str

    @property
    def names(self) -> list[str]:
        """Files of the wheel."""
        assert self.path is not None, self.log
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.namelist()

    def text(self, ending: str) -> str:
        """The file of the wheel whose name ends so."""
        (name,) = [name for name in self.names if name.endswith(ending)]
        assert self.path is not None
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(name).decode()


def build(tree: Path, out: Path, what: str, **environment: str) -> Built:
    """Have setuptools make a ``wheel``, ``sdist`` or ``editable`` of ``tree`` in a new folder."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    made = list(out.iterdir())
    assert len(made) == (done.returncode == 0), done.stdout + done.stderr
    return Built(made[0] if made else None, done.stdout + done.stderr)
