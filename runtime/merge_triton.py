"""The LSE merge as one Triton kernel; imported only where there is a CUDA tensor to merge."""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headinfer_compile.runtime.triton_launch import Launcher

_TILE = 2048
"""Elements of the output that one program merges: 16 for each of its 128 threads."""


# The strides of the LSE and the lengths are not specialised, so that one compiled kernel serves
# prefill chunks, their tails and decode.
@triton.jit(
    do_not_specialize=[
        "num_heads",
        "n",
        "lse_batch",
        "lse_head",
        "lse_row",
        "other_lse_batch",
        "other_lse_head",
        "other_lse_row",
    ]
)
def _merge_kernel(
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    num_heads,
    n,
    out_batch,
    out_head,
    out_row,
    other_batch,
    other_head,
    other_row,
    lse_batch,
    lse_head,
    lse_row,
    other_lse_batch,
    other_lse_head,
    other_lse_row,
    DIM: tl.constexpr,
    DIM_POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(1)
    batch = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, DIM_POW2)
    live = rows < n
    mask = live[:, None]
    if DIM != DIM_POW2:
        mask = mask & (cols < DIM)[None, :]

    lse_at = lse_ptr + batch * lse_batch + head * lse_head + rows * lse_row
    other_lse_at = other_lse_ptr + batch * other_lse_batch + head * other_lse_head
    a = tl.load(lse_at, mask=live, other=float("-inf"))
    b = tl.load(other_lse_at + rows * other_lse_row, mask=live, other=float("-inf"))
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = weight_a + weight_b
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)

    out_at = out_ptr + batch * out_batch + head * out_head + rows[:, None] * out_row + cols[None, :]
    other_at = other_ptr + batch * other_batch + head * other_head
    other_at = other_at + rows[:, None] * other_row + cols[None, :]
    x = tl.load(out_at, mask=mask, other=0.0)
    y = tl.load(other_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at, x * (weight_a * norm)[:, None] + y * (weight_b * norm)[:, None], mask=mask)
    # Every warp reads the old LSE of the program's rows; none may write before all have read.
    tl.debug_barrier()
    tl.store(lse_at, top + tl.log(total), mask=live)


_merge = Launcher(_merge_kernel, specialized=slice(2, 8))


def launch(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge in place on the current stream; ``out`` and ``other`` are contiguous in Dv."""
    if out.get_device() != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors' device is.
        with torch.cuda.device(out.device):
            launch(out, lse, other, other_lse)
        return
    batch, num_heads, n, dim = out.shape
    dim_pow2 = triton.next_power_of_2(dim)
    rows = max(1, _TILE // dim_pow2)
    _merge(
        (-(-n // rows), batch * num_heads),
        (out, lse, other, other_lse),
        (
            num_heads,
            n,
            *out.stride()[:3],
            *other.stride()[:3],
            *lse.stride(),
            *other_lse.stride(),
        ),
        (dim, dim_pow2, rows),
    )
