"""A dumped schedule can be edited and loaded, and what is printed is what runs, op for op."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CompiledModel, Run, assert_same, clean_dynamo, generate, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer_compile import HeadInferCache, load_schedule
from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes.schedule import Schedule

pytest_plugins = ["harness"]

PROMPT, CHUNK, NEW = 75, 30, 6
#: Calls as they are made: the operator and its arguments that are no tensors.
Trace = list[tuple[str, tuple[Any, ...]]]


class OpTrace(TorchDispatchMode):
    """Notes every ``headinfer`` operator that is executed, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Trace = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func.namespace == "headinfer":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def printed(text: str, layers: int) -> Trace:
    """The calls that ``text`` asks for, layer after layer; what is no literal is None."""
    calls: Trace = []
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    for layer in range(layers):
        known = {"layer": layer, "next_layer": (layer + 1) % layers}

        def value(item: ast.expr, known: dict[str, int] = known) -> Any:
            if isinstance(item, ast.Name):
                return known.get(item.id)
            return ast.literal_eval(item)

        for statement in function.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
                call = statement.value
                name = ast.unparse(call.func).removeprefix("headinfer.")
                calls.append((name, tuple(map(value, call.args))))
    return calls


def assert_executed(calls: Trace, expected: Trace) -> None:
    """Assert that exactly the printed calls were made, in order, with the printed arguments."""
    assert [name for name, _ in calls] == [name for name, _ in expected]
    for (name, args), (_, wanted) in zip(calls, expected, strict=True):
        assert len(args) == len(wanted), name
        for position, (found, literal) in enumerate(zip(args, wanted, strict=True)):
            if literal is not None:
                assert found == literal, f"argument {position} of {name}"


@dataclass
class Dumped:
    """A compiled model, a cache it has filled, and the schedule files of that run."""

    compiled: CompiledModel
    folder: Path
    ids: Tensor
    oracle: Run

    def fill(self) -> HeadInferCache:
        """A cache that holds the prompt and a few tokens more."""
        cache = self.compiled.cache()
        assert_same(
            generate(self.compiled.model, self.ids, cache, NEW, prefill_chunk_size=CHUNK), self.oracle
        )
        return cache

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*_schedule.py"))

    def file(self, matches: Callable[[Schedule], bool]) -> Path:
        """The dump of the one schedule that ``matches``."""
        found = {}
        for path in self.files():
            schedule = load_schedule(path)
            if matches(schedule):
                found[schedule.key] = path
        (path,) = found.values()
        return path

    def step(self, cache: HeadInferCache, ids: Tensor) -> tuple[Tensor, Trace]:
        """Logits of one call, and the calls it made."""
        trace = OpTrace()
        with torch.no_grad(), trace:
            logits = self.compiled.model(ids, past_key_values=cache).logits
        return logits, trace.calls

    def resident_step(self, cache: HeadInferCache, ids: Tensor) -> Tensor:
        """What ``step`` must give: the uncompiled model on the oracle's tokens up to here."""
        held = self.oracle.tokens[:, : cache.get_seq_length()]
        with torch.no_grad():
            return self.compiled.resident(torch.cat([held, ids], 1)).logits[:, -ids.shape[1] :]


@pytest.fixture(scope="module")
def dumped(run_seed: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dumped]:
    folder = tmp_path_factory.mktemp("dump")
    with clean_dynamo():
        compiled = CompiledModel(tiny_llama(run_seed), debug_dir=str(folder))
        ids, oracle = compiled.prompt(run_seed, PROMPT, NEW)
        dumped = Dumped(compiled, folder, ids, oracle)
        dumped.fill()
        yield dumped


def is_decode(schedule: Schedule) -> bool:
    """The schedule of a decode step in the middle of a tail, after the whole prompt."""
    key = schedule.key
    return key.one_query and key.has_tail and not key.pieces and key.host == 5


def is_chunk(schedule: Schedule) -> bool:
    """The schedule of the second chunk, in layers that have a next one."""
    return schedule.key.phase == "decode" and bool(schedule.key.pieces) and (
        schedule.key.host > 0 and bool(schedule.key.next_transfers) and not schedule.key.one_query
    )  # fmt: skip


def test_debug(dumped):
    for path in dumped.files():
        print(path.name, load_schedule(path).key)
    c = dumped.fill()
    ids = dumped.oracle.tokens[:, -1:]
    l, calls = dumped.step(c, ids)
    print(c.length, dumped.oracle.tokens.shape, len(calls), calls[:3])
    assert 0
