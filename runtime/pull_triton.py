"""Copy pinned host memory to the device by a kernel, past the copy engines.

A copy engine serves what is ready in stream after stream: a few KiB for compute wait there for all
pages that are being transferred. Reads of a kernel travel between those of the engines.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headinfer_compile.runtime.triton_launch import Launcher

_TILE = 1024


@triton.jit(do_not_specialize=["count"])
def _pull_kernel(target_ptr, source_ptr, count, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < count), mask=at < count)


_pull = Launcher(_pull_kernel)


def pull(target: Tensor, source: Tensor) -> None:
    """Copy on the current stream.

    Args:
        target: 1-D, contiguous, on the current device.
        source: As many elements of that dtype, contiguous, in pinned host memory.
    """
    count = target.numel()
    _pull((triton.cdiv(count, _TILE), 1), (target, source), (count,), (_TILE,))
