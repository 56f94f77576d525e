"""``headinfer plan``: bytes and seconds of a model at a context, before anything runs."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from headinfer_compile import planner


def plan(
    model: Annotated[
        str, typer.Argument(help="Known name (llama-3-8b), hub name, local folder or .gguf file.")
    ],
    context: Annotated[str, typer.Option(help="Tokens of prompt and answer: 4096, 128K, 1M.")],
    chunk: Annotated[
        str | None, typer.Option(help="Prompt tokens per forward; default: the plan's choice.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's own.")
    ] = None,
    gpu_budget: Annotated[
        str, typer.Option(help="KV bytes allowed on the device, such as 0 or 4GiB, or auto.")
    ] = "auto",
    host_budget: Annotated[
        str, typer.Option(help="KV bytes allowed in host RAM, such as 64GiB, or auto.")
    ] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="Cards; layers are spread evenly.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a card, such as 24GiB; default: this machine's.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory for KV, all of which may be used.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Rate between host and device, such as 25GB/s.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Peak matrix rate of a card in TFLOP/s.")
    ] = None,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Print the cost model in symbols too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log, and show tracebacks.")] = False,
) -> None:
    """Plan MODEL at a context on this machine or on a described one; exit code 3: does not fit.

    Example: headinfer plan llama-3-8b --context 1M --gpu-memory 24GiB --host-memory 512GiB
    --link 25GB/s --tflops 165
    """
    made = planner.plan(
        model,
        context=context,
        chunk=chunk,
        batch=batch,
        dtype=dtype,
        gpu_budget=gpu_budget,
        host_budget=host_budget,
        gpus=gpus,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        link=link,
        tflops=tflops,
    )
    if as_json:
        print(json.dumps(made.to_json()))
        for warning in made.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    sys.stdout.write(str(made))
    if formulas:
        print("\ncost model")
        for text in made.formulas.values():
            print(f"  {text}")
        print("where")
        for name, meaning in made.symbols.items():
            print(f"  {name}: {meaning}")
