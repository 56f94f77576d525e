"""The registry of attention kernels: what each supports, what it costs, and the choice.

A KV block is attended by one kernel, which returns the output and its LSE, and the blocks are
joined by ``merge.py``. The table below is ordered by nothing: ``select`` takes the cheapest kernel
that supports the request. Names of shapes are those of ``kernels.py``.

| kernel | runs on | GQA | mask | soft cap | note |
|---|---|---|---|---|---|
| fa3 | Hopper, package | yes | no | no | as fast as cudnn, no plan a shape; slow for one query |
| cudnn | compute capability 9, 10 | yes | no | no | 34 to 67 ms a new shape: fixed shapes only |
| flash_attn | CUDA >= 8.0, package | yes | no | yes | |
| flash | CUDA >= 8.0 | yes | no | no | best for one query |
| efficient | CUDA | by views | yes | no | fp32 too |
| cpu_flash | CPU | yes | yes | no | |
| math | anywhere | yes | yes | yes | reference |

Sinks need no kernel: they are joined by their LSE (``merge.fold_sinks``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch

from headinfer_compile.errors import HeadInferError
from headinfer_compile.runtime import kernels

_HALF = (torch.bfloat16, torch.float16)

# torch itself prefers cuDNN from the release after 9.15.0 on: before it, lengths that are no
# multiple of 128 could give wrong results.
_CUDNN_OLDEST = 91501


@dataclass(frozen=True)
class AttentionRequest:
    """What is known of an attention before it runs; hashable, so that a choice can be cached."""

    device_type: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None off CUDA."""
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    query: Literal["one", "many"]
    """Exactly one query token, or more."""
    causal: bool
    """Square and top-left: n == m."""
    masked: bool
    """An explicit mask tensor is given."""
    fixed_shape: bool
    """This block shape repeats often enough to pay for a costly first call."""
    soft_cap: bool = False
    """The scores go through a soft cap."""


@dataclass(frozen=True)
class Kernel:
    """One way to attend a block."""

    name: str
    supports: Callable[[AttentionRequest], str | None]
    """None if the kernel serves the request, else the reason why not."""
    run: kernels.Run
    cost: Callable[[AttentionRequest], float]
    """Time relative to the best CUDA kernel for that kind of query; lower is preferred."""
    workspace: Callable[[AttentionRequest, int, int, int], int]
    """Temporary bytes for (request, n, m, batch), an upper estimate."""


@functools.cache
def kernel_table() -> tuple[Kernel, ...]:
    """All kernels.

    The costs are times measured on an H100 in bf16 with D = 128; those marked (*) are guesses.
    """
    return (
        Kernel("fa3", _fa3_reason, kernels.fa3, _cost(4.4, 0.98), _no_workspace),
        Kernel("cudnn", _cudnn_reason, kernels.cudnn, _cost(1.0, 1.0), _no_workspace),
        # (*) The kernel of flash in a newer build; its call costs the host more.
        Kernel(
            "flash_attn", _flash_attn_reason, kernels.flash_attn, _cost(1.2, 1.85), _split_bytes
        ),
        Kernel("flash", _flash_reason, kernels.flash, _cost(1.0, 1.9), _flash_bytes),
        # (*) One query is not split over the keys.
        Kernel(
            "efficient", _efficient_reason, kernels.efficient, _cost(8.0, 4.0), _efficient_bytes
        ),
        Kernel(
            "cpu_flash", _cpu_flash_reason, kernels.cpu_flash, _cost(1.0, 1.0), _cpu_flash_bytes
        ),
        # (*)
        Kernel("math", _math_reason, kernels.math, _cost(20.0, 30.0), _math_bytes),
    )


