"""What does pinning host memory cost a prefill that has to wait for it?

Two questions, one row each. ``prefill``: the same prompt into a new cache, whose slabs are mapped,
touched and registered while it is read, against a cache that has its pages already; the two take
turns. ``launch``: the longest time between two launches of a tiny kernel while slabs of the same
bytes are registered on another thread, against the same loop alone.
"""

from __future__ import annotations

import threading
import time

import torch

from benchmarks.common import (
    Row,
    Setup,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    summary,
    synchronize,
    write_rows,
)
from benchmarks.models import build
from benchmarks.prefill import make_variant, time_prefill
from benchmarks.variants import Variant, Variants
from headinfer_compile.config import parse_bytes
from headinfer_compile.runtime.slab import HostSlab

_STALL_MS = 5.0


def prefill_row(variant: Variant, context: int, chunk: int, rounds: int, setup: Setup) -> Row:
    """Prefill into new and into kept pages, in turn."""
    ids = torch.randint(0, variant.model.config.vocab_size, (1, context), device=setup.device)
    cold: list[float] = []
    warm: list[float] = []
    pinned = 0
    with torch.no_grad(), variant.active():
        variant.open(context)
        variant.prefill(ids[:, : 2 * chunk], chunk)
        for _ in range(rounds):
            variant.close()
            variant.open(context)
            cold.append(time_prefill(variant, ids, chunk)[0])
            variant.cache.reset()
            warm.append(time_prefill(variant, ids, chunk)[0])
            pinned = variant.cache.stats().host_bytes
            say("pinning while reading %.3f s, pages in place %.3f s", cold[-1], warm[-1])
        variant.close()
    new, kept = summary(cold), summary(warm)
    return {
        "context": context, "chunk": chunk, "pinned_bytes": pinned, "new_pages_s": new,
        "kept_pages_s": kept, "added": round(new["median"] / kept["median"] - 1, 5),
    }  # fmt: skip


def launch_row(nbytes: int, step_bytes: int, setup: Setup) -> Row:
    """Gaps between launches with and without registration beside them."""
    device = setup.device
    alone = _gaps(device, 2.0, None)
    slabs: list[HostSlab] = []

    def register() -> None:
        for at in range(0, nbytes, step_bytes):
            slabs.append(HostSlab(min(step_bytes, nbytes - at), 32 << 20, device))

    thread = threading.Thread(target=register)
    start = time.perf_counter()
    beside = _gaps(device, 0.0, thread)
    seconds = time.perf_counter() - start
    for slab in slabs:
        slab.close()
    return {
        "registered_bytes": nbytes, "register_s": round(seconds, 3),
        "gib_per_s": round(nbytes / 2**30 / seconds, 3),
        "longest_gap_ms": round(max(beside), 3), "longest_gap_alone_ms": round(max(alone), 3),
        "stalls_over_5_ms": sum(gap > _STALL_MS for gap in beside),
        "stalls_alone": sum(gap > _STALL_MS for gap in alone),
        "gap_ms": summary(beside, 5), "gap_alone_ms": summary(alone, 5),
    }  # fmt: skip


def _gaps(device: torch.device, seconds: float, thread: threading.Thread | None) -> list[float]:
    """Milliseconds between launches, for ``seconds`` or as long as ``thread`` runs."""
    x = torch.zeros(64, device=device)
    gaps: list[float] = []
    if thread is not None:
        thread.start()
    end = time.perf_counter() + seconds
    # At least once: a thread with little to do may be over by now.
    while not gaps or time.perf_counter() < end or (thread is not None and thread.is_alive()):
        before = time.perf_counter()
        for _ in range(100):
            x.add_(1)
            now = time.perf_counter()
            gaps.append((now - before) * 1e3)
            before = now
        # Outside the gaps: the queue must not fill up, or a launch waits for the device.
        synchronize(device)
    if thread is not None:
        thread.join()
    return gaps


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("startup", "The cost of pinning host memory during a prefill.")
    cuda = torch.cuda.is_available()
    add = cli.add_argument
    add("--context", type=parse_tokens, default=256 << 10 if cuda else 256)
    add("--chunk", type=parse_tokens, default=16384 if cuda else 64)
    add("--rounds", type=int, default=2)
    add("--register", default="32GiB" if cuda else "64MiB", help="bytes for the launch question")
    add("--slab", default="1GiB" if cuda else "16MiB", help="slab of the launch question")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    register, slab = parse_bytes(args.register, "--register"), parse_bytes(args.slab, "--slab")
    row = launch_row(register, slab, setup)
    row |= {"id": f"startup/{setup.tag}/launch", "case": "startup"}
    rows = [row | provenance(setup.device, args.note)]
    write_rows(args.out, rows)
    say(
        "registered %s at %.2f GiB/s: longest gap between launches %.2f ms (alone %.2f ms)",
        args.register, row["gib_per_s"], row["longest_gap_ms"], row["longest_gap_alone_ms"],
    )  # fmt: skip
    model = build(args.model, setup.device, layers=args.layers)
    variant = make_variant(Variants(model), "headinfer:0", args.lowering)
    row = prefill_row(variant, args.context, args.chunk, args.rounds, setup)
    name = f"{model.config.model_type}-{model.config.num_hidden_layers}"
    row |= {"id": f"startup/{setup.tag}/prefill/{name}/n{args.context}", "case": "startup"}
    rows.append(row | provenance(setup.device, args.note))
    write_rows(args.out, rows)
    say("pinning adds %.2f %% to the prefill", 100 * row["added"])
    return rows


if __name__ == "__main__":
    main()
