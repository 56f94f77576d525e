"""``headinfer probe``: measure the rates of this machine, and what of it is free.

Every figure is of the work that the runtime really does: attention over one KV head's block, the
products of a decoder layer, host calls of a compiled decode step. Without a GPU the same code runs
on the CPU with smaller sizes.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from headinfer_compile.machine import (
    Machine,
    MachineProfile,
    Rates,
    device_name,
    load_profile,
    machine_with,
    save_profile,
)
from headinfer_compile.probe_host import host_seconds
from headinfer_compile.runtime.attention import AttentionRequest, kernel_table
from headinfer_compile.runtime.budget import default_host_budget, device_room

log = logging.getLogger(__name__)

_MIB = 1 << 20
_LINK_SIZES = (_MIB, 4 * _MIB, 8 * _MIB, 32 * _MIB, 128 * _MIB)
_LASTING = 0.4
"""Seconds that each rate of operations is measured for on a GPU."""
_HEADS, _DIM = 4, 128
"""Query heads that share a KV head, and their dim, as most models of 7 to 70 billion have them."""


def this_machine(*, measure: bool = True, model: PreTrainedModel | None = None) -> Machine:
    """This machine as a plan may use it.

    Args:
        measure: Measure its rates where none are kept; else they stay assumed.
        model: A live model, whose weights are counted by the plan and not as taken.
    """
    profile = load_profile()
    if profile is None and measure:
        log.warning("measuring this machine once, for up to 30 s (headinfer probe)")
        profile = probe()
        save_profile(profile)
    machine = machine_with(profile)
    if model is None or not machine.gpu_memory:
        return machine
    weights = sum(p.nbytes for p in model.parameters() if p.device.type == "cuda")
    return replace(machine, gpu_memory=machine.gpu_memory + weights)


def probe() -> MachineProfile:
    """Measure everything; takes up to 30 s and at most 3 GiB on each side."""
    start = time.perf_counter()
    device = _device()
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    gpu_free = device_room(device) if cuda else 0
    gpu_total = torch.cuda.mem_get_info(device)[1] if cuda else 0
    host_available = default_host_budget()
    with torch.inference_mode():
        h2d, d2h, duplex = _link_rates(device)
        dram, beside = _dram_rates(device)
        kernels, causal = _attention_rates(device, dtype)
        matmul = _matmul_rate(device, dtype)
        hbm = _read_rate(device, dtype) if cuda else dram
    host = host_seconds(device, dtype)
    if cuda:
        torch.cuda.empty_cache()
    rates = Rates(
        h2d=h2d,
        d2h=d2h,
        duplex=duplex,
        hbm=hbm,
        dram=dram,
        dram_beside_link=beside,
        matmul=matmul,
        attention=max(rate for _, rate in kernels),
        causal=causal,
        attention_kernels=kernels,
        call_seconds=host.call,
        layer_seconds=host.layer,
        stream_seconds=host.stream,
        block_seconds=host.block,
    )
    return MachineProfile(
        device=device_name(),
        rates=rates,
        gpu_free=gpu_free,
        gpu_total=gpu_total,
        host_available=host_available,
        measured_at=time.time(),
        seconds=time.perf_counter() - start,
        torch_version=torch.__version__,
    )


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(
    run: Callable[[], object], device: torch.device, repeats: int, calls: int, lasting: float = 0.0
) -> float:
    """Median seconds of one call over timings of ``calls`` calls each.

    There are ``repeats`` timings, and as many more as ``lasting`` seconds hold, of which the second
    half counts: under a load that goes on, the clocks of a device fall.
    """
    run()
    _synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < lasting:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[len(times) // 2 if lasting else 0 :])


Table = tuple[tuple[int, float], ...]
Named = tuple[tuple[str, float], ...]


def _link_rates(device: torch.device) -> tuple[Table, Table, float]:
    """Rates by copy size host to device and back, and of each while both run."""
    cuda = device.type == "cuda"
    largest = max(_LINK_SIZES) if cuda else 32 * _MIB
    host = [torch.zeros(largest, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    there = [torch.zeros(largest, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if cuda else [None, None]

    def copy(index: int, down: bool, nbytes: int) -> None:
        source, target = (there, host) if down else (host, there)
        with torch.cuda.stream(streams[index]):
            target[index][:nbytes].copy_(source[index][:nbytes], non_blocking=True)

    def rate(down: bool, nbytes: int) -> float:
        calls = max(2, (largest if cuda else nbytes) // nbytes)
        seconds = _seconds(lambda: copy(int(down), down, nbytes), device, 5, calls)
        return nbytes / seconds

    def both() -> None:
        copy(0, False, largest)
        copy(1, True, largest)

    wanted = [size for size in _LINK_SIZES if size <= largest]
    tables = [tuple((size, rate(down, size)) for size in wanted) for down in (False, True)]
    return tables[0], tables[1], largest / _seconds(both, device, 5, 4)


def _dram_rates(device: torch.device) -> tuple[float, float]:
    """Read rate of host memory by all cores, alone and while the link runs."""
    cuda = device.type == "cuda"
    words = torch.ones((1 << 30 if cuda else 1 << 26) // 4, dtype=torch.float32)
    cpu = torch.device("cpu")
    alone = words.nbytes / _seconds(words.sum, cpu, 5, 1)
    if not cuda:
        return alone, alone
    with _busy_link(device):
        beside = words.nbytes / _seconds(words.sum, cpu, 5, 1)
    return alone, beside


@contextmanager
def _busy_link(device: torch.device) -> Iterator[None]:
    """Keep H2D copies queued for about a second."""
    host = torch.zeros(64 * _MIB, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros_like(host, device=device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for _ in range(800):
            there.copy_(host, non_blocking=True)
    yield
    torch.cuda.synchronize(device)


def _attention_rates(device: torch.device, dtype: torch.dtype) -> tuple[Named, float]:
    """Rate of every kernel that attends one KV head's block, and the best one's on a square."""
    cuda = device.type == "cuda"
    new, past = (16384, 65536) if cuda else (128, 512)
    lasting = _LASTING if cuda else 0.0
    capability = torch.cuda.get_device_capability(device) if cuda else None
    q = torch.randn(1, _HEADS, new, _DIM, device=device, dtype=dtype)
    k, v = (torch.randn(1, 1, past, _DIM, device=device, dtype=dtype) for _ in range(2))
    scale = _DIM**-0.5
    found: dict[str, float] = {}
    squares: dict[str, float] = {}
    for kernel in kernel_table():
        request = AttentionRequest(
            device.type, capability, dtype, _HEADS, 1, _DIM, _DIM, "many", False, False, True
        )
        if kernel.name == "math" or kernel.supports(request) is not None:
            continue
        block = functools.partial(kernel.run, q, k, v, scale=scale, causal=False, mask=None)
        found[kernel.name] = 4 * _HEADS * _DIM * new * past / _seconds(block, device, 3, 4, lasting)
        own = k[:, :, :new], v[:, :, :new]
        square = functools.partial(kernel.run, q, *own, scale=scale, causal=True, mask=None)
        seconds = _seconds(square, device, 3, 4, lasting)
        squares[kernel.name] = 2 * _HEADS * _DIM * new * new / seconds
    return tuple(sorted(found.items(), key=lambda item: -item[1])), max(squares.values())


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the products of one decoder layer of an 8B model's shape."""
    cuda = device.type == "cuda"
    tokens, hidden = (16384, 4096) if cuda else (64, 512)
    widths = (hidden, hidden // 4, hidden // 4, hidden, 7 * hidden // 2, 7 * hidden // 2)
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weights = [torch.randn(n, hidden, device=device, dtype=dtype) * 0.02 for n in widths]
    down = torch.randn(hidden, widths[-1], device=device, dtype=dtype) * 0.02
    inner = torch.randn(tokens, widths[-1], device=device, dtype=dtype)

    def layer() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(inner, down)

    seconds = _seconds(layer, device, 5, 8 if cuda else 2, _LASTING if cuda else 0.0)
    return 2 * tokens * hidden * (sum(widths) + widths[-1]) / seconds


def _read_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second of weights that one token is multiplied with."""
    weights = torch.zeros(12, 14336, 4096, device=device, dtype=dtype)
    x = torch.zeros(1, 4096, device=device, dtype=dtype)

    def step() -> None:
        for weight in weights.unbind():
            torch.nn.functional.linear(x, weight)

    return weights.nbytes / _seconds(step, device, 5, 2)
