"""``headinfer explain``: what the compiler does with a model at a context, without its weights."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer_compile import report
from headinfer_compile.errors import OptionError
from headinfer_compile.known_models import known_config
from headinfer_compile.models import find_source, load_config


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--option {pair}: expected name=value, such as head_group=2")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def explain(
    model: Annotated[str, typer.Argument(help="Known name, hub name, folder or .gguf file.")],
    context: Annotated[str, typer.Option(help="Tokens of the prompt, such as 4096 or 128K.")],
    gguf: Annotated[
        str | None, typer.Option(help="GGUF file in the folder or repository MODEL.")
    ] = None,
    chunk: Annotated[str, typer.Option(help="Prompt tokens per forward.")] = "16K",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    gpu_budget: Annotated[
        str, typer.Option(help="KV bytes allowed on the device, such as 0 or 4GiB.")
    ] = "0",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A compile option; may be given several times."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file, not to stdout.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write one page to look at in a browser.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Link rate for predicted times, such as 25GB/s.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s of the device for predicted times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log, and show tracebacks.")] = False,
) -> None:
    """Show sites, passes, regions, schedules and bytes of MODEL; no weights are read.

    Example: headinfer explain llama-3-8b --context 128K --html report.html
    """
    for name, path in (("--output", output), ("--html", page)):
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"{name} {path}: there is no such folder")
    known = known_config(model) if gguf is None else None
    result = report.explain(
        known or load_config(find_source(model, gguf)),
        context=context,
        chunk=chunk,
        options=_options(option or []),
        batch=batch,
        gpu_budget=gpu_budget,
        link=link,
        tflops=tflops,
    )
    if page is not None:
        result.save_html(page)
        if output is None and not as_json:
            print(f"{page}: open it in a browser")
            return
    text = f"{json.dumps(result.to_json())}\n" if as_json else str(result)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
