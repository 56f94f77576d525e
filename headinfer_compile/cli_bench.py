"""``headinfer bench``: runs a case of ``benchmarks/`` from a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from headinfer_compile.errors import OptionError

#: Cases with what they answer; each is a module of ``benchmarks/`` with a --help of its own.
CASES = {
    "prefill": "tokens per second of chunked prefill, for every variant and context",
    "decode": "seconds of one decode step, for every variant and context",
    "memory": "fixed device bytes of a streamed cache against the context",
    "startup": "what pinning host memory costs a prefill",
    "compile_time": "seconds of compilation, against plain torch.compile",
    "logits": "our logits against those of resident kernels",
    "needle": "recall of planted pairs over depth and length",
    "timeline": "kernels and copies of one decode step, by stream",
    "host_attention": "attention over host pages on the CPU, against a plain read of them",
    "plan_limits": "the largest context on the paper's machine, beside the paper's",
    "proof": "what the proof of the schedules costs in a long prefill",
    "plan_sweep": "auto against fixed settings",
    "plan_accuracy": "predicted beside measured bytes and seconds",
    "three_way": "decode steps by the share of host blocks that the CPU attends",
    "roofline": "the rates of this machine",
    "bars": "judges the results and writes bars.json",
    "plots": "draws the pictures from the results",
}

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For the command: every argument after the case, ``--help`` too, is the case's own."""


_AS_JSON = """
import contextlib, importlib, json, sys
with contextlib.redirect_stdout(sys.stderr):
    rows = importlib.import_module("benchmarks." + sys.argv[1]).main(sys.argv[2:])
print(json.dumps(rows, default=str))
"""
"""Runs a case with its progress on stderr and its rows on stdout."""


def _find_root() -> Path:
    """The checkout that holds ``benchmarks/``, which no wheel does."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "common.py").is_file():
        raise OptionError(
            "bench: the benchmarks are in the source tree and not in the installed package; clone "
            "the repository, `pip install -e .[bench]` there, and run the command again"
        )
    return root


def bench(
    context: typer.Context,
    case: Annotated[str | None, typer.Argument(help="One of the cases.")] = None,
) -> None:
    """Run a benchmark; what follows its name are its own arguments (CASE --help).

    With --json, the rows that were measured go to stdout and the progress to stderr.

    Example: headinfer bench decode --context 128K --synthetic --variants headinfer:0 paper
    """
    if case == "--json" or (case is None and "--json" in context.args):
        print(json.dumps(CASES))
        return
    if case in (None, "--help", "-h"):
        print("Usage: headinfer bench CASE [ARGUMENTS]...   (CASE --help for its arguments)\n")
        for name, text in CASES.items():
            print(f"  {name:<16}{text}")
        print("\nExample: headinfer bench decode --context 128K --synthetic --json")
        return
    if case not in CASES:
        raise OptionError(f"bench {case}: no such case; there are {', '.join(CASES)}")
    root = _find_root()
    wants_json = "--json" in context.args
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    args = [arg for arg in context.args if arg not in ("--debug", "--json")]
    command = [sys.executable, "-m", f"benchmarks.{case}", *args]
    if wants_json:
        command = [sys.executable, "-c", _AS_JSON, case, *args]
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
