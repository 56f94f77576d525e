"""Runs cases of bad input and writes what comes of them as a page."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness import CompiledModel, random_ids, tiny_llama, tiny_mistral
from headinfer_compile import HeadInferCache, explain, headinfer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"


class World:
    """What the cases work on, made when it is first asked for."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        """Work in ``folder``; ``checkpoint`` holds a small model with a tokenizer."""
        self.folder, self.checkpoint = folder, checkpoint

    @cached_property
    def model(self) -> CompiledModel:
        """A compiled model of two layers."""
        return CompiledModel(tiny_llama(0))

    @cached_property
    def other(self) -> CompiledModel:
        """A compiled model of three layers."""
        return CompiledModel(tiny_llama(0, layers=3))

    @cached_property
    def windowed(self) -> CompiledModel:
        """A compiled model whose layers have a window of 20 tokens."""
        return CompiledModel(tiny_mistral(0, 20))

    def used(self) -> HeadInferCache:
        """A cache that holds 12 tokens of the model."""
        cache = self.model.cache()
        self.model.forward(random_ids(0, 12), cache, 12)
        return cache

    def past_window(self) -> HeadInferCache:
        """A cache of 1,600 tokens whose layers have given up what their window has passed."""
        cache = self.windowed.cache(page_tokens=64)
        self.windowed.forward(random_ids(0, 1600), cache, 200)
        return cache

    def compiled(self, **how: Any) -> Any:
        """Another copy of the model, compiled by the user's one line."""
        model: Any = type(self.model.resident)(self.model.resident.config).eval()
        model.compile(backend=headinfer, **how)
        return model

    @cached_property
    def schedule(self) -> Path:
        """A dumped schedule."""
        folder = self.folder / "dump"
        explain(
            tiny_llama(0, layers=1).config, context=40, page_tokens=16, tail_tokens=8,
            options={"debug_dir": str(folder)},
        )  # fmt: skip
        return sorted(folder.glob("*_schedule.py"))[-1]

    def edited(self, old: str, new: str) -> Path:
        """The dumped schedule with one change."""
        text = self.schedule.read_text(encoding="ascii")
        assert old in text
        path = self.folder / "edited.py"
        path.write_text(text.replace(old, new, 1), encoding="ascii")
        return path

    def copied(self, name: str, change: Callable[[Path, Path], None]) -> str:
        """The checkpoint in a folder of that name, each file copied by ``change``."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for path in self.checkpoint.iterdir():
            change(path, folder / path.name)
        return str(folder)


@dataclass(frozen=True)
class ErrorCase:
    """One input and what comes of it."""

    group: str
    given: str
    run: Callable[[World], object]
    error: type[BaseException] | int | None
    """An exit code for commands; None: it works, with the warning that ``says`` is in, if any."""
    says: str = ""
    """Must be in the message."""
    foreign: bool = False
    """The message is torch's or transformers' and may be another in other versions."""

    @property
    def name(self) -> str:
        """For test ids."""
        return f"{self.group}: {self.given}"


@dataclass
class Outcome:
    """What a case gave."""

    error: type[BaseException] | int | None
    message: str
    traceback: bool = False
    warnings: list[str] = field(default_factory=list)


def run_case(case: ErrorCase, world: World) -> Outcome:
    """Run one case."""
    out, err, warnings = io.StringIO(), io.StringIO(), _Warnings()
    result: object = None
    error: type[BaseException] | None = None
    message = ""
    with warnings.noted(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = case.run(world)
        # Interrupts are not among the cases.
        except (Exception, SystemExit) as raised:
            error, message = type(raised), str(raised)
    text = err.getvalue()
    if isinstance(case.error, int) and error is None:
        message = " ".join(re.sub(r"[\u2500-\u257f]", " ", text).split())
        message = message[message.find("rror") - 1 :].removeprefix("error: ").removeprefix("Error ")
        return Outcome(int(str(result)), tidy(message, world), "Traceback" in text)
    if error is None and warnings.lines:
        message = warnings.lines[0]
    return Outcome(error, tidy(message, world), "Traceback" in text, warnings.lines)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the package warns of."""
        logger = logging.getLogger("headinfer_compile")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


