"""An error anywhere in a step: it reaches the caller, the cache goes on, and nothing is lost."""

from __future__ import annotations

import itertools
import logging
import random
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from fault_injection import Books, Lines, Ops, books_of, contents, failures, live_objects
from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    clean_dynamo,
    one_thread,
    random_ids,
    tiny_llama,
)
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError, ClosedError, DoesNotFitError
from headinfer_compile.runtime.attention import select

PAGE, TAIL = 16, 3


@pytest.fixture(scope="module")
def model() -> Iterator[CompiledModel]:
    """One compiled model for all tests of this file."""
    with one_thread(), clean_dynamo():
        yield CompiledModel(tiny_llama(0, heads=4, kv_heads=2))


@dataclass(frozen=True)
class StepCase:
    """A step that is made to fail, after the calls before it."""

    before: tuple[int, ...]
    new: int = 0
    sizes: dict[str, Any] = field(default_factory=dict)

    def start(self, model: CompiledModel) -> HeadInferCache:
        """A cache after the calls before."""
        model.use(num_slots=2)
        cache = model.cache(page_tokens=PAGE, tail_tokens=TAIL, **self.sizes)
        at = 0
        for count in self.before:
            call(model, cache, at, count)
            at += count
        return cache

    def step(self, model: CompiledModel, cache: HeadInferCache) -> Tensor:
        """The logits of the step."""
        return call(model, cache, sum(self.before), self.new)


#: Each kind of step that the runtime tells apart.
STEPS = {
    "first chunk": StepCase((), 40),
    "next chunk": StepCase((40,), 40),
    "decode": StepCase((40, 1), 1),
    "flush": StepCase((40, 1, 1), 1),
    "turn after a tail": StepCase((40, 1), 9, {"gpu_budget": 10_000}),
}
AFTER = (1, 7, 1)
#: Where every place has its turn, the calls after the step follow one in so many.
FOLLOWED = 4


def call(model: CompiledModel, cache: HeadInferCache, at: int, count: int) -> Tensor:
    ids = random_ids(0, 256)[:, at : at + count]
    with torch.no_grad():
        logits: Tensor = model.model(ids, past_key_values=cache, use_cache=True).logits
    return logits


@dataclass(frozen=True)
class State:
    """A cache after a call, and its logits: from equal states further calls are alike."""

    logits: Tensor
    books: Books
    contents: list[Tensor]

    def check(self, wanted: State, where: str) -> None:
        """Bit for bit."""
        assert torch.equal(self.logits, wanted.logits), where
        assert self.books == wanted.books, where
        assert len(self.contents) == len(wanted.contents), where
        assert all(map(torch.equal, self.contents, wanted.contents)), where


def states(
    model: CompiledModel, case: StepCase, cache: HeadInferCache, after: Sequence[int] = AFTER
) -> Iterator[State]:
    """After the step, and after each of some calls that follow."""
    yield State(case.step(model, cache), books_of(cache), contents(cache))
    at = sum(case.before) + case.new
    for count in after:
        yield State(call(model, cache, at, count), books_of(cache), contents(cache))
        at += count


@dataclass(frozen=True)
class Wanted:
    """What a step and the calls after it give without an error, and the books before it."""

    before: Books
    states: tuple[State, ...]


def reference(model: CompiledModel, case: StepCase) -> Wanted:
    with case.start(model) as cache:
        return Wanted(books_of(cache), tuple(states(model, case, cache)))


def check_goes_on(
    model: CompiledModel, case: StepCase, cache: HeadInferCache, wanted: Wanted, where: str,
    after: Sequence[int] = AFTER,
) -> None:  # fmt: skip
    """The cache is at its last length, and the same calls bring it to the same states."""
    assert cache.get_seq_length() == wanted.before.tokens, where
    for found, state in zip(states(model, case, cache, after), wanted.states, strict=False):
        found.check(state, where)


def fail_at(
    model: CompiledModel, case: StepCase, wanted: Wanted, at: int, failure: BaseException,
    after: Sequence[int],
) -> None:  # fmt: skip
    with case.start(model) as cache:
        ops = Ops(cache, at, lambda: failure)
        with pytest.raises((type(failure), DoesNotFitError)) as found:
            case.step(model, cache)
        where = f"{failure!r} at op {at}, {ops.names[-1]}"
        # The error itself, or one that says what to do and comes from it.
        causes = [found.value, found.value.__cause__]
        assert failure in causes, where
        if found.value is not failure:
            assert isinstance(found.value, DoesNotFitError), where
            assert "lower" in str(found.value).lower(), where
        Ops(cache, None, lambda: failure)
        check_goes_on(model, case, cache, wanted, where, after)


