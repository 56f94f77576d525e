"""Copies of K and V rows between page-layout buffers: one call where the memory allows it."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_MEMCPY_DEFAULT = 4


@functools.cache
def _cuda_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError as error:
        log.warning("no CUDA runtime found (%s): partial pages are copied run by run", error)
        return None


def forget_cuda_error() -> None:
    """Take the last error of this thread's CUDA calls, once it is dealt with.

    A call past torch that fails leaves it, and torch would raise it at its next kernel.
    """
    runtime = _cuda_runtime()
    if runtime is not None:
        runtime.cudaGetLastError()


def can_launch_host_functions() -> bool:
    """Whether ``launch_host_function`` can be called."""
    return _cuda_runtime() is not None


def launch_host_function(stream: int, function: int, argument: int) -> None:
    """Queue ``function(argument)`` on a raw CUDA stream; both are addresses.

    The function runs on a thread of the driver and may not call CUDA.
    """
    runtime = _cuda_runtime()
    assert runtime is not None
    pointer = ctypes.c_void_p
    status = runtime.cudaLaunchHostFunc(pointer(stream), pointer(function), pointer(argument))
    if status != 0:
        raise RuntimeError(f"cudaLaunchHostFunc failed with CUDA error {status}")


@functools.cache
def _memcpy_2d() -> Callable[..., int] | None:
    """``cudaMemcpy2DAsync`` of that runtime."""
    runtime = _cuda_runtime()
    if runtime is None:
        return None
    function = runtime.cudaMemcpy2DAsync
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function


def copy_kv(
    target: tuple[torch.Tensor, torch.Tensor],
    source: tuple[torch.Tensor, torch.Tensor],
    stream: int | None,
) -> int:
    """Copy K and V rows between host and device.

    Args:
        target: K ``[heads, B, rows, D]`` and V ``[heads, B, rows, Dv]`` views of one buffer in page
            layout (the last two dims contiguous).
        source: The same shapes, views of another such buffer.
        stream: Raw CUDA stream (the current one) for the fast path; None on a CPU.

    Returns:
        Bytes copied.
    """
    k, v = target
    if stream is None:
        k.copy_(source[0])
        v.copy_(source[1])
        return k.nbytes + v.nbytes
    pitches = [_pitch(*pair) for pair in (target, source)]
    memcpy = _memcpy_2d()
    if memcpy is not None and None not in pitches:
        heads, batch, rows, dim = k.shape
        item = k.element_size()
        status = memcpy(
            k.data_ptr(), pitches[0], source[0].data_ptr(), pitches[1],
            rows * dim * item, 2 * heads * batch, _MEMCPY_DEFAULT, stream,
        )  # fmt: skip
        if status != 0:
            forget_cuda_error()
            raise RuntimeError(f"cudaMemcpy2DAsync failed with CUDA error {status}")
        return k.nbytes + v.nbytes
    for to, origin in zip(target, source, strict=True):
        for head in range(to.shape[0]):
            for row in range(to.shape[1]):
                # A strided host side makes ATen copy synchronously through pageable memory.
                to[head, row].copy_(origin[head, row], non_blocking=True)
    return k.nbytes + v.nbytes


def _pitch(k: torch.Tensor, v: torch.Tensor) -> int | None:
    """Bytes between successive runs of ``rows * D`` when all runs are evenly spaced, else None."""
    heads, batch = k.shape[:2]
    if v.shape != k.shape:
        return None
    item = k.element_size()
    pitch = v.data_ptr() - k.data_ptr()
    if batch > 1:
        run = k.stride(1) * item
        return run if pitch == batch * run and k.stride(0) * item == 2 * pitch else None
    return pitch if heads == 1 or k.stride(0) * item == 2 * pitch else None
