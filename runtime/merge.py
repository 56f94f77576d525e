"""LSE merge: joining the partial attention of two sets of keys, in place.

Legend: B batch, H heads, n queries, Dv head dim of v. With o, l and o', l' the outputs and LSEs of
two disjoint sets of keys, the LSE of their union is L = log(e^l + e^l') and its output is
e^(l - L) o + e^(l' - L) o'. A row that sees no key has o = 0 and l = -inf; it weighs nothing, and
two of them give such a row again.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class _Launch(Protocol):
    def __call__(self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None: ...


def start_(out: Tensor, lse: Tensor, first: Tensor, first_lse: Tensor) -> None:
    """Set the accumulators to the result of the first KV block.

    Args:
        out: fp32 ``[B, H, n, Dv]``, overwritten.
        lse: fp32 ``[B, H, n]``, overwritten.
        first: ``[B, H, n, Dv]`` of any float dtype.
        first_lse: fp32 ``[B, H, n]``.
    """
    out.copy_(first)
    lse.copy_(first_lse)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge another KV block's result into the accumulators, in place.

    One Triton kernel on CUDA, torch operators elsewhere. All strides are arbitrary.

    Args:
        out: fp32 ``[B, H, n, Dv]``, updated.
        lse: fp32 ``[B, H, n]``, updated.
        other: ``[B, H, n, Dv]`` of any float dtype.
        other_lse: fp32 ``[B, H, n]``.
    """
    if out.is_cuda and out.stride(-1) == 1 and other.stride(-1) == 1:
        launch = _triton_launch()
        if launch is not None:
            launch(out, lse, other, other_lse)
            return
    # Of the two, the weight of `other`; both -inf leaves NaN, which must weigh nothing.
    weight = torch.sigmoid(other_lse - lse).masked_fill_(other_lse == -math.inf, 0.0)
    out.lerp_(other.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)


def fold_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Join one more key a head, which every query sees and whose value is zero.

    Args:
        out: ``[B, H, n, Dv]`` of any float dtype.
        lse: fp32 ``[B, H, n]``.
        sinks: Scores of that key, H elements of any float dtype and shape.

    Returns:
        out in its dtype and lse, of the keys and the sinks together. What is merged to them later
        need not know of the sinks.
    """
    score = sinks.reshape(1, -1, 1).to(torch.float32)
    weight = torch.sigmoid(lse - score)
    return (out * weight.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, score)


@functools.cache
def _triton_launch() -> _Launch | None:
    try:
        module = importlib.import_module("headinfer_compile.runtime.merge_triton")
    except ImportError as error:
        log.warning("LSE merges use torch operators, two to five times slower: %s", error)
        return None
    launch: _Launch = module.launch
    return launch
