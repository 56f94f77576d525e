"""The host attention library: the one that the wheel carries, or one built on first use.

The source includes neither torch nor CUDA headers, so one library serves every torch, Python and
machine of its architecture. Where the wheel carries none that fits, a plain compiler call makes one
in seconds, needs no ninja, and keeps it in torch's folder for extensions.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

from headinfer_compile.runtime.host_compile import (
    FLAGS,
    FOLDER,
    STEM,
    compile_library,
    library_name,
)

log = logging.getLogger(__name__)


@functools.cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library, built if it has to be; where it comes from, or that there is none, is said once.

    Args:
        flags: More for the compiler, to try another kernel; such a one is always built.
    """
    carried = None if flags else prebuilt()
    if carried is not None:
        return carried
    compiler = get_cxx_compiler()
    try:
        target = built_path(compiler, flags)
        made = _make(compiler, flags, target)
        found = ctypes.CDLL(str(target))
    except OSError as error:
        log.warning("no KV is attended on the CPU, its kernel could not be built: %s", error)
        return None
    log.info("attention on the CPU: kernel built %s, %s", made, target)
    return found


@functools.cache
def prebuilt() -> ctypes.CDLL | None:
    """The library that came with the package; None where there is none that fits.

    It is trusted as the modules beside it are. Said once: that it is there, or does not fit.
    """
    path = FOLDER / library_name(*FLAGS)
    if path.is_file():
        try:
            found = ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("attention on the CPU: the prebuilt kernel does not load: %s", error)
            return None
        log.info("attention on the CPU: kernel prebuilt, %s", path)
        return found
    for other in sorted(FOLDER.glob(f"{STEM}_*.so")):
        log.info("attention on the CPU: %s is of another machine or source, not used", other)
    return None


def library_origin() -> str:
    """Where the library comes from, or would: nothing is built to tell."""
    if prebuilt() is not None:
        return "prebuilt"
    compiler = get_cxx_compiler()
    if built_path(compiler).exists():
        return f"built by {compiler}"
    if shutil.which(compiler):
        return f"built on first use, by {compiler}"
    return f"none, there is no C++ compiler {compiler!r}"


def built_path(compiler: str, flags: tuple[str, ...] = ()) -> Path:
    """Where the library of these sources and flags is kept for this architecture."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return root / "headinfer_compile" / library_name(compiler, *FLAGS, *flags)


def _make(compiler: str, flags: tuple[str, ...], target: Path) -> str:
    """Have the library ``target``; returns when and how it was built, for a log.

    Raises:
        OSError: It could not be built, or others can write it.
    """
    if target.exists():
        found = target.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            raise PermissionError(f"{target} is not this user's alone and is not loaded: remove it")
        return "before"
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    reason = compile_library(compiler, (*FLAGS, *flags), target)
    if reason is not None:
        raise OSError(reason)
    return f"now by {compiler}"
