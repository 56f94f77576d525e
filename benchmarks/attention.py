"""The best attention with KV on the device, as a transformers attention function.

FlashAttention-3 where a package has it; else the kernels of ``runtime/kernels.py``, with the cached
tokens and the new ones attended apart and merged (cuDNN for both on Hopper). One query token goes
to torch's flash kernel. No mask is read: every case here is causal without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from headinfer_compile.runtime import kernels
from headinfer_compile.runtime.merge import merge_, start_

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def is_bottom_right(run: kernels.Run, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel aligns its causal flag with the last key where keys outnumber queries."""
    q, k, v = (torch.randn(1, 1, rows, 128, device=device, dtype=dtype) for rows in (128, 256, 256))
    out = run(q, k, v, scale=0.09, causal=True, mask=None)[0]
    visible = torch.ones(128, 256, dtype=torch.bool, device=device).tril(128)
    right = kernels.math(q, k, v, scale=0.09, causal=False, mask=visible)[0]
    return bool((out - right).norm() < 0.05 * right.norm())


def split_attend(run: kernels.Run, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last ``n`` of ``m`` keys' queries in two calls and a merge."""
    n, past = q.shape[2], k.shape[2] - q.shape[2]
    new = run(q, k[:, :, past:], v[:, :, past:], scale=scale, causal=True, mask=None)
    if past == 0:
        return new[0]
    old = run(q, k[:, :, :past], v[:, :, :past], scale=scale, causal=False, mask=None)
    out = q.new_empty((*q.shape[:2], n, v.shape[-1]), dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    start_(out, lse, *old)
    merge_(out, lse, *new)
    return out.to(q.dtype)


def make_attend(run: kernels.Run, device: torch.device, dtype: torch.dtype) -> Attend:
    """Causal attention by ``run``: in one call where its causal flag allows, else in two."""
    if is_bottom_right(run, device, dtype):
        return lambda q, k, v, scale: run(q, k, v, scale=scale, causal=True, mask=None)[0]
    return lambda q, k, v, scale: split_attend(run, q, k, v, scale)


def best_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str, kernels.Run]:
    """Name and function of the fastest kernel for many queries."""
    if device.type != "cuda":
        return "cpu_flash", kernels.cpu_flash
    if dtype == torch.float32:
        return "efficient", kernels.efficient
    major = torch.cuda.get_device_capability(device)[0]
    if major == 9 and kernels.fa3_function() is not None:
        return "fa3", kernels.fa3
    return ("cudnn", kernels.cudnn) if major >= 9 else ("flash", kernels.flash)


def decode_kernel(device: torch.device, dtype: torch.dtype) -> kernels.Run:
    """The kernel for one query token."""
    if device.type != "cuda":
        return kernels.cpu_flash
    return kernels.efficient if dtype == torch.float32 else kernels.flash


def resident_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, kernels.Run]:
    """Every kernel for many queries that runs here, by name."""
    if device.type != "cuda":
        return {"cpu_flash": kernels.cpu_flash, "math": kernels.math}
    if dtype == torch.float32:
        return {"efficient": kernels.efficient, "math": kernels.math}
    found: dict[str, kernels.Run] = {"flash": kernels.flash}
    major = torch.cuda.get_device_capability(device)[0]
    if major >= 9:
        found["cudnn"] = kernels.cudnn
    if major == 9 and kernels.fa3_function() is not None:
        found["fa3"] = kernels.fa3
    return found


def register_kernel(
    name: str, run: kernels.Run, device: torch.device, dtype: torch.dtype,
    one: kernels.Run | None = None,
) -> None:  # fmt: skip
    """Register attention by ``run``, of single queries by ``one``, as ``name`` of transformers."""
    many, one = make_attend(run, device, dtype), one or decode_kernel(device, dtype)

    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, scaling: float, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if query.shape[2] == 1:
            out = one(query, key, value, scale=scaling, causal=False, mask=None)[0]
        else:
            out = many(query, key, value, scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register(name, forward)


def register_best(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Register the best attention with transformers.

    Returns:
        The name to give as ``attn_implementation``, and the kernel's.
    """
    kernel, run = best_kernel(device, dtype)
    # transformers takes a name with "flash" in it for a package of its own.
    name = "benchmark_best"
    register_kernel(name, run, device, dtype)
    return name, kernel
