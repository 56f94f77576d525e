"""Wheels carry the library of attention on the CPU, where a compiler makes one that loads.

Everything else about the package is in `pyproject.toml`. HEADINFER_PREBUILT chooses: `auto`, which
is the default, `yes`, which fails without a library, or `no`, which makes a pure wheel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from pathlib import Path

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

log = logging.getLogger(__name__)

_RUNTIME = "headinfer_compile.runtime"
_SPEC = importlib.util.spec_from_file_location(
    "host_compile", Path(__file__).resolve().with_name("runtime") / "host_compile.py"
)
assert _SPEC is not None and _SPEC.loader is not None
host_compile = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(host_compile)


class Distribution(setuptools.Distribution):
    """What is distributed, and the library that goes with it."""

    library: Path | None = None
    """Set while a wheel that carries it is made."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is of one platform."""
        return self.library is not None


class BuildModules(build_py):
    """The modules, with the library beside its sources."""

    def run(self) -> None:
        """Leave no library of an earlier wheel in the folder that is packed."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, *_RUNTIME.split("."))
        for stale in folder.glob(f"{host_compile.STEM}_*.so"):
            stale.unlink()
        library = self.distribution.library
        if library is not None:
            self.copy_file(str(library), str(folder / library.name))


class Wheel(bdist_wheel):
    """A wheel of this platform and any Python 3 if it carries the library, else a pure one."""

    def run(self) -> None:
        """Make the library before anything asks whether there is one."""
        folder = Path(self.get_finalized_command("build").build_temp)
        self.distribution.library = make_library(folder)
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The library is called by ctypes: no Python has an ABI that it would have to fit."""
        _, _, platform = super().get_tag()
        return self.python_tag, "none", platform


def make_library(folder: Path) -> Path | None:
    """The library in ``folder``, as HEADINFER_PREBUILT wants it; None for a pure wheel.

    Raises:
        SetupError: The variable is malformed, or there has to be a library and cannot be.
    """
    wanted = os.environ.get("HEADINFER_PREBUILT") or "auto"
    if wanted not in ("auto", "yes", "no"):
        raise SetupError(f"HEADINFER_PREBUILT={wanted!r}: expected auto, yes or no")
    if wanted == "no":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / host_compile.library_name(*host_compile.FLAGS)
    reason = host_compile.compile_library(os.environ.get("CXX") or "c++", host_compile.FLAGS, path)
    if reason is None:
        try:
            # One for another machine than this, whose name it would have, does not load.
            ctypes.CDLL(str(path))
        except OSError as error:
            reason = str(error)
    if reason is None:
        return path
    if wanted == "yes":
        raise SetupError(f"HEADINFER_PREBUILT=yes, but {reason}")
    log.warning("the wheel carries no library for attention on the CPU: %s", reason)
    return None


setuptools.setup(distclass=Distribution, cmdclass={"build_py": BuildModules, "bdist_wheel": Wheel})
