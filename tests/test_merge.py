"""The LSE merge against attention over all keys at once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer_compile.runtime.attention import AttentionRequest, select
from headinfer_compile.runtime.merge import merge_, start_

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


class CountOperators(TorchDispatchMode):
    """How many torch operators run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def parts(
    seed: int, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], hidden: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accumulators that are a slice of larger ones, and a result in [B, n, H, Dv] memory."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, n, dim = shape
    out = torch.randn(batch, 2 * heads, n + 3, dim, generator=generator)
    lse = 5 * torch.randn(batch, 2 * heads, n + 3, generator=generator)
    other = torch.randn(batch, n, heads, dim, generator=generator)
    other_lse = 5 * torch.randn(batch, n, heads, generator=generator)
    for value, weight in ((out, lse), (other, other_lse)):
        rows = torch.rand(weight.shape, generator=generator) < hidden
        rows[0, -1, -1] = hidden > 0
        weight.masked_fill_(rows, -math.inf)
        value.masked_fill_(rows.unsqueeze(-1), 0.0)
    out, lse, other_lse = (x.to(device) for x in (out, lse, other_lse))
    return (
        out[:, heads:, 3:],
        lse[:, heads:, 3:],
        other.to(device, dtype).transpose(1, 2),
        other_lse.transpose(1, 2),
    )


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    total = torch.logaddexp(lse.double(), other_lse.double())
    joined = torch.zeros_like(out, dtype=torch.float64)
    for value, weight in ((out, lse), (other, other_lse)):
        share = torch.exp(weight.double() - total).nan_to_num(0.0)
        joined += share.unsqueeze(-1) * value.double()
    return joined, total


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_merge_agrees_with_its_definition(device: str, dtype: torch.dtype) -> None:
    shapes = ((1, 8, 1, 128), (2, 3, 5, 80), (1, 4, 64, 64), (2, 2, 133, 192), (1, 1, 2, 256))
    for seed, (shape, hidden) in enumerate(itertools.product(shapes, (0.0, 0.3, 1.0))):
        message = f"seed {seed}, shape {shape}, hidden {hidden}"
        out, lse, other, other_lse = parts(seed, device, dtype, shape, hidden)
        joined, total = merged(out, lse, other, other_lse)
        kept = other.clone(), other_lse.clone()
        merge_(out, lse, other, other_lse)
        error = (out - joined).norm() / joined.norm().clamp_min(1e-30)
        assert error <= 2e-6, f"{message}: error {error}"
        assert torch.allclose(lse, total.float(), rtol=1e-6, atol=1e-6), message
        assert not out[torch.isneginf(total)].count_nonzero(), message
        assert torch.equal(other, kept[0]), message
        assert torch.equal(other_lse, kept[1]), message


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_only_the_slice_is_written(device: str) -> None:
    out = torch.zeros(2, 6, 40, 64, device=device)
    lse = torch.zeros(2, 6, 40, device=device)
    ones = torch.ones(2, 3, 7, 64, device=device)
    merge_(out[:, 1:4, 11:18], lse[:, 1:4, 11:18], ones, torch.zeros(2, 3, 7, device=device))
    assert out.count_nonzero() == ones.numel()
    assert lse.count_nonzero() == 2 * 3 * 7
    torch.testing.assert_close(out[:, 1:4, 11:18], ones / 2)
    torch.testing.assert_close(lse[:, 1:4, 11:18], torch.full_like(ones[..., 0], math.log(2)))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("far", [100.0, 1e4, 3e38])
def test_distant_lse_neither_overflow_nor_blend(device: str, far: float) -> None:
    for low, high in ((-far, far), (far, -far)):
        out = torch.full((1, 1, 1, 64), 2.0, device=device)
        other = torch.full((1, 1, 1, 64), 3.0, device=device)
        lse, other_lse = (torch.full((1, 1, 1), x, device=device) for x in (low, high))
        merge_(out, lse, other, other_lse)
        assert lse.item() == pytest.approx(far)
        torch.testing.assert_close(out, torch.full_like(out, 3.0 if high > low else 2.0))