def op_names(model: CompiledModel, case: StepCase) -> list[str]:
    with case.start(model) as cache:
        ops = Ops(cache, None, KeyboardInterrupt)
        case.step(model, cache)
        return ops.names


def test_a_refused_allocation_says_what_to_do(model: CompiledModel) -> None:
    """One of the model's own, in mid-step: the error itself, with a note where Python has them."""
    case = STEPS["decode"]
    with case.start(model) as cache:
        failure = torch.OutOfMemoryError("CUDA out of memory")
        Ops(cache, 40, lambda: failure)
        with pytest.raises(torch.OutOfMemoryError) as found:
            case.step(model, cache)
        assert found.value is failure
        notes = getattr(failure, "__notes__", [])
        if sys.version_info >= (3, 11):
            assert len(notes) == 1
            assert "holds 41 tokens, as before this call" in notes[0]
            assert "lower gpu_budget, prefill_chunk_size or workspace_bytes" in notes[0]


def check_ops(
    model: CompiledModel, case: StepCase, numbers: Sequence[int], followed: Container[int]
) -> None:
    wanted, process = reference(model, case), psutil.Process()
    live, threads, rss = live_objects(), threading.active_count(), process.memory_info().rss
    for index, at in enumerate(numbers):
        after = AFTER if at in followed else ()
        fail_at(model, case, wanted, at, failures()[index % 4], after)
    assert live_objects() == live
    assert threading.active_count() == threads
    assert process.memory_info().rss - rss < 32 << 20


