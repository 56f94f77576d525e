"""Holds conversations on small caches, under a disturbance, and prints a digest of their logits.

A process of its own, since what disturbs is set by the environment of a process (launch blocking,
no caching allocator) or must not disturb other tests. ``test_gpu_stress.py`` compares the digests;
``sanitize.py`` runs the short form under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import CompiledModel, random_ids, tiny_llama
from headinfer_compile import HeadInferCache
from headinfer_compile.runtime.streams import Event, Streams

PAGE_TOKENS = 32
#: Options of the backend and resident pages, by name.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "two slots": ({"num_slots": 2}, 0),
    "some resident": ({"num_slots": 3, "head_group": 1}, 1),
    "with the CPU": ({"num_slots": 2, "cpu_attention": 0.5}, 0),
}
#: New tokens of each call; negative: tokens to crop.
CONVERSATION = (150, 150, 100, *[1] * 20, -30, 40, *[1] * 20)
SHORT = (24, 24, *[1] * 16)

_SLEEP_CYCLES = (20_000, 600_000)


class SlowStreams(Streams):
    """Copies wait for a spinning kernel on their stream, and compute now and then for one too."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)
        self.sleeps = 0

    def on(self, role: str) -> AbstractContextManager[object]:
        """Spin on the stream of ``role`` ahead of what is queued there next."""
        stream = super().on(role)
        with stream:
            self._sleep()
        return stream

    def wait(self, event: Event, role: str) -> None:
        """Wait, and spin on one in eight of the waits of compute."""
        if role == "compute" and self._random.random() < 0.125:
            self._sleep()
        super().wait(event, role)

    def _sleep(self) -> None:
        self.sleeps += 1
        if self.is_cuda:
            torch.cuda._sleep(self._random.randint(*_SLEEP_CYCLES))


class OtherWork:
    """Kernels and copies of somebody else, on streams of their own, around each call."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(3)]
        self._matrix = torch.randn(1024, 1024, device=device)
        self._host = torch.empty(4 << 20, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(4 << 20, dtype=torch.uint8, device=device)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Queue some of it before a call and some after."""
        self._queue()
        yield
        self._queue()

    def _queue(self) -> None:
        compute, down, up = self._streams
        with torch.cuda.stream(compute):
            for _ in range(4):
                # Its temporaries come and go in the allocator.
                torch.mm(torch.mm(self._matrix, self._matrix), self._matrix)
        with torch.cuda.stream(down):
            self._host.copy_(self._device, non_blocking=True)
        with torch.cuda.stream(up):
            self._device.copy_(self._host, non_blocking=True)


def converse(
    model: CompiledModel, device: torch.device, calls: tuple[int, ...], case: str, disturb: str,
    seed: int,
) -> str:  # fmt: skip
    """A digest of all logits of one conversation."""
    options, resident = CASES[case]
    model.use(**options)
    ids, at, digest = random_ids(seed, 512).to(device), 0, hashlib.sha256()
    sizes = {
        "page_tokens": PAGE_TOKENS,
        "tail_tokens": 8,
        "gpu_budget": resident * PAGE_TOKENS * model.token_bytes,
    }
    with model.cache(**sizes) as cache, torch.no_grad():
        if disturb == "slow":
            cache.session.make_streams = partial(SlowStreams, seed=seed)
        elif disturb == "busy":
            cache.session.around_call = OtherWork(device).around
        logits: list[Tensor] = []
        for count in calls:
            if count < 0:
                cache.crop(count)
                continue
            logits.append(_call(model, cache, ids[:, at : at + count]))
            at += count
        for part in logits:
            digest.update(part.cpu().numpy().tobytes())
        stats = model.assert_streamed(cache)
        assert stats.resident_bytes == sizes["gpu_budget"]
        assert (stats.cpu_bytes > 0) == ("cpu_attention" in options)
        if isinstance(cache.session.streams, SlowStreams):
            assert cache.session.streams.sleeps > len(calls)
    return digest.hexdigest()


def _call(model: CompiledModel, cache: HeadInferCache, ids: Tensor) -> Tensor:
    past = cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    out = model.model(input_ids=ids, position_ids=positions, past_key_values=cache)
    logits: Tensor = out.logits
    return logits


def main() -> None:
    """Print ``{"seconds": s, "digests": {"<case>, seed <seed>": "..."}}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--disturb", choices=["none", "slow", "busy"], default="none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--short", action="store_true", help="two layers and 64 tokens")
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device(args.device)
    layers = 2 if args.short else 3
    model = CompiledModel(tiny_llama(0, layers=layers, heads=8, kv_heads=2, head_dim=64))
    model.model.to(device)
    digests = {
        f"{case}, seed {seed}": converse(
            model, device, SHORT if args.short else CONVERSATION, case, args.disturb, seed
        )
        for case in CASES
        for seed in args.seeds
    }
    print(json.dumps({"seconds": time.perf_counter() - start, "digests": digests}))


if __name__ == "__main__":
    main()