def pickled(source: Path, target: Path) -> None:
    """Write weights as a pickle."""
    if source.suffix == ".safetensors":
        torch.save(load_file(source), target.with_name("pytorch_model.bin"))
    else:
        target.write_bytes(source.read_bytes())


def cut(source: Path, target: Path) -> None:
    """Cut weights short."""
    data = source.read_bytes()
    target.write_bytes(data[:1000] if source.suffix == ".safetensors" else data)


def without_tokenizer(source: Path, target: Path) -> None:
    """Leave the tokenizer out."""
    if not source.name.startswith("tokenizer"):
        target.write_bytes(source.read_bytes())


def with_code(source: Path, target: Path) -> None:
    """Let the config bring code of its own."""
    target.write_bytes(source.read_bytes())
    if source.name == "config.json":
        config = json.loads(source.read_text(encoding="utf-8"))
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
        target.write_text(json.dumps(config), encoding="utf-8")
        code = f"open({str(target.with_name('was_run'))!r}, 'w')\n"
        target.with_name("mine.py").write_text(code, encoding="utf-8")


def tidy(message: str, world: World) -> str:
    """A message without what differs between machines and runs."""
    for path, name in ((world.checkpoint, "MODEL"), (world.folder, "DIR"), (PAGE.parents[1], "")):
        message = message.replace(f"{path}/", f"{name}/" if name else "").replace(str(path), name)
    message = re.sub(r"/[\w./-]*/(?=(transformers|torch|tests)/)", "", message)
    message = re.sub(r"\bprocess \d+|\bfork \d+", lambda m: m[0].split()[0] + " PID", message)
    # What there is may grow: the page shows how a message begins.
    message = re.sub(r"(is no call of one of |there are |Valid: ).*", r"\1...", message)
    message = re.sub(r"\.py:\d+", ".py:LINE", message)
    message = message.replace(torch.__version__, "VERSION")
    return " ".join(message.split())


HEAD = """# Errors

What the package says to input that it cannot take. `tests/error_cases.py` has these cases and
writes this page; each is a test. All errors of the package are `HeadInferError`s;
`OptionError` and `CacheError` are `ValueError`s too, `DoesNotFitError` a `MemoryError`. After any
of them the cache holds what it held before, and the next call goes on from there.

Commands print one line to standard error, and a traceback only with `--debug`. Their exit codes:
0 ok, 1 failure or a difference that `--check` found, 2 usage, 3 does not fit, 130 interrupted.
"""


def page(outcomes: list[tuple[ErrorCase, Outcome]]) -> str:
    """The document."""
    lines = [HEAD]
    for group in dict.fromkeys(case.group for case, _ in outcomes):
        lines += [f"## {group}", "", "| given | error | message |", "|---|---|---|"]
        for case, outcome in outcomes:
            if case.group == group:
                lines.append(
                    f"| {_cell(case.given)} | {_kind(outcome)} | {_message(case, outcome)} |"
                )
        lines.append("")
    return "\n".join(lines)


def _kind(outcome: Outcome) -> str:
    if isinstance(outcome.error, int):
        return f"exit {outcome.error}"
    if outcome.error is None:
        return "a warning" if outcome.warnings else "none"
    return f"`{outcome.error.__name__}`"


def _message(case: ErrorCase, outcome: Outcome) -> str:
    if case.foreign:
        return "(of torch or transformers, as with any other cache)"
    return _cell(outcome.message)


def _cell(text: str) -> str:
    for char in "|<>*_":
        if "`" not in text or char == "|":
            text = text.replace(char, f"\\{char}")
    return text.encode("ascii", "replace").decode()
