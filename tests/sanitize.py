"""Runs the short conversations of ``stress_worker.py`` under compute-sanitizer; prints JSON.

    python tests/sanitize.py --output benchmarks/results/sanitizer.json

memcheck finds accesses outside of allocations, racecheck hazards of shared memory in our kernels;
what orders streams is the business of ``passes/verify.py`` and of the stress tests. What is found
in kernels of other libraries is listed and not counted. Exit codes: 0 nothing found in ours, 1
something found or the run failed, 3 there is no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
_OURS = re.compile(r"\bat _(split|join|append|merge|pull)_kernel\b")
"""Names of our kernels in a line of a report (``runtime/*_triton.py``)."""


def find_sanitizer() -> str | None:
    """The program, from PATH, from a CUDA toolkit, or from a wheel of NVIDIA's."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    places = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        *Path("/usr/local").glob("cuda*"),
    ]
    places += [Path(folder) / "nvidia" for folder in sys.path if folder]
    for place in places:
        for path in sorted(place.glob("**/compute-sanitizer")):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def parse(text: str) -> dict[str, Any]:
    """Errors and hazards of a report, and the first lines that say what they are.

    >>> parse("========= ERROR SUMMARY: 0 errors")
    {'summary': 'ERROR SUMMARY: 0 errors', 'errors': 0, 'elsewhere': 0, 'details': []}
    >>> parse("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)")["errors"]
    2
    >>> line = "========= Error: Race reported between Read access at {}(Params)+0x10"
    >>> parse(line.format("fmha"))["elsewhere"], parse(line.format("_split_kernel"))["elsewhere"]
    (1, 0)
    """
    lines = [line[9:].strip() for line in text.splitlines() if line.startswith("=========")]
    summaries = [line for line in lines if "SUMMARY:" in line]
    counts = [re.search(r"SUMMARY: (\d+)", line) for line in summaries]
    details = [
        line
        for line in lines
        if re.match(r"(Invalid|Program hit|Error|Warning|Race|Potential|Misaligned|Barrier)", line)
    ]
    return {
        "summary": summaries[-1] if summaries else None,
        "errors": max((int(count[1]) for count in counts if count), default=None),
        "elsewhere": sum(" at " in line and not _OURS.search(line) for line in details),
        "details": details[:20],
    }


def start(tool: str, sanitizer: str, worker: list[str]) -> subprocess.Popen[str]:
    """The worker under one tool."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # Errors of driver calls are left out: torch probes for what a machine has by failing.
    options = ["--tool", tool, "--report-api-errors", "no", "--target-processes", "all"]
    return subprocess.Popen(
        [sanitizer, *options, *worker],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "CUDA_MODULE_LOADING": "LAZY"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> int:
    """Run both tools at once and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each tool")
    args = parser.parse_args()
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(json.dumps({"error": "no compute-sanitizer: it comes with the CUDA toolkit"}))
        return 3
    worker = [sys.executable, "tests/stress_worker.py", "--short"]
    begin, running = time.perf_counter(), {tool: start(tool, sanitizer, worker) for tool in TOOLS}
    tools: dict[str, Any] = {}
    for tool, process in running.items():
        left = max(1.0, args.timeout - (time.perf_counter() - begin))
        try:
            out, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            out += f"\n========= Error: killed after {args.timeout} s"
        report = parse(out)
        ran = process.returncode == 0 and '"digests"' in out
        seconds = round(time.perf_counter() - begin, 1)
        tools[tool] = {**report, "ran": ran, "seconds": seconds}
        if not ran:
            tools[tool]["tail"] = out[-2000:]
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python tests/sanitize.py",
        "worker": "2 layers, 64 tokens: two slots, one resident page, the CPU beside the link",
        **_versions(sanitizer),
        "tools": tools,
        "clean": all(
            tool["ran"] and tool["errors"] == tool["elsewhere"] for tool in tools.values()
        ),
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text, encoding="ascii")
    return 0 if record["clean"] else 1


def _versions(sanitizer: str) -> dict[str, str]:
    import torch

    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "sanitizer": version.stdout.strip().splitlines()[-1] if version.stdout.strip() else "",
    }


if __name__ == "__main__":
    sys.exit(main())
