"""What every benchmark shares: arguments, timing, peaks, and rows of JSON merged by id."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from headinfer_compile.config import format_bytes, parse_bytes

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]
_Item = TypeVar("_Item")

_START = time.perf_counter()


def say(message: str, *args: object) -> None:
    """Print a line of progress with the seconds since the start, at once."""
    print(
        f"[{time.perf_counter() - _START:7.1f} s] {message % args if args else message}", flush=True
    )


def parse_tokens(text: str) -> int:
    """Tokens of ``"32K"``, ``"1M"`` or ``"4096"`` (K is 1024).

    Raises:
        argparse.ArgumentTypeError: It is none of these.
    """
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected tokens such as 4096, 32K or 1M")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def format_tokens(count: int) -> str:
    """``count`` as ``32K`` or ``1M`` where that is exact."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parser(case: str, description: str) -> argparse.ArgumentParser:
    """The arguments that every case takes."""
    cuda = torch.cuda.is_available()
    out = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{case}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = out.add_argument
    add("--model", default="llama-3-8b" if cuda else "tiny", help="a shape of benchmarks/models.py")
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--device", default="cuda" if cuda else "cpu")
    add("--out", type=Path, default=RESULTS / f"{case}.json", help="rows are merged by id")
    add("--gpu-memory", help="emulate a smaller card, e.g. 24GiB, by the allocator's limit")
    add("--gpu-fraction", type=float, help="the same as a share of this card")
    add("--seed", type=int, default=0)
    add("--note", default="", help="kept with each row")
    return out


@dataclass(frozen=True)
class Setup:
    """Device and limits of a run."""

    device: torch.device
    gpu_memory: int | None
    """Bytes of the emulated card, or None."""

    @property
    def tag(self) -> str:
        """Part of a row's id: device and emulated memory."""
        limit = "" if self.gpu_memory is None else f"-{self.gpu_memory / 2**30:.3g}GiB"
        return f"{slug(device_name(self.device))}{limit}"


def prepare(args: argparse.Namespace) -> Setup:
    """Seed, limit the device's memory and turn warnings on, as the arguments say."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    limit = None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = args.gpu_fraction
        if args.gpu_memory is not None:
            fraction = parse_bytes(args.gpu_memory, "--gpu-memory") / total
        if fraction is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), device)
            limit = round(fraction * total)
    say("%s, %s", device_name(device), versions())
    return Setup(device, limit)


def device_name(device: torch.device) -> str:
    """The device as a figure names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def slug(text: str) -> str:
    """``text`` in lower case with runs of other characters as one dash."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions that a figure holds for."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def provenance(device: torch.device, note: str = "") -> Row:
    """Where, when and how a row was measured."""
    module = Path(sys.argv[0]).stem
    # Where the file was written is of no use to anybody else.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *words])
    return {
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "note": note,
    }


def read_rows(path: Path) -> list[Row]:
    """Rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Merge ``rows`` into a results file by their ``id``; a killed run leaves a whole file."""
    merged = {row["id"]: row for row in read_rows(path)}
    merged.update({row["id"]: row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    text = json.dumps([merged[key] for key in sorted(merged)], indent=1)
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)


def in_turns(items: Sequence[_Item], rounds: int) -> Iterator[tuple[int, _Item]]:
    """Each item once in each of ``rounds`` rounds, with the number of the round.

    Every other round goes backwards, so that none is always the one after the heaviest.
    """
    for turn in range(rounds):
        for item in items if turn % 2 == 0 else reversed(items):
            yield turn, item


def summary(values: Sequence[float], digits: int = 4) -> Row:
    """Median, p10 and p90 of ``values``, and how many there were."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), digits),
        "p10": round(ordered[round(0.1 * last)], digits),
        "p90": round(ordered[round(0.9 * last)], digits),
        "count": len(ordered),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Peak bytes on the device and of the process, from ``start`` on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Without the right to write it, the peak is that of the whole process so far.
        clear = Path("/proc/self/clear_refs")
        if os.access(clear, os.W_OK):
            clear.write_text("5")

    def read(self) -> Row:
        """The peaks, and what is in use now."""
        found: Row = {
            "host_peak_bytes": _status_bytes("VmHWM"),
            "host_bytes": _status_bytes("VmRSS"),
        }
        if self.device.type == "cuda":
            found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found["gpu_peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            found["gpu_bytes"] = torch.cuda.memory_allocated(self.device)
        return found


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def show_bytes(count: float | None) -> str:
    """Bytes for a line of progress."""
    return "-" if count is None else format_bytes(count)
