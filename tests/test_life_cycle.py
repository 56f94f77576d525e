"""From the first call to the end of the process: what is given back, shared, forked, threaded."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from fault_injection import Books, books_of, live_objects
from harness import (
    CompiledModel,
    Run,
    assert_same,
    clean_dynamo,
    dynamo_graphs,
    generate,
    one_thread,
    random_ids,
    tiny_llama,
)
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import CacheError, ClosedError

ROOT = Path(__file__).resolve().parent.parent
NEW = 4


@pytest.fixture(scope="module")
def model() -> Iterator[CompiledModel]:
    """One compiled model for the tests of this file that need no other."""
    with one_thread(), clean_dynamo():
        made = CompiledModel(tiny_llama(0, layers=2, heads=4, kv_heads=2))
        # The first compilation of a process starts threads of torch's own.
        with made.cache() as cache:
            generate(made.model, random_ids(0, 30), cache, NEW)
        yield made


def tokens(model: CompiledModel, cache: HeadInferCache, seed: int, prompt: int = 30) -> Tensor:
    return generate(model.model, random_ids(seed, prompt), cache, NEW).tokens


@pytest.mark.parametrize("end", ["close", "with", "with an error", "garbage", "a cycle"])
def test_everything_is_given_back(end: str, model: CompiledModel) -> None:
    before, threads = live_objects(), threading.active_count()
    cache = model.cache()
    tokens(model, cache, 0)
    assert books_of(cache).blocks > 0
    assert live_objects() != before
    if end == "close":
        cache.close()
        cache.close()
    elif end == "with":
        with cache:
            pass
    elif end == "with an error":
        with pytest.raises(ZeroDivisionError), cache:
            raise ZeroDivisionError
    elif end == "a cycle":
        cache.itself = cache  # type: ignore[attr-defined]
    if end in ("close", "with", "with an error"):
        assert cache.stats().fixed_bytes == cache.stats().host_bytes == 0
        with pytest.raises(ClosedError, match="make a new one"):
            tokens(model, cache, 0)
    del cache
    assert live_objects() == before
    assert threading.active_count() == threads


EXIT = """
import atexit, sys, threading, torch
sys.path[:0] = {path!r}
from harness import CompiledModel, generate, random_ids, tiny_llama
model = CompiledModel(tiny_llama(0, layers=1, heads=2, kv_heads=1))
cache = model.cache()
def work():
    generate(model.model, random_ids(0, 30), cache, 3)
work()
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "atexit.register(work)",
        pytest.param("pass", marks=pytest.mark.slow),
        pytest.param("sys.exit(0)", marks=pytest.mark.slow),
        pytest.param("cache.close()", marks=pytest.mark.slow),
        pytest.param("threading.Thread(target=work).start()", marks=pytest.mark.slow),
        pytest.param("import __main__; __main__.kept = iter([cache])", marks=pytest.mark.slow),
    ],
)
def test_the_interpreter_ends_quietly(end: str) -> None:
    code = EXIT.format(path=[str(ROOT), str(ROOT / "tests")], end=end)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_fork_leaves_the_parent_alone(model: CompiledModel, seed: int) -> None:
    """The child cannot use the cache, drops it, and ends; the parent's next call is right."""
    ids, oracle = model.prompt(seed, 30, NEW)
    cache = model.cache()
    assert_same(generate(model.model, ids, cache, NEW), oracle)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            k = torch.zeros(1, 2, 1, 8)
            try:
                cache.update(k, k, 0)
            except CacheError as error:
                code = 0 if "Make a cache in each process" in str(error) else 2
            del cache
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ids, oracle = model.prompt(seed + 1, 5, NEW, after=oracle.tokens)
    assert_same(generate(model.model, ids, cache, NEW), oracle)
    model.assert_streamed(cache)


def _in_a_child(queue: Any) -> None:
    with clean_dynamo():
        child = CompiledModel(tiny_llama(0, layers=1, heads=2, kv_heads=1))
        queue.put(tokens(child, child.cache(), 3).tolist())


def test_spawn_cannot_take_a_cache_along(model: CompiledModel) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=print, args=(model.cache(),))
    with pytest.raises(CacheError, match="cannot be copied or pickled"):
        process.start()


@pytest.mark.slow
def test_a_spawned_process_makes_its_own() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_a_child, args=(queue,))
    process.start()
    found = queue.get(timeout=240)
    process.join(60)
    assert process.exitcode == 0
    with clean_dynamo():
        own = CompiledModel(tiny_llama(0, layers=1, heads=2, kv_heads=1))
        assert (
            found
            == generate(own.resident, random_ids(3, 30), own.resident_cache(), NEW).tokens.tolist()
        )


def test_two_models_and_four_caches_alternate(model: CompiledModel, seed: int) -> None:
    """Turn by turn, each conversation as if it were alone."""
    other = CompiledModel(tiny_llama(1, layers=1, heads=2, kv_heads=1))
    talks: list[tuple[CompiledModel, HeadInferCache, Tensor | None]] = [
        (owner, owner.cache(), None) for owner in (model, other, model, other)
    ]
    for turn in range(3):
        for index, (owner, cache, before) in enumerate(talks):
            ids, oracle = owner.prompt(seed + 10 * turn + index, 9 + turn, NEW, after=before)
            assert_same(generate(owner.model, ids, cache, NEW), oracle)
            talks[index] = owner, cache, oracle.tokens
    for owner, cache, _ in talks:
        owner.assert_streamed(cache)


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run the jobs at once; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    if errors:
        raise errors[0]


