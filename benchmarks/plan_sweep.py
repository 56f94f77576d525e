"""Is ``auto`` the best setting? Seconds of prefill and of a token under it and fixed settings.

Everything is streamed (``gpu_budget=0``), since settings matter there. Settings take turns in each
round, whose first is not counted. Every setting keeps a cache of its own, so that pages are made
once: take fewer layers where they do not fit. Fails where ``auto`` is over 3 % behind the best.

What is left at ``auto`` is chosen by the rates of ``headinfer probe``: give ``--probe`` where that
was not run. Rows say what the last step ran under, and why.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.common import (
    Row,
    format_tokens,
    in_turns,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    synchronize,
    write_rows,
)
from benchmarks.models import build
from benchmarks.variants import Variant, Variants
from headinfer_compile.probe import this_machine

SETTINGS = (
    "",
    ":head_group=1",
    ":head_group=2",
    ":head_group=4",
    ":head_group=8",
    ":num_slots=2",
    ":num_slots=4",
    ":slot_tokens=8192",
    ":slot_tokens=32768",
)
"""Compile options by variant name; the first is ``auto``."""
BEHIND = 0.03


def run(variant: Variant, ids: torch.Tensor, chunk: int, steps: int) -> tuple[float, float]:
    """Seconds of one prefill and, at its end, of a decode step (the median)."""
    device = ids.device
    with torch.no_grad(), variant.active():
        if variant.cache is None:
            variant.open(ids.shape[1])
        else:
            variant.restart(ids.shape[1])
        synchronize(device)
        start = time.perf_counter()
        logits = variant.prefill(ids, chunk)
        synchronize(device)
        prefill = time.perf_counter() - start
        times, token = [], logits[:, -1:].argmax(-1)
        for _ in range(4 + steps):
            start = time.perf_counter()
            token = variant.decode(token)[:, -1:].argmax(-1)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return prefill, statistics.median(times[4:])


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("plan_sweep", "Seconds under auto and under fixed settings.")
    cuda = torch.cuda.is_available()
    add = cli.add_argument
    add("--context", type=parse_tokens, default=65536 if cuda else 256)
    add("--chunk", type=parse_tokens, default=16384 if cuda else 96)
    add("--settings", nargs="+", default=list(SETTINGS), help="as :option=value; '' is auto")
    add("--base", default="headinfer:0", help="the variant that the settings are added to")
    add("--rounds", type=int, default=2, help="counted rounds")
    add("--steps", type=int, default=8)
    add("--probe", action="store_true", help="probe first, unless that was done before")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    if args.probe:
        this_machine()
    model = build(args.model, setup.device, layers=args.layers)
    variants = Variants(model)
    ids = torch.randint(0, model.config.vocab_size, (1, args.context), device=setup.device)
    names = list(dict.fromkeys(["", *args.settings]))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    made = {name: variants.make(args.base + name, lowering=args.lowering) for name in names}
    for turn, name in in_turns(names, args.rounds + 1):
        found = run(made[name], ids, args.chunk, args.steps)
        say("round %d, %-18s %.3f s, %.2f ms a token", turn, name or "auto", found[0],
            found[1] * 1e3)  # fmt: skip
        if turn:
            times[name].append(found)
    rows = [_row(args, setup.tag, name, times[name], model) for name in names]
    for row, variant in zip(rows, made.values(), strict=True):
        config = variant.cache.session.config
        row["chosen"] = {"head_group": config.head_group, "num_slots": config.slots}
        row["reasons"] = dict(variant.cache.session.reasons)
        variant.close()
    best = {
        part: min(row[part] for row in rows) for part in ("prefill_seconds", "seconds_per_token")
    }
    for row in rows:
        row["behind"] = {part: round(row[part] / least - 1, 4) for part, least in best.items()}
        row |= provenance(setup.device, args.note)
    write_rows(args.out, rows)
    say("auto is behind the best by %s", rows[0]["behind"])
    return rows


def _row(args: Any, tag: str, name: str, times: list[tuple[float, float]], model: Any) -> Row:
    shape = f"{args.model}-{model.config.num_hidden_layers}"
    setting = name.removeprefix(":") or "auto"
    return {
        "id": f"plan_sweep/{tag}/{shape}/{setting}/n{args.context}", "case": "plan_sweep",
        "model": args.model, "setting": setting, "context": args.context,
        "tokens": format_tokens(args.context), "chunk": args.chunk,
        "prefill_seconds": statistics.median(prefill for prefill, _ in times),
        "seconds_per_token": statistics.median(token for _, token in times),
    }  # fmt: skip


if __name__ == "__main__":
    behind = {part: by for part, by in main()[0]["behind"].items() if by > BEHIND}
    if behind:
        sys.exit(f"auto is more than {BEHIND:.0%} behind the best setting: {behind}")
