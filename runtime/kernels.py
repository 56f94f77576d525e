"""How each attention kernel is called: one function a kernel, all with the same contract.

Legend: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv the GQA group (consecutive query
heads), n queries, m keys, D head dim of q and k, Dv head dim of v.

Every function takes q ``[B, Hq, n, D]``, k ``[B, Hkv, m, D]`` and v ``[B, Hkv, m, Dv]`` with
m >= 1, any strides and a contiguous last dimension; ``causal`` is top-left and asks for n == m.
A mask broadcasts to ``[B, Hq, n, m]``: bool (True is visible) or float (added to the scores).
``soft_cap`` makes scaled scores s ``soft_cap * tanh(s / soft_cap)`` before the mask. They
return out ``[B, Hq, n, Dv]`` in q's dtype and any strides, and lse fp32 ``[B, Hq, n]``, the natural
logarithm of the sum of exponentials of the scaled scores. A row that sees no key has out 0 and lse
-inf. What a kernel cannot do is said by ``attention.py``, not checked here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math as _math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

MATH_SCORES_BYTES = 32 * 2**20
"""Bound of the scores that ``math`` holds at a time, unless a single row is larger."""

_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


class Run(Protocol):
    """Attend one block; the contract is in the module's docstring."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
        soft_cap: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def math_chunk(row_bytes: int, num_kv_heads: int, n: int) -> tuple[int, int]:
    """KV heads and query rows that ``math`` takes at a time.

    Args:
        row_bytes: Bytes of the scores of one query row of one KV head (all of its GQA group).
        num_kv_heads: KV heads in all.
        n: Query rows in all.
    """
    rows = max(1, min(n, MATH_SCORES_BYTES // row_bytes))
    heads = max(1, min(num_kv_heads, MATH_SCORES_BYTES // (row_bytes * rows))) if rows == n else 1
    return heads, rows


def math(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain matrix products in fp32 (fp64 for fp64), a bounded piece of the scores at a time."""
    batch, num_heads, n, _ = q.shape
    num_kv_heads, m = k.shape[1:3]
    group = num_heads // num_kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, num_heads, n, v.shape[-1]))
    lse = q.new_empty((batch, num_heads, n), dtype=torch.float32)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    heads, rows = math_chunk(batch * group * m * dtype.itemsize, num_kv_heads, n)
    for head in range(0, num_kv_heads, heads):
        k_part = k[:, head : head + heads].to(dtype)
        v_part = v[:, head : head + heads].to(dtype)
        q_heads = slice(head * group, (head + k_part.shape[1]) * group)
        for row in range(0, n, rows):
            q_rows = slice(row, min(row + rows, n))
            count = q_rows.stop - row
            # Causal rows see no key after the last row, so those scores are not computed.
            seen = q_rows.stop if causal else m
            q_part = q[:, q_heads, q_rows].to(dtype) * scale
            q_part = q_part.reshape(batch, -1, group * count, q.shape[-1])
            scores = q_part @ k_part[:, :, :seen].mT
            if soft_cap is not None:
                scores.div_(soft_cap).tanh_().mul_(soft_cap)
            grouped = scores.view(batch, -1, group, count, seen)
            if causal:
                hidden = torch.ones(count, seen, dtype=torch.bool, device=q.device).triu(row + 1)
                grouped.masked_fill_(hidden, -_math.inf)
            if mask is not None:
                part = _mask_part(mask, q_heads, q_rows, seen, group)
                if part.dtype == torch.bool:
                    grouped.masked_fill_(~part, -_math.inf)
                else:
                    grouped.add_(part)
            top = scores.amax(dim=-1, keepdim=True)
            scores.sub_(top.masked_fill(top == -_math.inf, 0.0)).exp_()
            total = scores.sum(dim=-1, keepdim=True)
            part_out = (scores @ v_part[:, :, :seen]).div_(total.masked_fill(total == 0, 1.0))
            out[:, q_heads, q_rows] = part_out.view(batch, -1, count, v.shape[-1])
            lse[:, q_heads, q_rows] = total.log_().add_(top).view(batch, -1, count)
    return out, lse


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's flash kernel for the CPU; a single query's GQA group becomes its query length."""
    assert soft_cap is None
    v_head_dim = v.shape[-1]
    q_in, k_in, v_in = _equal_head_dims(q, k, v)
    bias = bias_in = None
    if mask is not None:
        bias = bias_in = _bias(mask, torch.promote_types(q.dtype, torch.float32))
    if _is_foldable(q, k):
        q_in = _fold(q_in, k)
        bias_in = None if bias is None else _fold_bias(bias, k)
        causal = False
    out, lse = _CPU_FLASH(q_in, k_in, v_in, 0.0, causal, attn_mask=bias_in, scale=scale)
    out = out[..., :v_head_dim].reshape(*q.shape[:3], v_head_dim)
    lse = lse.to(torch.float32).reshape(q.shape[:3])
    if bias is not None:
        _clear_hidden_rows(out, lse, bias)
    return out, lse


def flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's FlashAttention-2; a single query's GQA group becomes its query length."""
    assert mask is None and soft_cap is None
    v_head_dim = v.shape[-1]
    if v_head_dim != q.shape[-1]:
        q, k, v = _equal_head_dims(q, k, v)
    if not _is_foldable(q, k):
        out, lse = _FLASH(q, k, v, 0.0, causal, scale=scale)[:2]
        return out[..., :v_head_dim], lse
    out, lse = _FLASH(_fold(q, k), k, v, 0.0, False, scale=scale)[:2]
    return out[..., :v_head_dim].reshape(*q.shape[:3], v_head_dim), lse.view(q.shape[:3])


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cuDNN's attention, which builds a plan at the first call with new sizes or strides."""
    assert mask is None and soft_cap is None
    out, lse = _CUDNN(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out, lse.view(q.shape[:3])


def efficient(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's memory-efficient attention, which knows no GQA.

    A single query's GQA group becomes its query length. Otherwise each KV head is attended in a
    call of its own, repeated over its group with stride 0, so that nothing is copied.
    """
    assert soft_cap is None
    batch, num_heads, n, _ = q.shape
    num_kv_heads, m = k.shape[1:3]
    group = num_heads // num_kv_heads
    bias = None if mask is None else _aligned_bias(mask, q.dtype, m)
    if group == 1 or n == 1:
        q_in, bias_in = q, bias
        if _is_foldable(q, k):
            q_in = _fold(q, k)
            bias_in = None if bias is None else _fold_bias(bias, k)
            causal = False
        out, lse = _efficient_once(q_in, k, v, scale, causal, bias_in)
        out, lse = out.reshape(batch, num_heads, n, -1), lse.reshape(batch, num_heads, n)
    else:
        parts = []
        for head in range(num_kv_heads):
            q_heads = slice(head * group, (head + 1) * group)
            k_part = k[:, head : head + 1].expand(-1, group, -1, -1)
            v_part = v[:, head : head + 1].expand(-1, group, -1, -1)
            bias_part = bias if bias is None or bias.shape[1] == 1 else bias[:, q_heads]
            parts.append(_efficient_once(q[:, q_heads], k_part, v_part, scale, causal, bias_part))
        out, lse = parts[0]
        if num_kv_heads > 1:
            out = torch.cat([part_out for part_out, _ in parts], dim=1)
            lse = torch.cat([part_lse for _, part_lse in parts], dim=1)
    if bias is not None:
        _clear_hidden_rows(out, lse, bias)
    return out, lse


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention-2 of the flash-attn package."""
    assert mask is None
    function = flash_attn_function()
    assert function is not None
    out, lse, _ = function(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        causal=causal,
        softcap=soft_cap or 0.0,
        return_attn_probs=True,
    )
    return out.transpose(1, 2), lse


def fa3(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention-3 of either package that carries it."""
    assert mask is None and soft_cap is None
    function = fa3_function()
    assert function is not None
    out, lse = function(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        causal=causal,
        return_attn_probs=True,
    )
    return out.transpose(1, 2), lse


@functools.cache
def flash_attn_function() -> Callable[..., Any] | None:
    """``flash_attn_func`` of the flash-attn package, or None where it cannot be imported."""
    return _import_attention("flash_attn")


@functools.cache
def fa3_function() -> Callable[..., Any] | None:
    """``flash_attn_func`` of FlashAttention-3, or None where it cannot be imported."""
    return _import_attention("flash_attn_interface") or _import_attention("fa3_fwd_interface")


def _import_attention(module: str) -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = importlib.import_module(module).flash_attn_func
    except ModuleNotFoundError as error:
        if error.name != module:
            log.warning("%s is installed but cannot be used: %s", module, error)
        return None
    except (ImportError, OSError, AttributeError) as error:
        log.warning("%s is installed but cannot be used: %s", module, error)
        return None
    if "return_attn_probs" not in inspect.signature(function).parameters:
        log.warning("%s is not used: this version does not return the LSE on request", module)
        return None
    return function


def _is_foldable(q: Tensor, k: Tensor) -> bool:
    return q.shape[2] == 1 and q.shape[1] != k.shape[1]


def _fold(q: Tensor, k: Tensor) -> Tensor:
    """One query of Hq heads as G queries of Hkv heads: ``[B, Hkv, G, D]``, a view."""
    return q.view(q.shape[0], k.shape[1], -1, q.shape[-1])


def _fold_bias(bias: Tensor, k: Tensor) -> Tensor:
    if bias.shape[1] == 1:
        return bias
    return bias.view(bias.shape[0], k.shape[1], -1, bias.shape[-1])


def _equal_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of (q, k) and v with zeros, which change neither the scores nor out."""
    missing = q.shape[-1] - v.shape[-1]
    if missing > 0:
        return q, k, F.pad(v, (0, missing))
    if missing < 0:
        return F.pad(q, (0, -missing)), F.pad(k, (0, -missing)), v
    return q, k, v


def _mask_part(mask: Tensor, q_heads: slice, q_rows: slice, seen: int, group: int) -> Tensor:
    """The slice of a 4-d mask, ``[B or 1, Hkv or 1, G or 1, rows or 1, seen or 1]``."""
    part = mask[..., :seen]
    if mask.shape[1] > 1:
        part = part[:, q_heads]
    if mask.shape[2] > 1:
        part = part[:, :, q_rows]
    if mask.shape[1] == 1:
        return part.unsqueeze(1)
    return part.view(part.shape[0], -1, group, *part.shape[2:])


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` with 4 dimensions as a float to be added to the scores."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -_math.inf)


def _aligned_bias(mask: Tensor, dtype: torch.dtype, m: int) -> Tensor:
    """As ``_bias``, with m keys and rows that start at multiples of 16 elements."""
    mask = mask[(None,) * (4 - mask.dim())]
    padded = mask.new_zeros((*mask.shape[:3], -(-m // 16) * 16), dtype=dtype)
    bias = padded[..., :m]
    return bias.masked_fill_(~mask, -_math.inf) if mask.dtype == torch.bool else bias.copy_(mask)


def _efficient_once(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, num_heads, n, _ = q.shape
    if bias is not None:
        bias = bias.expand(batch, num_heads, n, k.shape[2])
    out, lse = _EFFICIENT(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    # The kernel pads the rows of the LSE to a multiple of 32.
    return out, lse[..., :n]


def _clear_hidden_rows(out: Tensor, lse: Tensor, bias: Tensor) -> None:
    """Set the rows that see no key, for which the fused kernels return lse 0 or NaN."""
    hidden = torch.isneginf(bias).all(dim=-1)
    out.masked_fill_(hidden.unsqueeze(-1), 0.0)
    lse.masked_fill_(hidden, -_math.inf)
