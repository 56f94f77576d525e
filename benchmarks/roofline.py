"""The rates of this machine: link, device and host memory, attention and matrix products.

Every case measures them in its own process and keeps them beside its figures, since machines of one
kind differ. Run alone it writes them as a row of their own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.attention import best_kernel
from benchmarks.common import (
    Row,
    parser,
    prepare,
    provenance,
    say,
    summary,
    synchronize,
    write_rows,
)
from benchmarks.models import SHAPES, Shape, build, shape_of


@dataclass(frozen=True)
class Roofline:
    """Measured rates; bytes are 1e9, operations 1e12 a second; 0 where there is no such unit."""

    h2d_gb_s: float
    d2h_gb_s: float
    duplex_gb_s: float
    """Each direction with both running."""
    hbm_gb_s: float
    """Device copy, bytes read and written."""
    dram_gb_s: float
    """Host copy, bytes read and written."""
    attention_tflop_s: float
    matmul_tflop_s: float
    attention_kernel: str

    def prefill_seconds(self, shape: Shape, tokens: int, chunk: int) -> float:
        """Time of the operations of a causal prefill alone."""
        matrices, attention = shape.prefill_flops(tokens, chunk)
        return matrices / self.matmul_tflop_s / 1e12 + attention / self.attention_tflop_s / 1e12

    def decode_seconds(self, shape: Shape, resident: int, streamed: int) -> float:
        """Time of the bytes of one decode step alone; the link runs beside device memory."""
        device = (shape.weight_bytes + resident) / (self.hbm_gb_s or self.dram_gb_s) / 1e9
        return max(device, streamed / self.h2d_gb_s / 1e9) if self.h2d_gb_s else device

    def as_row(self) -> dict[str, float | str]:
        """For a JSON row."""
        return {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def _seconds(run: Callable[[], object], device: torch.device, repeats: int, calls: int) -> float:
    """Median seconds of one call over ``repeats`` timings of ``calls`` calls each."""
    run()
    synchronize(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return float(summary(times, 12)["median"])


def _link(device: torch.device, nbytes: int) -> tuple[float, float, float]:
    host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    gpu = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def h2d() -> None:
        with torch.cuda.stream(up):
            gpu[0].copy_(host[0], non_blocking=True)

    def d2h() -> None:
        with torch.cuda.stream(down):
            host[1].copy_(gpu[1], non_blocking=True)

    def both() -> None:
        h2d()
        d2h()

    rates = [nbytes / _seconds(run, device, 7, 4) / 1e9 for run in (h2d, d2h, both)]
    return rates[0], rates[1], rates[2]


def _attention(
    device: torch.device, shape: Shape, dtype: torch.dtype, chunk: int
) -> tuple[str, float]:
    """Name and rate of the best kernel, ``chunk`` queries over four times as many keys."""
    cuda = device.type == "cuda"
    n = chunk if cuda else min(chunk, 128)
    name, run = best_kernel(device, dtype)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    q = torch.randn((1, shape.heads, n, shape.head_dim), **options)
    k, v = (torch.randn((1, shape.kv_heads, 4 * n, shape.head_dim), **options) for _ in range(2))
    scale = shape.head_dim**-0.5
    seconds = _seconds(
        lambda: run(q, k, v, scale=scale, causal=False, mask=None), device, 5, 4 if cuda else 1
    )
    return name, 4 * shape.heads * shape.head_dim * n * 4 * n / seconds / 1e12


def _matmul(device: torch.device, shape: Shape, dtype: torch.dtype, chunk: int) -> float:
    """Rate of the product of ``chunk`` tokens with one matrix of the MLP."""
    n = chunk if device.type == "cuda" else min(chunk, 128)
    x = torch.randn((n, shape.hidden), device=device, dtype=dtype)
    w = torch.randn((shape.intermediate, shape.hidden), device=device, dtype=dtype)
    seconds = _seconds(lambda: x @ w.T, device, 5, 8)
    return 2 * n * shape.hidden * shape.intermediate / seconds / 1e12


def measure(device: torch.device, shape: Shape, dtype: torch.dtype, chunk: int = 16384) -> Roofline:
    """Measure all rates in a few seconds.

    Args:
        device: A CUDA device or the CPU.
        shape: The model, whose heads and widths the two products take.
        dtype: Of operands.
        chunk: Query tokens.
    """
    cuda = device.type == "cuda"
    link = _link(device, 256 << 20) if cuda else (0.0, 0.0, 0.0)
    host = torch.ones((1 << 30) if cuda else (1 << 26), dtype=torch.uint8)
    other = torch.empty_like(host)
    dram = 2 * host.nbytes / _seconds(lambda: other.copy_(host), torch.device("cpu"), 5, 1) / 1e9
    hbm = 0.0
    if cuda:
        source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        hbm = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, 7, 8) / 1e9
        del source, target
    name, attention = _attention(device, shape, dtype, chunk)
    matmul = _matmul(device, shape, dtype, chunk)
    if cuda:
        torch.cuda.empty_cache()
    return Roofline(*link, hbm, dram, attention, matmul, name)


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure and print; returns the row that was written."""
    cli = parser("roofline", "The rates of this machine.")
    args: argparse.Namespace = cli.parse_args(argv)
    setup = prepare(args)
    model = build(args.model if args.model in SHAPES else "tiny", setup.device, layers=1)
    found = measure(setup.device, shape_of(model), model.dtype)
    row = {
        "id": f"roofline/{setup.tag}",
        "roofline": found.as_row(),
        **provenance(setup.device, args.note),
    }
    write_rows(args.out, [row])
    say("%s", found)
    return [row]


if __name__ == "__main__":
    main()
