"""Builds the host attention library on first use and keeps it in torch's folder for extensions.

The source includes neither torch nor CUDA headers, so a plain compiler call does, takes seconds and
needs no ninja; one build serves every machine of its architecture, since the instruction set is
chosen at run time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parent
_SOURCE = "host_attention.cpp"
_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread")
_TIMEOUT_SECONDS = 300


def source_files() -> list[Path]:
    """The files that the library is made of."""
    return sorted([_FOLDER / _SOURCE, *_FOLDER.glob("host_attention*.h")])


@functools.cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library, built if it has to be; None, said once, where that is not possible.

    Args:
        flags: More for the compiler, to try another kernel.
    """
    compiler = get_cxx_compiler()
    try:
        return ctypes.CDLL(str(_built(compiler, (*_FLAGS, *flags))))
    except FileNotFoundError:
        reason = f"there is no C++ compiler {compiler!r} (CXX names another one)"
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        # Where the file was included from comes first.
        said = [line for line in lines if "error:" in line] or lines
        reason = f"{compiler} failed: {said[0] if said else error}"
    except (subprocess.TimeoutExpired, OSError) as error:
        reason = str(error)
    log.warning("no KV is attended on the CPU, its kernel could not be built: %s", reason)
    return None


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """The path of the shared library for this source, these flags and this architecture."""
    digest = hashlib.sha256(repr((compiler, flags, platform.machine())).encode())
    for path in source_files():
        digest.update(path.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    target = root / "headinfer_compile" / f"host_attention_{digest.hexdigest()[:16]}.so"
    if target.exists():
        found = target.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            raise PermissionError(f"{target} is not this user's alone and is not loaded: remove it")
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Built aside and moved: two processes that build at once both end with a whole file.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *flags, str(_FOLDER / _SOURCE), "-o", str(made)]
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
        made.replace(target)
    return target
