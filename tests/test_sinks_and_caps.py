"""Sinks joined by their LSE, and soft caps: equal to a softmax that is written out."""

from __future__ import annotations

import math

import pytest
import torch

from headinfer_compile.runtime import kernels
from headinfer_compile.runtime.attention import AttentionRequest, kernel_table, select
from headinfer_compile.runtime.merge import fold_sinks, merge_


@pytest.mark.parametrize("cap", [None, 0.7, 30.0])
def test_sinks_and_soft_cap_equal_a_written_softmax(seed: int, cap: float | None) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 6)
    sinks = torch.randn(4)
    hidden = torch.rand(2, 1, 5, 37) < 0.3
    hidden[0, 0, 3, :20] = True
    scores = q @ k.repeat_interleave(2, 1).mT * 0.9
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    column = sinks[None, :, None, None].expand(2, 4, 5, 1)
    logits = torch.cat([scores.masked_fill(hidden, -math.inf), column], -1)
    want = logits.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    # In two blocks; the first hides one row altogether.
    parts = [
        kernels.math(
            q, k[:, :, part], v[:, :, part], scale=0.9, causal=False, mask=~hidden[..., part],
            soft_cap=cap,
        )
        for part in (slice(0, 20), slice(20, 37))
    ]  # fmt: skip
    out, lse = fold_sinks(*parts[0], sinks)
    merge_(out, lse, *parts[1])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_only_kernels_with_a_soft_cap_are_chosen() -> None:
    request = AttentionRequest(
        "cuda", (9, 0), torch.bfloat16, 8, 2, 128, 128, "many", False, False, True, soft_cap=True
    )
    reasons = {kernel.name: kernel.supports(request) for kernel in kernel_table()}
    for name in ("fa3", "cudnn", "flash", "efficient"):
        assert reasons[name] is not None
    assert reasons["math"] is None
    assert select(request).name in ("math", "flash_attn")
