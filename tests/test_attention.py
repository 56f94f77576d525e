"""Each attention kernel against float64, and the choice between kernels."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer_compile.errors import HeadInferError
from headinfer_compile.runtime import kernels
from headinfer_compile.runtime.attention import (
    AttentionRequest,
    Kernel,
    kernel_table,
    select,
    workspace_bytes,
)

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LSE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 2e-3}

HEADS = ((4, 4), (8, 2), (8, 1))
DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (64, 128))
SHAPES = ((1, 1, True), (1, 37, False), (5, 64, False), (64, 64, True), (64, 131, False))
MASKS = (None, "bool", "padding", "float", "per head", "2-d")

OPERATORS = {
    "cpu_flash": "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash": "aten._scaled_dot_product_flash_attention.default",
    "cudnn": "aten._scaled_dot_product_cudnn_attention.default",
    "efficient": "aten._scaled_dot_product_efficient_attention.default",
    "flash_attn": "flash_attn",
    "fa3": "fa3_fwd",
    "math": "aten.bmm.default",
}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    n: int
    m: int
    causal: bool
    mask: str | None
    seed: int

    def request(self, device: str, dtype: torch.dtype) -> AttentionRequest:
        return AttentionRequest(
            device_type=device,
            capability=torch.cuda.get_device_capability() if device == "cuda" else None,
            dtype=dtype,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.dims[0],
            v_head_dim=self.dims[1],
            query="one" if self.n == 1 else "many",
            causal=self.causal,
            masked=self.mask is not None,
            fixed_shape=True,
        )

    def inputs(
        self, device: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q in [B, n, H, D] memory and some of its heads; k and v rows of a longer slot."""
        generator = torch.Generator().manual_seed(self.seed)
        (num_heads, num_kv_heads), (dim, v_dim) = self.heads, self.dims

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        q = draw(self.batch, self.n, 2 * num_heads, dim).transpose(1, 2)[:, num_heads:]
        if dim == v_dim:
            slot = draw(num_kv_heads, 2, self.batch, self.m + 3, dim)
            k, v = (slot[:, i].transpose(0, 1)[:, :, : self.m] for i in range(2))
        else:
            k = draw(num_kv_heads, self.batch, self.m + 3, dim).transpose(0, 1)[:, :, : self.m]
            v = draw(num_kv_heads, self.batch, self.m + 3, v_dim).transpose(0, 1)[:, :, : self.m]
        if self.mask is None:
            return q, k, v, None
        shape = {
            "bool": (self.batch, 1, self.n, self.m),
            "padding": (self.batch, 1, 1, self.m),
            "float": (self.batch, 1, self.n, self.m),
            "per head": (1, num_heads, self.n, self.m),
            "2-d": (self.n, self.m),
        }[self.mask]
        visible = torch.rand(shape, generator=generator) < 0.6
        visible.view(-1, self.m)[0] = False
        if self.n > 1 and self.mask != "padding":
            visible[..., 1, : self.m // 2] = False
        if self.mask not in ("float", "per head"):
            return q, k, v, visible.to(device)
        bias = torch.randn(shape, generator=generator).masked_fill_(~visible, -math.inf)
        return q, k, v, bias.to(device, dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        seen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if seen else scores + mask.double()
    weights = torch.softmax(scores, dim=-1)
    return weights.nan_to_num(0.0) @ v, torch.logsumexp(scores, dim=-1)


class RecordOperators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def cases() -> Iterator[Case]:
    """One in seven of all combinations; 7 divides no list's length, so all values meet."""
    combinations = itertools.product(HEADS, DIMS, SHAPES, MASKS)
    for seed, (heads, dims, (n, m, causal), mask) in enumerate(combinations):
        if seed % 7 == 0:
            yield Case(2, heads, dims, n, m, causal, mask, seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kernel_named(name: str) -> Kernel:
    (kernel,) = (kernel for kernel in kernel_table() if kernel.name == name)
    return kernel


def mistakes(kernel: Kernel, case: Case, device: str, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernel's answer to the case, or None."""
    q, k, v, mask = case.inputs(device, dtype)
    scale = 0.3 * case.dims[0] ** -0.5
    before = [x.clone() for x in (q, k, v)]
    with RecordOperators() as operators:
        out, lse = kernel.run(q, k, v, scale=scale, causal=case.causal, mask=mask)
    expected, expected_lse = reference(q, k, v, scale, case.causal, mask)
    if OPERATORS[kernel.name] not in " ".join(operators.names):
        return f"another kernel ran: {operators.names}"
    if kernel.name == "math" and any("attention" in name for name in operators.names):
        return f"a fused kernel ran: {operators.names}"
    if (out.dtype, lse.dtype) != (dtype, torch.float32):
        return f"dtypes {out.dtype}, {lse.dtype}"
    if (out.shape, lse.shape) != (expected.shape, expected_lse.shape):
        return f"shapes {tuple(out.shape)}, {tuple(lse.shape)}"
    if not all(map(torch.equal, before, (q, k, v))):
        return "an input was changed"
    hidden = torch.isneginf(expected_lse)
    if not torch.equal(hidden, torch.isneginf(lse)) or out[hidden].count_nonzero():
        return "hidden rows are not 0 and -inf"
    error = ((out - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    lse_error = (lse - expected_lse)[~hidden].abs().max().item() if not hidden.all() else 0.0
    if not error <= OUT_TOLERANCE[dtype] or not lse_error <= LSE_TOLERANCE[dtype]:
        return f"error {error:.2e}, lse error {lse_error:.2e}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [kernel.name for kernel in kernel_table()])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_kernel_agrees_with_float64(device: str, name: str, dtype: torch.dtype) -> None:
    kernel = kernel_named(name)
    ran, wrong = 0, []
    for case in cases():
        if kernel.supports(case.request(device, dtype)) is None:
            ran += 1
            mistake = mistakes(kernel, case, device, dtype)
            if mistake is not None:
                wrong.append(f"{case}: {mistake}")
    assert not wrong, f"{len(wrong)} of {ran} cases:\n" + "\n".join(wrong[:20])
    if ran == 0:
        case = Case(2, (8, 2), (128, 128), 64, 64, False, None, 0)
        pytest.skip(
            f"not for this device and dtype: {kernel.supports(case.request(device, dtype))}"
        )


def test_the_cpu_kernels_run_here() -> None:
    for case, dtype in itertools.product(cases(), DTYPES):
        request = case.request("cpu", dtype)
        both = case.mask is not None and case.causal
        assert select(request).name == ("math" if both else "cpu_flash"), request


@pytest.mark.parametrize("name", ["math", "cpu_flash"])
def test_float64_is_computed_in_float64(name: str) -> None:
    case = Case(1, (4, 2), (64, 64), 5, 33, False, "float", 7)
    q, k, v, mask = case.inputs("cpu", torch.float64)
    out, lse = kernel_named(name).run(q, k, v, scale=0.1, causal=False, mask=mask)
    expected, expected_lse = reference(q, k, v, 0.1, False, mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["math", "cpu_flash"])
def test_an_fp32_mask_is_not_rounded_to_half_queries(name: str) -> None:
    case = Case(2, (4, 2), (64, 64), 5, 33, False, None, 8)
    q, k, v, _ = case.inputs("cpu", torch.bfloat16)
    mask = 200 + torch.randn(5, 33, generator=torch.Generator().manual_seed(8))
    _, lse = kernel_named(name).run(q, k, v, scale=0.1, causal=False, mask=mask)
    # bf16 would move 200 by up to 0.5.
    torch.testing.assert_close(
        lse.double(), reference(q, k, v, 0.1, False, mask)[1], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bound", [6000, 60_000, 10**6])
def test_math_in_pieces_agrees_with_float64(
    monkeypatch: pytest.MonkeyPatch, bound: int, causal: bool
) -> None:
    monkeypatch.setattr(kernels, "MATH_SCORES_BYTES", bound)
    for mask in (None, "bool", "per head"):
        case = Case(2, (8, 4), (64, 64), 40, 40, causal, mask, bound)
        mistake = mistakes(kernel_named("math"), case, "cpu", torch.float32)
        assert mistake is None, f"{case}: {mistake}"


HOPPER = AttentionRequest(
    device_type="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    v_head_dim=128,
    query="many",
    causal=False,
    masked=False,
    fixed_shape=True,
)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash_attn_function", lambda: None)
    monkeypatch.setattr(kernels, "fa3_function", lambda: None)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"causal": True}, "cudnn"),
        ({"head_dim": 192}, "cudnn"),
        ({"head_dim": 80, "v_head_dim": 80, "dtype": torch.float16}, "cudnn"),
        ({"fixed_shape": False}, "flash"),
        ({"query": "one"}, "flash"),
        ({"capability": (8, 0)}, "flash"),
        ({"capability": (12, 0)}, "flash"),
        ({"head_dim": 256, "v_head_dim": 256}, "flash"),
        ({"head_dim": 100, "v_head_dim": 100}, "math"),
        ({"masked": True}, "efficient"),
        ({"masked": True, "query": "one"}, "efficient"),
        ({"masked": True, "causal": True}, "math"),
        ({"dtype": torch.float32}, "efficient"),
        ({"dtype": torch.float32, "head_dim": 100, "v_head_dim": 100}, "efficient"),
        ({"dtype": torch.float64}, "math"),
        ({"head_dim": 512, "v_head_dim": 512}, "efficient"),
        ({"capability": (7, 5)}, "math"),
        ({"capability": (7, 5), "dtype": torch.float16}, "efficient"),
        ({"capability": None}, "math"),
        ({"device_type": "xpu", "capability": None}, "math"),
    ],
)
def test_select(changes: dict[str, Any], expected: str) -> None:
    request = dataclasses.replace(HOPPER, **changes)
    assert select(request).name == expected
    assert select(request) is select(dataclasses.replace(request))


def test_packages_are_preferred_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fa3_function", lambda: print)
    monkeypatch.setattr(kernels, "flash_attn_function", lambda: print)
    assert select(HOPPER).name == "fa3"
    assert select(dataclasses.replace(HOPPER, query="one")).name == "flash"
    assert select(dataclasses.replace(HOPPER, capability=(8, 0))).name == "flash_attn"
    assert select(dataclasses.replace(HOPPER, head_dim=192)).name == "cudnn"


@pytest.mark.usefixtures("no_packages")
def test_kernels_say_why_not() -> None:
    request = dataclasses.replace(HOPPER, masked=True, fixed_shape=False, dtype=torch.float64)
    reasons = {kernel.name: kernel.supports(request) for kernel in kernel_table()}
    assert reasons.pop("math") is None
    assert reasons.pop("cpu_flash") == "runs on cpu, not on cuda"
    assert reasons == dict.fromkeys(reasons, "does not take torch.float64")
    one = dataclasses.replace(HOPPER, query="one")
    assert "only for fixed shapes" in str(kernel_named("cudnn").supports(one))
    assert "can be imported" in str(kernel_named("fa3").supports(one))
    assert "cannot be imported" in str(kernel_named("flash_attn").supports(one))
    masked = dataclasses.replace(HOPPER, masked=True)
    assert kernel_named("flash").supports(masked) == "takes no mask"


def test_select_lists_every_reason() -> None:
    with pytest.raises(HeadInferError) as caught:
        select(dataclasses.replace(HOPPER, dtype=torch.int64))
    for kernel in kernel_table():
        assert f"{kernel.name}: " in str(caught.value)
    assert "torch.int64" in str(caught.value)


def test_the_workspace_of_math_does_not_grow_with_the_queries() -> None:
    small, large = (workspace_bytes("math", HOPPER, n, 8192) for n in (1024, 65536))
    assert small == large < 3 * kernels.MATH_SCORES_BYTES


def test_a_mask_adds_to_the_workspace_of_efficient() -> None:
    plain, masked = (
        workspace_bytes("efficient", dataclasses.replace(HOPPER, masked=flag), 512, 2048)
        for flag in (False, True)
    )
    assert masked - plain >= 32 * 512 * 2048 * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("n", [1, 2048])
@pytest.mark.parametrize("name", [kernel.name for kernel in kernel_table()])
@pytest.mark.parametrize("device", [CUDA])
def test_workspace_is_not_underestimated(
    device: str, name: str, n: int, mask: str | None, causal: bool
) -> None:
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    case = Case(1, (8, 2), (128, 128), n, n if causal else 4096, causal, mask, 3)
    kernel, request = kernel_named(name), case.request(device, dtype)
    reason = kernel.supports(request)
    if reason is not None:
        pytest.skip(reason)
    q, k, v, mask_tensor = case.inputs(device, dtype)
    # The first call may load a kernel or allocate a workspace that stays.
    kernel.run(q, k, v, scale=0.1, causal=causal, mask=mask_tensor)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = kernel.run(q, k, v, scale=0.1, causal=causal, mask=mask_tensor)
    used = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert used <= workspace_bytes(name, request, case.n, case.m) + 2**16
