"""A dumped schedule can be edited and loaded, and what is printed is what runs, op for op."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    Run,
    assert_same,
    clean_dynamo,
    generate,
    tiny_llama,
)
from headinfer_compile import HeadInferCache, load_schedule
from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes.schedule import PlanKey, Schedule
from headinfer_compile.passes.schedule_text import schedule_text

LAYERS = 2
PROMPT, CHUNK, NEW = 150, 70, 6
#: Calls as they are made: the operator and its arguments that are no tensors.
Trace = list[tuple[str, tuple[Any, ...]]]


class OpTrace(TorchDispatchMode):
    """Notes every ``headinfer`` operator that a compiled call of ``cache`` executes."""

    def __init__(self, cache: HeadInferCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Trace = []
        # Entered inside the compiled call: around it, Dynamo would not compile.
        cache.session.around_call = lambda: self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "headinfer":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def printed(text: str, layer: int) -> Trace:
    """The calls that ``text`` asks for in a layer; what is neither literal nor layer is None."""
    known = {"layer": layer, "next_layer": (layer + 1) % LAYERS}

    def value(item: ast.expr) -> Any:
        return known.get(item.id) if isinstance(item, ast.Name) else ast.literal_eval(item)

    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    calls: Trace = []
    for statement in function.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            name = ast.unparse(statement.value.func).removeprefix("headinfer.")
            calls.append((name, tuple(map(value, statement.value.args))))
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
    """A compiled model, the tokens it was run on, and the schedules that were dumped."""

    compiled: CompiledModel
    folder: Path
    ids: Tensor
    oracle: Run

    def filled(self) -> HeadInferCache:
        """A cache after prompt and answer, which are checked."""
        cache = self.compiled.cache()
        run = generate(self.compiled.model, self.ids, cache, NEW, prefill_chunk_size=CHUNK)
        assert_same(run, self.oracle)
        return cache

    def files(self) -> list[Path]:
        """The dumped schedules, in the order they were built."""
        return sorted(self.folder.glob("*_schedule.py"))

    def text(self, matches: Callable[[PlanKey], bool]) -> str:
        """The dump of the one plan key that ``matches``."""
        # Dynamo graphs build their schedules apart, so a key may have been dumped twice.
        found = {load_schedule(path).key: path for path in reversed(self.files())}
        (path,) = [path for key, path in found.items() if matches(key)]
        return path.read_text(encoding="ascii")

    def step(self, cache: HeadInferCache, ids: Tensor) -> Trace:
        """The calls made by one forward on ``ids``, whose logits are checked."""
        held = cache.get_seq_length()
        assert torch.equal(ids, self.oracle.tokens[:, held : held + ids.shape[1]])
        trace = OpTrace(cache)
        with torch.no_grad():
            logits = self.compiled.model(ids, past_key_values=cache).logits
            expected = self.compiled.resident(self.oracle.tokens[:, : cache.length]).logits
        assert float((logits - expected[:, held:]).abs().max()) <= MAX_LOGIT_DIFFERENCE
        return trace.calls

    def decode_step(self, cache: HeadInferCache) -> Trace:
        """The calls of the decode step after ``filled``."""
        return self.step(cache, self.oracle.tokens[:, -1:])


@pytest.fixture(scope="module")
def dumped(run_seed: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dumped]:
    folder = tmp_path_factory.mktemp("dump")
    with clean_dynamo():
        compiled = CompiledModel(tiny_llama(run_seed, LAYERS), debug_dir=str(folder))
        dumped = Dumped(compiled, folder, *compiled.prompt(run_seed, PROMPT, NEW))
        dumped.filled().close()
        yield dumped


def is_decode(key: PlanKey) -> bool:
    """A decode step into a tail that holds tokens."""
    return key.one_query and key.has_tail


def is_chunk(key: PlanKey) -> bool:
    """The second chunk, in a layer with a next one."""
    return key.phase == "prefill" and key.host > 0 and bool(key.next_transfers)


def is_last_layer_of_chunk(key: PlanKey) -> bool:
    """The second chunk, in the last layer."""
    return key.phase == "prefill" and key.host > 0 and not key.next_transfers


def load(text: str, folder: Path) -> Schedule:
    """``load_schedule`` of a file with ``text``."""
    path = folder / "edited.py"
    path.write_text(text, encoding="ascii")
    return load_schedule(path)


def move(text: str, line: str, before: str) -> str:
    """``text`` with the first line that matches ``line`` before the first one of ``before``."""
    lines = text.splitlines(keepends=True)
    moved = next(item for item in lines if re.search(line, item))
    lines.remove(moved)
    place = next(index for index, item in enumerate(lines) if re.search(before, item))
    lines.insert(place, moved)
    edited = "".join(lines)
    assert edited != text
    return edited


def test_every_plan_key_is_dumped_and_loads_as_it_stands(dumped: Dumped) -> None:
    loaded = [load_schedule(path) for path in dumped.files()]
    built = {key: s for graph in dumped.compiled.graphs for key, s in graph.schedules.items()}
    assert {schedule.key for schedule in loaded} == set(built)
    assert len(built) >= 5
    for schedule in loaded:
        twin = built[schedule.key]
        assert schedule_text(schedule.graph_module, schedule.key) == schedule_text(
            twin.graph_module, twin.key
        )
        assert (schedule.num_transfers, schedule.entry, schedule.exit) == (
            twin.num_transfers, twin.entry, twin.exit,
        )  # fmt: skip


def test_what_is_printed_is_what_runs(dumped: Dumped) -> None:
    text = dumped.text(is_decode)
    expected = [call for layer in range(LAYERS) for call in printed(text, layer)]
    with dumped.filled() as cache:
        assert_executed(dumped.decode_step(cache), expected)


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("headinfer.output", "headinfer.store"),
        ("headinfer.prefetch.*base, 2,", "prefetch.*base, 3,"),
    ],
    ids=["reorder independent ops", "start a transfer later"],
)
def test_an_edit_changes_the_ops_executed(
    dumped: Dumped, tmp_path: Path, line: str, before: str
) -> None:
    text = dumped.text(is_decode)
    edited = move(text, line, before)
    expected = [call for layer in range(LAYERS) for call in printed(edited, layer)]
    with dumped.filled() as cache:
        cache.use_schedule(load(edited, tmp_path))
        calls = dumped.decode_step(cache)
        assert_executed(calls, expected)
        assert [name for name, _ in calls] != [
            name for layer in range(LAYERS) for name, _ in printed(text, layer)
        ]
    with dumped.filled() as other:
        # The edit belongs to the cache that it was given to.
        unedited = [call for layer in range(LAYERS) for call in printed(text, layer)]
        assert_executed(dumped.decode_step(other), unedited)


def test_an_edit_holds_for_its_plan_key_only(dumped: Dumped, tmp_path: Path) -> None:
    text, last = dumped.text(is_chunk), dumped.text(is_last_layer_of_chunk)
    edited = move(text, "headinfer.offload", "headinfer.store")
    schedule = load(edited, tmp_path)
    first_transfers = [
        ("prefetch", (None, 0, *transfer, None, index, None))
        for index, transfer in enumerate(schedule.key.transfers()[: schedule.entry])
    ]
    second = dumped.ids[:, CHUNK : 2 * CHUNK]
    for code, override in ((text, None), (edited, schedule)):
        with dumped.compiled.cache() as cache:
            if override is not None:
                cache.use_schedule(override)
            dumped.step(cache, dumped.ids[:, :CHUNK])
            expected = [*first_transfers, *printed(code, 0), *printed(last, 1)]
            assert_executed(dumped.step(cache, second), expected)


def _without(pattern: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^.*{pattern}.*\n", "", text, count=1)


def _replaced(pattern: str, by: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, by, text, count=1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without(r"headinfer\.wait"), "used before it is made"),
        (_without(r"headinfer\.attend\("), "used before it is made"),
        (_without(r"headinfer\.release"), "used before it is made"),
        (_replaced(r"(= )wait_default_1(\[0\])", r"\1wait_default\2"), "not proved"),
        (_replaced(r"(base, 3, )release_default\b", r"\1r2"), "not proved"),
        (_replaced(r"(prefetch\(handle, layer, 0, 0, )2", r"\g<1>3"), "not proved"),
        (_replaced(r"return (\w+), (\w+), (\w+),", r"return \1, \3, \2,"), "not proved"),
        (_replaced(r"return .*", "return"), "expected"),
        (_without("return"), "not proved|nothing"),
        (_without("# key"), "# key"),
        (_replaced(r'"host": \d+', '"host": 2'), "not proved"),
        (_replaced(r'"host": \d+', '"host": "many"'), "key"),
        (_replaced(r'"padded": false', '"padded": 0'), "padded"),
        (_replaced(r'"pieces": \[', '"pieces": [3'), "key"),
        (_replaced(r'"groups"', '"group"'), "key"),
        (_replaced("# key: {", "# key: {{"), "key"),
        (_replaced(r"headinfer\.pack", "headinfer.unpack"), "unpack"),
        (_replaced(r"headinfer\.pack\(.*\)", "__import__('os')"), "is no call"),
        (lambda text: text.replace("pack_default", "headinfer"), "the name of the operators"),
        (_replaced("def site", "\0def site"), "null"),
        (_replaced(r"def site", "x = 1\ndef site"), "one function"),
        (_replaced(r"def site\(handle, ", "def site("), "."),
        (_replaced(r"def site\(", "def site(("), "line"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_broken_edit_is_refused(
    dumped: Dumped, tmp_path: Path, edit: Callable[[str], str], message: str
) -> None:
    text = dumped.text(is_decode)
    assert edit(text) != text
    with pytest.raises(ScheduleError, match=message):
        load(edit(text), tmp_path)


def test_the_cache_works_after_a_refusal(dumped: Dumped, tmp_path: Path) -> None:
    text = dumped.text(is_decode)
    with dumped.filled() as cache:
        with pytest.raises(ScheduleError):
            cache.use_schedule(load(_without(r"headinfer\.wait")(text), tmp_path))
        expected = [call for layer in range(LAYERS) for call in printed(text, layer)]
        assert_executed(dumped.decode_step(cache), expected)


@pytest.mark.parametrize("matches", [is_decode, is_chunk])
def test_no_line_can_be_left_out(
    dumped: Dumped, tmp_path: Path, matches: Callable[[PlanKey], bool]
) -> None:
    text = dumped.text(matches)
    lines = text.splitlines(keepends=True)
    body = next(index for index, line in enumerate(lines) if line.startswith("def "))
    for index in range(body, len(lines)):
        with pytest.raises(ScheduleError):
            load("".join(lines[:index] + lines[index + 1 :]), tmp_path)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_random_edits_are_refused_or_proved(dumped: Dumped, tmp_path: Path, seed: int) -> None:
    """Whatever the edit, the only error is ``ScheduleError``; what loads is the text as it is."""
    choose = random.Random(seed)
    texts = [path.read_text(encoding="ascii") for path in dumped.files()]
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        text = choose.choice(texts)
        lines = text.splitlines(keepends=True)
        first, second = sorted(choose.sample(range(len(lines)), 2))
        kind = choose.choice(["swap", "number", "name", "cut"])
        if kind == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        elif kind == "cut":
            lines[first] = lines[first][: choose.randrange(len(lines[first]))] + "\n"
        else:
            pattern = r"(?<=[ (\[])-?\d+" if kind == "number" else r"(?<=[ (])[a-z]\w+"
            found = list(re.finditer(pattern, lines[first]))
            if found:
                spot = choose.choice(found)
                by = choose.choice(
                    ["0", "-7", "1000000", "r1", "layer", "None", "'x'", "1.5", "[]"]
                )
                lines[first] = lines[first][: spot.start()] + by + lines[first][spot.end() :]
        edited = "".join(lines)
        try:
            schedule = load(edited, tmp_path)
        except ScheduleError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert_executed(
            printed(schedule_text(schedule.graph_module, schedule.key), 0), printed(edited, 0)
        )
    assert outcomes[False] > 100


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_schedule(tmp_path / "nothing.py")
