"""How long does compilation take? Two chunked ``generate`` calls, against plain ``torch.compile``.

Both compilers see the same model and the same two calls with prompts of different lengths, each in
a process of its own with empty caches. The same two calls run again afterwards, when nothing is
left to compile; the difference is the time of compilation, with all graphs in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

from benchmarks.common import (
    RESULTS,
    Row,
    device_name,
    parser,
    prepare,
    provenance,
    say,
    slug,
    write_rows,
)
from benchmarks.models import build
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.backend import restore_dynamo
from headinfer_compile.cache_protocol import cache_argument

COMPILERS = ("headinfer", "inductor")


def _generate(
    model: PreTrainedModel, compiler: str, prompts: list[int], chunk: int, new: int
) -> float:
    start = time.perf_counter()
    for tokens in prompts:
        ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=model.device)
        ours = compiler == "headinfer"
        cache = HeadInferCache(model.config, gpu_budget=0) if ours else DynamicCache()
        model.generate(  # type: ignore[operator]
            ids, **{cache_argument(model): cache}, prefill_chunk_size=chunk, max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - start


def work(args: argparse.Namespace) -> Row:
    """What the process of one compiler does."""
    setup = prepare(args)
    model = build(args.model, setup.device, layers=args.layers)
    if args.worker == "headinfer":
        model.compile(backend=headinfer)
    else:
        # As a user has it who never imported this project.
        restore_dynamo()
        model.compile()
    settings = (args.worker, args.prompts, args.chunk, args.new)
    first = _generate(model, *settings)
    graphs = counters["stats"]["unique_graphs"]
    say("%s: %.1f s, %d graphs", args.worker, first, graphs)
    again = _generate(model, *settings)
    later = counters["stats"]["unique_graphs"] - graphs
    return {
        "first_s": round(first, 2), "again_s": round(again, 2),
        "compile_s": round(first - again, 2), "graphs": graphs, "graphs_again": later,
    }  # fmt: skip


def spawn(args: argparse.Namespace, compiler: str) -> Row:
    """Run one compiler in a process of its own with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        environment = dict(os.environ)
        environment |= {
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        command = [sys.executable, "-m", "benchmarks.compile_time", "--worker", compiler]
        command += ["--model", args.model, "--device", args.device, "--seed", str(args.seed)]
        command += ["--chunk", str(args.chunk), "--new", str(args.new), "--out", str(out)]
        command += ["--prompts", *map(str, args.prompts)]
        if args.layers is not None:
            command += ["--layers", str(args.layers)]
        subprocess.run(command, check=True, env=environment, cwd=RESULTS.parents[1])
        row: Row = json.loads(out.read_text(encoding="utf-8"))
        return row


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("compile_time", "Seconds of compilation, against plain torch.compile.")
    cli.set_defaults(model="smollm2-135m")
    cli.add_argument("--prompts", type=int, nargs="+", default=[700, 900])
    cli.add_argument("--chunk", type=int, default=256)
    cli.add_argument("--new", type=int, default=4, help="tokens generated")
    cli.add_argument("--worker", choices=COMPILERS, help=argparse.SUPPRESS)
    args = cli.parse_args(argv)
    if args.worker is not None:
        args.out.write_text(json.dumps(work(args)), encoding="utf-8")
        return []
    device = torch.device(args.device)
    found = {compiler: spawn(args, compiler) for compiler in COMPILERS}
    ours, plain = found["headinfer"], found["inductor"]
    layers = args.layers or "all"
    row = {
        "id": f"compile_time/{slug(device_name(device))}/{args.model}-{layers}",
        "case": "compile_time", "model": args.model, "layers": args.layers, "chunk": args.chunk,
        "prompts": args.prompts, "new": args.new, **found,
        "ratio": round(ours["compile_s"] / plain["compile_s"], 4),
        "ratio_of_calls": round(ours["first_s"] / plain["first_s"], 4),
    } | provenance(device, args.note)  # fmt: skip
    write_rows(args.out, [row])
    say(
        "compilation: ours %.1f s (%d graphs), torch.compile %.1f s (%d graphs): %.2f x",
        ours["compile_s"], ours["graphs"], plain["compile_s"], plain["graphs"], row["ratio"],
    )  # fmt: skip
    return [row]


if __name__ == "__main__":
    main()