def test_two_caches_in_two_threads(model: CompiledModel, seed: int) -> None:
    """One model, two conversations of other lengths at the same time."""
    wanted = [model.prompt(seed + index, 20 + 13 * index, 12) for index in range(2)]
    found: dict[int, Run] = {}
    interval = sys.getswitchinterval()

    def talk(index: int) -> Callable[[], None]:
        def job() -> None:
            for _ in range(3):
                with model.cache() as cache:
                    found[index] = generate(model.model, wanted[index][0], cache, 12)
                    model.assert_streamed(cache)
                assert_same(found[index], wanted[index][1])

        return job

    sys.setswitchinterval(1e-5)
    try:
        in_threads(talk(0), talk(1))
    finally:
        sys.setswitchinterval(interval)
    assert set(found) == {0, 1}


def test_a_thread_compiles_as_few_graphs_as_the_main_one(seed: int) -> None:
    """``Thread(target=model.generate)`` is how text is streamed: any length, few graphs."""
    with clean_dynamo():
        model = CompiledModel(tiny_llama(2, layers=1, heads=2, kv_heads=1))

        def job() -> None:
            for prompt in range(10, 22):
                with model.cache() as cache:
                    tokens(model, cache, seed, prompt)
                    model.assert_streamed(cache)

        in_threads(job)
        assert dynamo_graphs() <= 3


@dataclass(frozen=True)
class Usage:
    """What the process and a cache that is used again and again hold."""

    live: Counter[str]
    threads: int
    files: int
    books: Books
    tracked: int = field(compare=False)
    """Objects that the garbage collector knows."""

    @classmethod
    def now(cls, cache: HeadInferCache) -> Usage:
        live, process = live_objects(), psutil.Process()
        tracked = len(gc.get_objects())
        return cls(live, process.num_threads(), process.num_fds(), books_of(cache), tracked)


def slope(values: Sequence[int]) -> float:
    """What ``values`` grow by from one to the next, by least squares."""
    mean, middle = sum(values) / len(values), (len(values) - 1) / 2
    above = [(at - middle) * (value - mean) for at, value in enumerate(values)]
    return sum(above) / sum((at - middle) ** 2 for at in range(len(values)))


WARM_UP, ROUND = 4, 21


def flat(model: CompiledModel, seed: int, rounds: int, turns: int) -> None:
    """Tokens are the oracle's and nothing grows after the first four of some rounds.

    One turn of a round is 7 prompts, each in a cache that is closed, one that is dropped, and one
    that is reset and used again.
    """
    prompts = [model.prompt(seed + index, 20 + index, NEW) for index in range(7)]
    rss, books = [], set()
    with model.cache() as kept:
        for number in range(rounds):
            for index in range(turns * ROUND):
                ids, oracle = prompts[index % len(prompts)]
                way = ("close", "drop", "reset")[index % 3]
                cache = kept if way == "reset" else model.cache()
                assert_same(generate(model.model, ids, cache, NEW), oracle)
                model.assert_streamed(cache)
                if way == "reset":
                    cache.reset()
                else:
                    books.add((index % len(prompts), books_of(cache)))
                if way == "close":
                    cache.close()
                del cache
            if number < WARM_UP:
                steady = Usage.now(kept)
                continue
            rss.append(psutil.Process().memory_info().rss)
            found = Usage.now(kept)
            assert found == steady
            # Less than one a round.
            assert found.tracked - steady.tracked < rounds
            del found
    # What a new cache holds after a prompt is the same each time.
    assert len(books) == len(prompts)
    grown = slope(rss) / (turns * ROUND)
    print(f"{rounds * turns * ROUND} generations: {grown:.0f} bytes more each")
    assert grown * len(rss) * turns * ROUND < 2 << 20


def test_generations_in_a_row_leave_nothing(model: CompiledModel, seed: int) -> None:
    flat(model, seed, rounds=WARM_UP + 2, turns=1)


@pytest.mark.slow
def test_a_thousand_generations_leave_nothing(model: CompiledModel, seed: int) -> None:
    flat(model, seed, rounds=WARM_UP + 12, turns=4)


def test_one_cache_for_many_prompts(model: CompiledModel, seed: int) -> None:
    """Reset between: buffers stay, and nothing grows."""
    sizes = []
    with model.cache() as cache:
        for index in range(8):
            ids, oracle = model.prompt(seed + index, 30, NEW)
            assert_same(generate(model.model, ids, cache, NEW), oracle)
            sizes.append(books_of(cache))
            cache.reset()
    assert len(set(sizes)) == 1


def test_past_the_positions_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Warned of once, when the limit is crossed; and the tokens are still those of the model."""
    resident = tiny_llama(0, layers=1, heads=2, kv_heads=1)
    resident.config.max_position_embeddings = 64
    with clean_dynamo(), caplog.at_level(logging.WARNING):
        model = CompiledModel(resident)
        cache, ids = model.cache(), random_ids(0, 90)
        found = model.forward(ids[:, :60], cache, 60)
        assert "max_position_embeddings" not in caplog.text
        found = torch.cat([found, model.forward(ids[:, 60:], cache, 10)], 1)
        wanted = model.forward(ids, model.resident_cache(), 90)
    assert float((found - wanted).abs().max()) < 1e-4
    lines = [r.message for r in caplog.records if "max_position_embeddings" in r.message]
    assert lines == [
        "the cache will hold 70 tokens and the model was made for 64 (max_position_embeddings): "
        "depending on the model, expect errors or nonsense"
    ]
