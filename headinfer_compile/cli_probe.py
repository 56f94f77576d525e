"""``headinfer probe``: measure this machine and keep its profile for ``plan``."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import HeadInferError
from headinfer_compile.machine import MachineProfile, load_profile, profile_path, save_profile
from headinfer_compile.probe import probe as measure
from headinfer_compile.runtime.host_build import library_origin


def probe(
    kept: Annotated[
        bool, typer.Option("--kept", help="Show the profile that is kept; measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log, and show tracebacks.")] = False,
) -> None:
    """Measure link, memories, attention, matrix products and host calls; takes up to 30 s.

    Example: headinfer probe --json
    """
    if kept:
        found = load_profile()
        if found is None:
            raise HeadInferError(
                f"no profile of this machine at {profile_path()}, or one over 30 days old: run "
                "headinfer probe"
            )
    else:
        found = measure()
        save_profile(found)
    if as_json:
        more = {"host_kernel": library_origin(), "path": str(profile_path())}
        print(json.dumps({**found.to_json(), **more}))
    else:
        console = Console(highlight=False)
        console.print(_table(found))
        console.print(f"kernel of attention on the CPU: {library_origin()}", soft_wrap=True)
        console.print(f"kept in {profile_path()}", soft_wrap=True)


def _rate(rate: float) -> str:
    return f"{rate / 1e9:,.1f} GB/s"


def _operations(rate: float) -> str:
    return f"{rate / 1e12:,.2f} TFLOP/s"


def _table(profile: MachineProfile) -> Table:
    rates = profile.rates
    date = datetime.fromtimestamp(profile.measured_at, timezone.utc).isoformat(timespec="minutes")
    table = Table(
        title=f"{profile.device}, {date}, in {profile.seconds:.1f} s",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, sizes in (("host to device", rates.h2d), ("device to host", rates.d2h)):
        for nbytes, rate in sizes:
            table.add_row(f"link: {name}, copies of {format_bytes(nbytes)}", _rate(rate))
    table.add_row("link: each way with both running", _rate(rates.duplex))
    table.add_section()
    table.add_row("device memory, read", _rate(rates.hbm))
    table.add_row("host memory, read", _rate(rates.dram))
    table.add_row("host memory, read beside the link", _rate(rates.dram_beside_link))
    table.add_section()
    for name, rate in rates.attention_kernels:
        table.add_row(f"attention over a KV block: {name}", _operations(rate))
    table.add_row("attention over a causal square", _operations(rates.causal))
    table.add_row("matrix products of a layer", _operations(rates.matmul))
    table.add_section()
    table.add_row("host time of a call", f"{rates.call_seconds * 1e6:,.0f} us")
    table.add_row("host time of a layer in decode", f"{rates.layer_seconds * 1e6:,.0f} us")
    if rates.stream_seconds:
        table.add_row("more of it where it streams", f"{rates.stream_seconds * 1e6:,.0f} us")
    table.add_row("host time of a streamed block", f"{rates.block_seconds * 1e6:,.0f} us")
    table.add_section()
    table.add_row("device memory, free", format_bytes(profile.gpu_free))
    table.add_row("device memory, in all", format_bytes(profile.gpu_total))
    table.add_row("host memory for KV", format_bytes(profile.host_available))
    return table
