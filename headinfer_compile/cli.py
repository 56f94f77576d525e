"""The ``headinfer`` command: its subcommands, and how a failure becomes an exit code.

Exit codes: 0 ok, 1 failure or ``--check`` mismatch, 2 usage, 3 does not fit, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Annotated

import torch
import transformers
import typer

from headinfer_compile import (
    cli_bench,
    cli_completion,
    cli_explain,
    cli_generate,
    cli_plan,
    cli_probe,
)
from headinfer_compile.errors import DoesNotFitError, OptionError

EXIT_FAILURE, EXIT_USAGE, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 1, 2, 3, 130

# Typer's own completion would start Python, and with it torch, at every key.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("generate")(cli_generate.generate)
app.command("explain")(cli_explain.explain)
app.command("plan")(cli_plan.plan)
app.command("probe")(cli_probe.probe)
app.command("completion")(cli_completion.completion)
app.command("bench", context_settings=cli_bench.CONTEXT)(cli_bench.bench)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = metadata.version("headinfer-compile")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    print(f"headinfer-compile {version}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """A causal LM whose KV cache lives in host RAM, with exact attention."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what caused it; Dynamo wraps what a backend raises."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = getattr(at, "inner_exception", None) or at.__cause__


def _exit_code(error: BaseException) -> int:
    if isinstance(error, OptionError):
        return EXIT_USAGE
    if isinstance(error, (DoesNotFitError, MemoryError, torch.OutOfMemoryError)):
        return EXIT_DOES_NOT_FIT
    return EXIT_FAILURE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name; None takes the process's.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("headinfer_compile").setLevel(logging.DEBUG)
    else:
        transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        app(args, prog_name="headinfer")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # the edge of the process, where every failure becomes a code
        if debug:
            raise
        cause = max(_chain(error), key=_exit_code)
        print(f"error: {cause}", file=sys.stderr)
        return _exit_code(cause)
    return 0