def select(request: AttentionRequest) -> Kernel:
    """The cheapest kernel that supports ``request``, the same one for equal requests.

    Raises:
        HeadInferError: No kernel supports it; the message gives each kernel's reason.
    """
    reasons = {kernel.name: kernel.supports(request) for kernel in kernel_table()}
    usable = [kernel for kernel in kernel_table() if reasons[kernel.name] is None]
    if not usable:
        lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise HeadInferError(f"no attention kernel serves {request}: {lines}")
    return min(usable, key=lambda kernel: kernel.cost(request))


def workspace_bytes(name: str, request: AttentionRequest, n: int, m: int, *, batch: int = 1) -> int:
    """Temporary bytes of the kernel called ``name``, besides out and lse; an upper estimate.

    Args:
        name: A kernel of ``kernel_table()``.
        request: What it is asked to do.
        n: Query tokens.
        m: Keys of the block.
        batch: Rows of the batch.
    """
    (kernel,) = (kernel for kernel in kernel_table() if kernel.name == name)
    return kernel.workspace(request, n, m, batch)


def _cost(one: float, many: float) -> Callable[[AttentionRequest], float]:
    return lambda request: one if request.query == "one" else many


def _limits(
    request: AttentionRequest,
    dtypes: Collection[torch.dtype],
    *,
    device_type: str = "cuda",
    masks: bool = False,
    soft_caps: bool = False,
    oldest: tuple[int, int] = (8, 0),
) -> str | None:
    """The reasons that several kernels share."""
    if request.device_type != device_type:
        return f"runs on {device_type}, not on {request.device_type}"
    if device_type == "cuda" and (request.capability is None or request.capability < oldest):
        return f"needs compute capability {oldest}, found {request.capability}"
    if request.dtype not in dtypes:
        return f"does not take {request.dtype}"
    if request.masked and not masks:
        return "takes no mask"
    if request.masked and request.causal:
        return "takes a mask or causal, not both"
    if request.soft_cap and not soft_caps:
        return "has no soft cap"
    return None


def _head_dims(request: AttentionRequest, largest: int, *, equal: bool) -> str | None:
    dims = (request.head_dim, request.v_head_dim)
    if max(dims) > largest or any(dim % 8 for dim in dims):
        return f"needs head dims that are multiples of 8 up to {largest}, found {dims}"
    if equal and dims[0] != dims[1]:
        return f"needs one head dim for q, k and v, found {dims}"
    return None


def _math_reason(request: AttentionRequest) -> str | None:
    if not request.dtype.is_floating_point:
        return f"does not take {request.dtype}"
    return None


def _cpu_flash_reason(request: AttentionRequest) -> str | None:
    dtypes = (*_HALF, torch.float32, torch.float64)
    return _limits(request, dtypes, device_type="cpu", masks=True)


def _flash_reason(request: AttentionRequest) -> str | None:
    if torch.version.cuda and not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without it"
    return _limits(request, _HALF) or _head_dims(request, 256, equal=False)


def _flash_attn_reason(request: AttentionRequest) -> str | None:
    reason = _limits(request, _HALF, soft_caps=True) or _head_dims(request, 256, equal=True)
    if reason is None and kernels.flash_attn_function() is None:
        return "the package flash-attn cannot be imported"
    return reason


def _fa3_reason(request: AttentionRequest) -> str | None:
    # Builds without fp16 exist, and only a call would tell: bf16 is what all of them have.
    bf16 = (torch.bfloat16,)
    reason = _limits(request, bf16, oldest=(9, 0)) or _head_dims(request, 256, equal=True)
    if reason is None and request.capability is not None and request.capability[0] != 9:
        return f"is built for compute capability 9, found {request.capability}"
    if reason is None and kernels.fa3_function() is None:
        return "neither flash_attn_interface nor fa3_fwd_interface can be imported"
    return reason


