"""Append one row of K and V to the tail in one kernel, at a row number in device memory."""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headinfer_compile.runtime.triton_launch import Launcher


@triton.jit(
    do_not_specialize=[
        "k_batch", "k_head", "v_batch", "v_head", "tail_head", "tail_k_batch", "tail_v_batch",
    ]
)  # fmt: skip
def _append_kernel(
    k_ptr,
    v_ptr,
    tail_k_ptr,
    tail_v_ptr,
    row_ptr,
    k_batch,
    k_head,
    v_batch,
    v_head,
    tail_head,
    tail_k_batch,
    tail_v_batch,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(1)
    row = tl.load(row_ptr)
    dim = tl.arange(0, D_PAD)
    k = tl.load(k_ptr + batch * k_batch + head * k_head + dim, mask=dim < D)
    tl.store(tail_k_ptr + head * tail_head + batch * tail_k_batch + row * D + dim, k, mask=dim < D)
    v_dim = tl.arange(0, DV_PAD)
    v = tl.load(v_ptr + batch * v_batch + head * v_head + v_dim, mask=v_dim < DV)
    tl.store(
        tail_v_ptr + head * tail_head + batch * tail_v_batch + row * DV + v_dim, v, mask=v_dim < DV
    )


_append = Launcher(_append_kernel)


def append_row(k: Tensor, v: Tensor, tail: tuple[Tensor, Tensor], row: Tensor) -> None:
    """Write the K and V of one token.

    Args:
        k: ``[B, Hkv, 1, D]``, contiguous in D.
        v: ``[B, Hkv, 1, Dv]``, contiguous in Dv.
        tail: Page-layout views ``[Hkv, B, W, D]`` and ``[Hkv, B, W, Dv]`` (``kv_views``).
        row: int64 ``[1]`` on the device: the row of W to write.
    """
    batch, heads, _, dim = k.shape
    v_dim = v.shape[3]
    _append(
        (heads, batch),
        (k, v, *tail, row),
        (
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            tail[0].stride(0),
            tail[0].stride(1),
            tail[1].stride(1),
        ),
        (dim, triton.next_power_of_2(dim), v_dim, triton.next_power_of_2(v_dim)),
        num_warps=1,
    )