@pytest.mark.parametrize("name", ["first chunk", "flush", "turn after a tail"])
def test_an_error_at_an_op_of_ours_or_an_allocation(name: str, model: CompiledModel) -> None:
    """One layer's ops and all allocations; the other layer's ops are the same again."""
    names = op_names(model, STEPS[name])
    ours = [at for at, op in enumerate(names) if op.startswith("headinfer::")]
    made = [at for at, op in enumerate(names) if op.startswith("aten::empty")]
    assert len(ours) >= 10
    print(f"{len(ours)} ops of ours and {len(made)} allocations among {len(names)} ops")
    numbers = sorted({*ours[len(ours) // 2 :], *made})
    check_ops(model, STEPS[name], numbers, followed=numbers)


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(FOLLOWED))
@pytest.mark.parametrize("name", STEPS)
def test_every_error_at_every_op(name: str, shift: int, model: CompiledModel) -> None:
    names = op_names(model, STEPS[name])
    numbers = range(len(names))
    # Four errors in turn, each op meets each over the four shifts.
    followed = [at for at in numbers if at // 4 % FOLLOWED == shift]
    check_ops(model, STEPS[name], [*numbers[-shift:], *numbers[: len(names) - shift]], followed)


def interrupt_at(
    model: CompiledModel, case: StepCase, wanted: Wanted, at: int, after: Sequence[int] = AFTER
) -> bool:
    """Interrupt at a place; False where there is no such place."""
    with case.start(model) as cache:
        lines = Lines(at)
        try:
            with lines:
                logits = case.step(model, cache)
        except KeyboardInterrupt:
            check_goes_on(model, case, cache, wanted, lines.place, after)
            return True
        # An interrupt in a callback of the interpreter is lost, and the step goes on.
        State(logits, books_of(cache), contents(cache)).check(wanted.states[0], lines.place)
        return bool(lines.place)


def line_count(model: CompiledModel, case: StepCase) -> int:
    # The first steps have a few more, before the interpreter has learned which calls are alike.
    for _ in range(4):
        with case.start(model) as cache, Lines(None) as lines:
            case.step(model, cache)
    return lines.count


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_at_any_line(name: str, model: CompiledModel, seed: int) -> None:
    case = STEPS[name]
    wanted, count = reference(model, case), line_count(model, case)
    # The last lines are those of the commit.
    for at in sorted({*random.Random(seed).sample(range(count), 8), *range(count - 12, count)}):
        assert interrupt_at(model, case, wanted, at), f"line {at} of {count}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
# An interrupt that comes where a generator is closed is lost, with this warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_at_every_line(name: str, model: CompiledModel) -> None:
    case = STEPS[name]
    wanted, count, at = reference(model, case), line_count(model, case), 0
    while interrupt_at(model, case, wanted, at, () if at % FOLLOWED else AFTER):
        at += 1
    assert at >= 0.99 * count


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_in_the_clean_up_after_another(
    model: CompiledModel, stride: int, seed: int
) -> None:
    """The second one comes at each line of the clean-up after the first."""
    case = STEPS["decode"]
    wanted = reference(model, case)
    for at in itertools.count(seed % stride, stride):
        with case.start(model) as cache:
            Ops(cache, 30, lambda: RuntimeError("the op failed"))
            lines = _CleanUp(at)
            with pytest.raises((KeyboardInterrupt, RuntimeError)), lines:
                case.step(model, cache)
            if not lines.place:
                assert at > 15
                return
            Ops(cache, None, KeyboardInterrupt)
            check_goes_on(model, case, cache, wanted, lines.place)


class _CleanUp(Lines):
    """Counts from the first line of ``cancel_call`` on."""

    _on = False

    def _count(self, frame: FrameType, event: str) -> None:
        self._on = self._on or frame.f_code.co_name == "cancel_call"
        if self._on:
            super()._count(frame, event)


def further(model: CompiledModel, cache: HeadInferCache) -> tuple[int, Tensor]:
    """How many tokens the cache says to hold, and the logits of 20 more."""
    length = cache.get_seq_length()
    return length, call(model, cache, length, 20)


@pytest.mark.parametrize("method", ["crop", "reset", "close"])
def test_an_interrupt_between_calls(model: CompiledModel, method: str) -> None:
    """The cache holds what it says; or it says what to do, and the method can be called again."""
    case, given = STEPS["decode"], (-5,) if method == "crop" else ()
    before = sum(case.before)
    wanted = {}
    for length in (before, before - 5 if method == "crop" else 0):
        with StepCase((length,) if length else ()).start(model) as cache:
            wanted[length] = further(model, cache)[1]
    for at in itertools.count():
        with case.start(model) as cache:
            change = partial(getattr(cache, method), *given)
            with suppress(KeyboardInterrupt), Lines(at) as lines:
                change()
            if not lines.place:
                break
            try:
                length, found = further(model, cache)
            except ClosedError:
                assert method == "close", lines.place
                continue
            except CacheError as error:
                if "crop() or reset() the cache" not in str(error):
                    raise
                change()
                length, found = further(model, cache)
            assert float((found - wanted[length]).abs().max()) <= MAX_LOGIT_DIFFERENCE, lines.place
        assert cache.stats().fixed_bytes == cache.stats().host_bytes == 0
    assert at > 40


class _NoKernel(Exception):
    pass


@pytest.mark.parametrize("name", STEPS)
def test_an_error_at_every_kernel_choice(
    name: str, model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = STEPS[name]
    wanted, at = reference(model, case), 0
    while True:
        with case.start(model) as cache:
            # Ask for every kernel anew.
            cache.session.kernels.clear()
            seen: list[Any] = []

            def choose(request: Any, seen: list[Any] = seen, at: int = at) -> Any:
                seen.append(request)
                if len(seen) > at:
                    raise _NoKernel
                return select(request)

            monkeypatch.setattr("headinfer_compile.runtime.block_ops.select", choose)
            try:
                case.step(model, cache)
                break
            except _NoKernel:
                pass
            finally:
                monkeypatch.undo()
            check_goes_on(model, case, cache, wanted, f"choice {at}")
        at += 1
    assert at > 0


@pytest.mark.parametrize("rounds", [6])
def test_slabs_that_the_host_refuses(model: CompiledModel, rounds: int) -> None:
    """torch's CPU allocator is asked for more than there is; budget says there would be."""
    model.use(num_slots=2)
    with model.cache(page_tokens=2**40, tail_tokens=TAIL, host_budget=2**62) as cache:
        for _ in range(rounds):
            with pytest.raises(DoesNotFitError, match=r"the host has no room for .*: lower host"):
                call(model, cache, 0, 40)
            assert cache.get_seq_length() == cache.stats().tokens == 0
            assert not cache.session.table.blocks


def test_a_refused_resident_block(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``gpu_budget`` promises more than there is: the rest goes to the host, and is exact there."""
    case, empty = StepCase((), 40, {"gpu_budget": 10_000}), torch.empty
    wanted = reference(model, case).states[0].logits

    def refuse(*size: Any, **how: Any) -> Tensor:
        if how.get("dtype") is torch.uint8 and how.get("device") == torch.device("cpu"):
            raise torch.OutOfMemoryError("out of memory")
        return empty(*size, **how)

    with case.start(model) as cache:
        monkeypatch.setattr(torch, "empty", refuse)
        with caplog.at_level(logging.WARNING):
            found = case.step(model, cache)
        assert float((found - wanted).abs().max()) < 1e-5
        assert cache.stats().resident_bytes == 0 < cache.stats().host_bytes
    assert "no room for another resident block" in caplog.text
