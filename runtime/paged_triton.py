"""One-query attention over the tail and all resident blocks as one Triton kernel pair.

Lengths and addresses are read from device memory, so a captured CUDA graph stays valid while the
cache grows. Split-KV: each program attends a range of tokens, a second kernel joins the ranges.

Legend: G query heads per KV head, T tokens of a page, D / Dv head dims of K / V.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from headinfer_compile.runtime.triton_launch import Launcher

_TILE = 32
_LOG2_E = 1.4426950408889634
_PROGRAMS_PER_SM = 2
_NUM_WARPS, _NUM_STAGES = 2, 3
_JOIN_TILE = 32


@triton.jit(do_not_specialize=["num_blocks", "q_batch", "q_head", "visible_batch"])
def _split_kernel(
    q_ptr,
    addresses_ptr,
    capacity_ptr,
    rows_ptr,
    visible_ptr,
    part_ptr,
    part_lse_ptr,
    scale_log2,
    num_blocks,
    q_batch,
    q_head,
    visible_batch,
    MASKED: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    split = tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // HEADS
    head = pair % HEADS
    group = tl.arange(0, G_PAD)
    dim = tl.arange(0, D_PAD)
    v_dim = tl.arange(0, DV_PAD)

    # One load for all blocks: a loop over them would pay a memory latency for each.
    block = tl.arange(0, BLOCKS)
    counts = tl.load(rows_ptr + block, mask=block < num_blocks, other=0)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    tiles = tl.cdiv(total, TILE)
    low = split * tiles // SPLITS * TILE
    high = tl.minimum(total, (split + 1) * tiles // SPLITS * TILE)
    first_block = tl.sum(((ends <= low) & (block < num_blocks)).to(tl.int32), 0)
    last_block = tl.sum(((ends - counts < high) & (block < num_blocks)).to(tl.int32), 0)

    q_at = q_ptr + batch * q_batch + (head * G + group[:, None]) * q_head + dim[None, :]
    q = tl.load(q_at, mask=(group < G)[:, None] & (dim < D)[None, :], other=0.0)
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    norm = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV_PAD], tl.float32)

    for i in range(first_block, last_block):
        start = tl.sum(tl.where(block < i, counts, 0), 0)
        rows = tl.load(rows_ptr + i)
        tokens = tl.load(capacity_ptr + i).to(tl.int64)
        element = q_ptr.dtype.element_ty
        k_base = tl.load(addresses_ptr + 2 * i).to(tl.pointer_type(element))
        v_base = tl.load(addresses_ptr + 2 * i + 1).to(tl.pointer_type(element))
        k_base += head * BATCH * tokens * (D + DV) + batch * tokens * D
        v_base += head * BATCH * tokens * (D + DV) + batch * tokens * DV
        first = tl.maximum(low - start, 0)
        last = tl.minimum(high - start, rows)
        for at in range(first, last, TILE):
            row = at + tl.arange(0, TILE)
            live = row < last
            seen = live
            if MASKED:
                # Older columns are known to be visible; the newest block's are read.
                newest = i == num_blocks - 1
                at_mask = visible_ptr + batch * visible_batch + row
                seen = live & (tl.load(at_mask, mask=live & newest, other=1) != 0)
            k = tl.load(
                k_base + row[:, None] * D + dim[None, :],
                mask=live[:, None] & (dim < D)[None, :],
                other=0.0,
            )
            v = tl.load(
                v_base + row[:, None] * DV + v_dim[None, :],
                mask=live[:, None] & (v_dim < DV)[None, :],
                other=0.0,
            )
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            score = tl.where(seen[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            if MASKED:
                # A tile may be hidden as a whole: -inf - -inf must not become NaN.
                new_top = tl.where(new_top == float("-inf"), -1e30, new_top)
            weight = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            norm = norm * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            acc += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = new_top

    at = (pair * SPLITS + split) * G + group
    any_seen = norm > 0.0
    out = acc / tl.where(any_seen, norm, 1.0)[:, None]
    out_at = part_ptr + at[:, None] * DV + v_dim[None, :]
    tl.store(out_at, out, mask=(group < G)[:, None] & (v_dim < DV)[None, :])
    lse = tl.where(any_seen, top + tl.log2(tl.where(any_seen, norm, 1.0)), float("-inf"))
    tl.store(part_lse_ptr + at, lse, mask=group < G)


@triton.jit
def _join_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    pair = row // G
    group = row % G
    split = tl.arange(0, SPLITS)
    v_dim = tl.program_id(1) * DV_TILE + tl.arange(0, DV_TILE)
    at = (pair * SPLITS + split) * G + group
    lse = tl.load(part_lse_ptr + at)
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - top)
    norm = tl.sum(weight, 0)
    part = tl.load(
        part_ptr + at[:, None] * DV + v_dim[None, :], mask=(v_dim < DV)[None, :], other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.where(norm > 0.0, norm, 1.0)
    tl.store(out_ptr + row * DV + v_dim, out.to(out_ptr.dtype.element_ty), mask=v_dim < DV)
    # The partial LSEs are in base 2; each program of a row stores the same value.
    tl.store(lse_ptr + row, (top + tl.log2(norm)) * 0.6931471805599453)


_split, _join = Launcher(_split_kernel), Launcher(_join_kernel)


@functools.cache
def _splits(device: torch.device, pairs: int) -> int:
    programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    return int(max(2, triton.next_power_of_2(-(-programs // pairs))))


def attend_paged(
    q: Tensor,
    addresses: Tensor,
    capacity: Tensor,
    rows: Tensor,
    visible: Tensor | None,
    *,
    num_kv_heads: int,
    v_head_dim: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attend one query token over page-layout blocks; nothing here depends on their lengths.

    Args:
        q: ``[B, Hq, 1, D]``, contiguous in D.
        addresses: int64 ``[blocks, 2]``: device addresses of K and of V of the layer in each block.
        capacity: int32 ``[blocks]``: tokens that each block has room for, T.
        rows: int32 ``[blocks]``: tokens to attend in each block.
        visible: int8 ``[B, >= rows of the last block]``, nonzero = visible, for the last block.
        num_kv_heads: Hkv.
        v_head_dim: Dv.
        scale: Factor of the scores.
        dtype: Of the result.

    Returns:
        out ``[B, Hq, 1, Dv]`` in ``dtype`` and lse fp32 ``[B, Hq, 1]``.
    """
    batch, heads, _, dim = q.shape
    group, pairs = heads // num_kv_heads, batch * num_kv_heads
    splits = _splits(q.device, pairs)
    part = q.new_empty((pairs, splits, group, v_head_dim), dtype=torch.float32)
    part_lse = q.new_empty((pairs, splits, group), dtype=torch.float32)
    out = q.new_empty((batch, heads, 1, v_head_dim), dtype=dtype)
    lse = q.new_empty((batch, heads, 1), dtype=torch.float32)
    # tl.dot takes no dimension below 16: narrower heads are padded by its masks.
    v_pad = max(16, triton.next_power_of_2(v_head_dim))
    _split(
        (splits, pairs),
        (q, addresses, capacity, rows, rows if visible is None else visible, part, part_lse),
        (
            scale * _LOG2_E,
            addresses.shape[0],
            q.stride(0),
            q.stride(1),
            0 if visible is None else visible.stride(0),
        ),
        (
            visible is not None,
            batch,
            num_kv_heads,
            group,
            max(16, triton.next_power_of_2(group)),
            dim,
            max(16, triton.next_power_of_2(dim)),
            v_head_dim,
            v_pad,
            max(16, triton.next_power_of_2(addresses.shape[0])),
            _TILE,
            splits,
        ),
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )
    join_tile = min(_JOIN_TILE, v_pad)
    _join(
        (batch * heads, triton.cdiv(v_head_dim, join_tile)),
        (part, part_lse, out, lse),
        (),
        (group, v_head_dim, join_tile, splits),
    )
    return out, lse
