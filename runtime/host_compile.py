"""What the host attention library is made of, and the compiler call that makes it.

Knows neither torch nor the rest of the package: `setup.py` loads this file by its path, where a
wheel is made and there may be neither.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""Of the sources, and of the library that a wheel carries."""

FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread")
"""For the compiler; the instruction set is chosen at run time."""

STEM = "host_attention"
"""What the names of the main source and of every library begin with."""

_TIMEOUT_SECONDS = 300


def source_files() -> list[Path]:
    """The files that the library is made of."""
    return sorted([FOLDER / f"{STEM}.cpp", *FOLDER.glob(f"{STEM}*.h")])


def library_name(*how: str) -> str:
    """File name of the library of these sources for this architecture.

    A library is called into by the numbers of its sources, so another one never has its name.

    Args:
        how: Whatever else tells it from others: flags, the compiler.
    """
    machine = platform.machine()
    digest = hashlib.sha256(repr((how, machine)).encode())
    for path in source_files():
        digest.update(path.read_bytes())
    return f"{STEM}_{machine}_{digest.hexdigest()[:16]}.so"


def compile_library(compiler: str, flags: tuple[str, ...], target: Path) -> str | None:
    """Make the library ``target``, whole or not at all; its folder exists.

    Returns:
        None, or why that was not possible.
    """
    try:
        # Built aside and moved: two processes that build at once both end with a whole file.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *flags, str(FOLDER / f"{STEM}.cpp"), "-o", str(made)]
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
            )
            made.replace(target)
    except FileNotFoundError:
        return f"there is no C++ compiler {compiler!r} (CXX names another one)"
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        # Where the file was included from comes first.
        said = [line for line in lines if "error:" in line] or lines
        return f"{compiler} failed: {said[0] if said else error}"
    except (subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return None