def test_start_copies_and_casts() -> None:
    _, _, first, first_lse = parts(0, "cpu", torch.bfloat16, (2, 3, 5, 64), 0.3)
    out, lse = torch.empty(2, 3, 5, 64), torch.empty(2, 3, 5)
    start_(out, lse, first, first_lse)
    assert torch.equal(out, first.float())
    assert torch.equal(lse, first_lse)


def check_split(
    device: str, dtype: torch.dtype, seed: int, n: int, sizes: list[int], group: int, masked: bool
) -> None:
    """Attend the pieces of the keys one after the other and all of them at once."""
    generator = torch.Generator().manual_seed(seed)
    m = sum(sizes)
    q, k, v = (
        torch.randn(2, heads, rows, 64, generator=generator).to(device, dtype)
        for heads, rows in ((2 * group, n), (2, m), (2, m))
    )
    mask = torch.ones(2, 1, n, m, dtype=torch.bool)
    if masked:
        mask = torch.rand(2, 1, n, m, generator=generator) < 0.3
        mask[0, :, 0] = False
    mask = mask.to(device)
    request = AttentionRequest(
        device_type=device,
        capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        dtype=dtype,
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=64,
        v_head_dim=64,
        query="one" if n == 1 else "many",
        causal=False,
        masked=masked,
        fixed_shape=False,
    )
    kernel = select(request)
    out = torch.empty(2, 2 * group, n, 64, device=device)
    lse = torch.empty(2, 2 * group, n, device=device)
    for index, (keys, values, seen) in enumerate(
        zip(
            torch.split(k, sizes, 2),
            torch.split(v, sizes, 2),
            torch.split(mask, sizes, 3),
            strict=True,
        )
    ):
        piece = kernel.run(
            q, keys, values, scale=0.125, causal=False, mask=seen if masked else None
        )
        (merge_ if index else start_)(out, lse, *piece)

    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.double() @ wide_k.mT * 0.125).masked_fill(~mask, -math.inf)
    expected = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ wide_v
    error = (out - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], f"{kernel.name}: error {error}"
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, dim=-1), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**16),
    n=st.sampled_from((1, 2, 7)),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    group=st.sampled_from((1, 4)),
    masked=st.booleans(),
)
def test_split_keys_give_one_shot_attention(
    dtype: torch.dtype, seed: int, n: int, sizes: list[int], group: int, masked: bool
) -> None:
    check_split("cpu", dtype, seed, n, sizes, group, masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_split_keys_on_the_gpu(device: str, dtype: torch.dtype, masked: bool) -> None:
    for seed, (n, sizes) in enumerate(
        itertools.product((1, 5, 130), ([64, 64], [1, 100, 33], [256]))
    ):
        check_split(device, dtype, seed, n, sizes, 4, masked)


@pytest.mark.parametrize("device", [CUDA])
def test_one_triton_kernel_and_no_torch_operator(device: str) -> None:
    pytest.importorskip("triton")
    for seed, shape in enumerate(((1, 8, 1, 128), (1, 4, 300, 128), (2, 2, 17, 80))):
        arguments = parts(seed, device, torch.bfloat16, shape, 0.1)
        with CountOperators() as operators:
            merge_(*arguments)
        assert operators.count == 0, f"shape {shape}"


@pytest.mark.parametrize("device", [CUDA])
def test_merges_of_a_row_do_not_race(device: str) -> None:
    """Every warp must see the old LSE; many rows and repeats give a race the chance to show."""
    out, lse, other, other_lse = parts(1, device, torch.bfloat16, (1, 8, 4096, 128), 0.1)
    start, start_lse = out.clone(), lse.clone()
    joined, total = merged(out, lse, other, other_lse)
    for repeat in range(20):
        out.copy_(start)
        lse.copy_(start_lse)
        merge_(out, lse, other, other_lse)
        torch.testing.assert_close(out.double(), joined, rtol=1e-4, atol=1e-5)
        assert torch.allclose(lse, total.float(), rtol=1e-5, atol=1e-5), f"repeat {repeat}"