def _cudnn_reason(request: AttentionRequest) -> str | None:
    reason = _limits(request, _HALF, oldest=(9, 0))
    if reason is not None:
        return reason
    if request.query == "one" or not request.fixed_shape:
        return "builds a plan for each new shape: only for fixed shapes of several queries"
    if request.capability is not None and request.capability[0] > 10:
        return f"is preferred on compute capability 9 and 10 only, found {request.capability}"
    version = torch.backends.cudnn.version()
    if version is not None and version < _CUDNN_OLDEST:
        return f"needs cuDNN {_CUDNN_OLDEST}, found {version}"
    if (request.head_dim, request.v_head_dim) == (192, 128):
        return None
    return _head_dims(request, 128, equal=False)


def _efficient_reason(request: AttentionRequest) -> str | None:
    modern = request.capability is not None and request.capability >= (8, 0)
    dtypes = (torch.float16, torch.float32, *((torch.bfloat16,) if modern else ()))
    reason = _limits(request, dtypes, masks=True, oldest=(5, 0))
    multiple = 16 // request.dtype.itemsize
    if reason is None and (request.head_dim % multiple or request.v_head_dim % multiple):
        dims = (request.head_dim, request.v_head_dim)
        return f"needs head dims that are multiples of {multiple}, found {dims}"
    return reason


def _no_workspace(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    return 0


def _math_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    item = torch.promote_types(request.dtype, torch.float32).itemsize
    group = request.num_heads // request.num_kv_heads
    heads, rows = kernels.math_chunk(batch * group * m * item, request.num_kv_heads, n)
    dims = request.head_dim + request.v_head_dim
    # The scores and two masks of theirs in bool; q scaled and out before the cast; k and v cast
    # and, for the batched product, made contiguous. The last two of the piece before live on
    # until they are bound anew (an H200 took 73.4 MB where 62.9 MB were counted without them).
    scores = batch * heads * group * rows * m * (item + 2)
    queries = 2 * batch * heads * group * rows * dims * item
    keys_values = 2 * batch * heads * m * dims * item
    return scores + 2 * (queries + keys_values)


def _padding_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    """Copies of what is padded where D and Dv differ, and the output before its slice."""
    wide = max(request.head_dim, request.v_head_dim)
    if request.head_dim == request.v_head_dim:
        return 0
    tokens = batch * (request.num_heads * n + request.num_kv_heads * m)
    return tokens * wide * request.dtype.itemsize


def _split_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    """fp32 partial results when the keys are split to fill the device."""
    group = request.num_heads // request.num_kv_heads if n == 1 else 1
    blocks = batch * request.num_heads // group * -(-n * group // 64)
    # The kernel splits until the multiprocessors are busy: fewer than 1280 blocks on up to 160.
    splits = min(128, -(-m // 64), 1280 // blocks)
    wide = -(-max(request.head_dim, request.v_head_dim) // 64) * 64
    return splits * batch * request.num_heads * n * (wide + 1) * 4 if splits > 1 else 0


def _flash_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    return _split_bytes(request, n, m, batch) + _padding_bytes(request, n, m, batch)


def _cpu_flash_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    item = torch.promote_types(request.dtype, torch.float32).itemsize
    bias = 2 * batch * request.num_heads * n * m * item if request.masked else 0
    # Each thread holds one tile of scores, 256 x 512 at the most, and its output.
    tiles = torch.get_num_threads() * 256 * (512 + request.head_dim) * item
    return bias + tiles + _padding_bytes(request, n, m, batch)


def _efficient_bytes(request: AttentionRequest, n: int, m: int, batch: int) -> int:
    out = batch * request.num_heads * n * request.v_head_dim
    accumulator = out * 4 if request.v_head_dim > 128 and request.dtype in _HALF else 0
    joined = out * request.dtype.itemsize + batch * request.num_heads * (n + 31) * 4
    bias = batch * request.num_heads * n * (m + 15) * request.dtype.itemsize
    # The bias, and its boolean inverse or the map of its hidden keys.
    masks = bias + bias // request.dtype.itemsize if request.masked else 0
    return accumulator + joined + masks
