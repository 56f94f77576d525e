"""Steps in any order of the streams: bitwise equal when no edge lacks, and not when one does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from edges import Edge, Places, edges_of, killed_by_verifier, ops_in
from harness import CompiledModel, clean_dynamo, one_thread, random_ids, tiny_llama
from headinfer_compile import HeadInferCache
from headinfer_compile.errors import HeadInferError, ScheduleError
from headinfer_compile.passes.schedule import Schedule
from headinfer_compile.race_detector import replay
from headinfer_compile.simulator import Simulation, simulated
from mutator import opname

#: One call each: new tokens, or tokens to crop when negative; 0 resets. A dict is new options, and
#: "fault" lets the next call be interrupted, in its last layer, and then made again.
Calls = Sequence[int | dict[str, Any] | str]
#: Calls that reorder the rows of a batch of two.
ROWS = {"swap": (1, 0), "first": (0, 0), "second": (1, 1)}
LONG: Calls = (40, 40, *[1] * 10, -5, 12, *[1] * 6)
SHORT: Calls = (40, *[1] * 14)


@pytest.fixture(scope="module")
def model() -> Iterator[CompiledModel]:
    """One model, compiled once for all tests of this file."""
    with one_thread(), clean_dynamo():
        yield CompiledModel(tiny_llama(0, heads=4, kv_heads=2))


def play(
    model: CompiledModel, cache: HeadInferCache, calls: Calls, seed: int = 0, batch: int = 1
) -> list[Tensor]:
    """The logits of each call."""
    ids, at, logits, fault = random_ids(seed, 512, batch), 0, [], False
    with torch.no_grad():
        for count in calls:
            if isinstance(count, dict):
                model.use(**count)
            elif isinstance(count, str):
                fault = count == "fault"
                if count in ROWS:
                    cache.reorder_cache(torch.tensor(ROWS[count]))
            elif count > 0:
                part = ids[:, at : at + count]
                if fault:
                    interrupt(model, cache, part)
                fault = False
                logits.append(model.model(part, past_key_values=cache, use_cache=True).logits)
                at += count
            elif count < 0:
                cache.crop(count)
            else:
                cache.reset()
    return logits


def interrupt(model: CompiledModel, cache: HeadInferCache, ids: Tensor) -> None:
    """Make a call that is interrupted after the last layer has written its pages."""
    session, last = cache.session, model.layers - 1
    with pytest.MonkeyPatch.context() as patch:
        learn, seen = session.transfer_tags, []

        def stop(layer: int, transfers: Any) -> Any:
            seen.append(layer)
            if seen.count(last) == 2:
                raise KeyboardInterrupt
            return learn(layer, transfers)

        patch.setattr(session, "transfer_tags", stop)
        with pytest.raises(KeyboardInterrupt):
            model.model(ids, past_key_values=cache, use_cache=True)


@dataclass(frozen=True)
class Case:
    """A sequence of calls, the backend's options and the cache's."""

    calls: Calls
    options: dict[str, Any]
    sizes: dict[str, Any]

    def reference(self, model: CompiledModel) -> list[Tensor]:
        """The logits in program order."""
        model.use(**self.options)
        with model.cache(**self.sizes) as cache:
            return play(model, cache, self.calls)

    def run(self, model: CompiledModel, **how: Any) -> tuple[list[Tensor], Simulation]:
        """The logits of a simulated run."""
        model.use(**self.options)
        with model.cache(**self.sizes) as cache:
            with simulated(cache, **how) as simulation:
                logits = play(model, cache, self.calls)
            return logits, simulation


CASES = {
    "two slots": Case(LONG, {"num_slots": 2}, {"tail_tokens": 4}),
    "three slots": Case(LONG, {"num_slots": 3, "prefetch_distance": 2}, {"tail_tokens": 4}),
    "no hoisting": Case(LONG, {"disable_passes": ["hoist_prefetch"]}, {"tail_tokens": 4}),
    "some resident": Case(LONG, {"head_group": 1}, {"tail_tokens": 4, "gpu_budget": 10_000}),
    "one page": Case(SHORT, {}, {"tail_tokens": 4, "page_tokens": 128}),
    # The ring stays while the heads in a slot change, as "auto" changes them.
    "other groups": Case(
        (
            80,
            80,
            {"head_group": {"prefill": 2, "decode": 2}},
            70,
            1,
            1,
            66,
            {"head_group": {"prefill": 1, "decode": 2}},
            65,
            1,
            1,
        ),
        {"head_group": {"prefill": 1, "decode": 2}},
        {"tail_tokens": 4},
    ),
    "new prompt": Case((33, *[1] * 9, 0, 50, *[1] * 5), {"num_slots": 3}, {"tail_tokens": 3}),
}


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Bitwise equality of all logits."""
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def check(case: Case, model: CompiledModel, seeds: range) -> None:
    wanted = case.reference(model)
    for seed in seeds:
        found, simulation = case.run(model, seed=seed, synchronize=bool(seed % 2))
        assert equal(found, wanted), f"seed {seed}"
        simulation.log.check()
        assert simulation.edges["compute waits for slot.filled"] > 10
        assert simulation.dropped == 0


@pytest.mark.parametrize("name", CASES)
def test_every_order_gives_bitwise_the_same(name: str, model: CompiledModel) -> None:
    check(CASES[name], model, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_order_of_many_gives_bitwise_the_same(name: str, model: CompiledModel) -> None:
    check(CASES[name], model, range(100, 150))


def test_the_same_seed_gives_the_same_order(model: CompiledModel) -> None:
    case = CASES["two slots"]
    (first, _), (second, _), (other, _) = (
        case.run(model, seed=seed, drop="h2d waits for slot.freed") for seed in (3, 3, 5)
    )
    assert equal([a.nan_to_num() for a in first], [b.nan_to_num() for b in second])
    assert not equal(first, other)


#: Each edge of the runtime, and a case in which nothing else orders what it orders.
EDGES = {
    "compute waits for slot.filled": "two slots",
    "h2d waits for slot.freed": "two slots",
    "h2d waits for pages.written": "two slots",
    "d2h waits for staging.packed": "two slots",
    "d2h waits for tail.packed": "two slots",
    "compute waits for staging.copied": "two slots",
    # Among more blocks than slots, later transfers wait for this step's D2H, and compute for them.
    "compute waits for tail.copied": "one page",
}


@pytest.mark.parametrize("edge", EDGES)
def test_a_dropped_edge_is_found(edge: str, model: CompiledModel) -> None:
    case = CASES[EDGES[edge]]
    wanted = case.reference(model)
    for seed in range(60):
        found, simulation = case.run(model, seed=seed, synchronize=bool(seed % 2), drop=edge)
        assert simulation.dropped == simulation.edges[edge] > 0
        if not equal(found, wanted):
            return
    raise AssertionError(f"without {edge!r}, 60 orders gave the right logits")


def test_the_edges_of_the_runtime_are_the_ones_tested(model: CompiledModel) -> None:
    issued: set[str] = set()
    for case in CASES.values():
        issued |= set(case.run(model, seed=0)[1].edges)
    # Joins belong to `Session.drain`.
    assert {edge for edge in issued if "joins" not in edge} == set(EDGES)


#: Each join of a drain and of a new ring, and calls in which nothing else orders the same.
JOINS: dict[str, Calls] = {
    # A ring is given up while a transfer into it is under way.
    "compute joins h2d": (40, 1, {"num_slots": 3}, 1),
    # A new ring takes memory that compute still uses.
    "h2d joins compute": (40, 40, 1),
    # A write-back that was interrupted reads rows of the tail that are written again.
    "compute joins d2h": (1, 1, 1, "fault", 1, 1),
}


@pytest.mark.parametrize("edge", JOINS)
def test_a_dropped_join_is_a_race(edge: str, model: CompiledModel) -> None:
    case = Case(JOINS[edge], {"num_slots": 2}, {"tail_tokens": 4})
    wanted = case.reference(model)
    found, simulation = case.run(model, seed=0, synchronize=False)
    assert equal(found, wanted)
    simulation.log.check()
    _, simulation = case.run(model, seed=0, synchronize=False, drop=edge)
    assert simulation.dropped > 0
    with pytest.raises(ScheduleError, match="and no event orders them"):
        simulation.log.check()


def compare_edges(name: str, model: CompiledModel) -> Counter[str]:
    """Leave each edge of each schedule of a case out of the proof and out of the run."""
    case, counts = CASES[name], Counter[str]()
    wanted = case.reference(model)
    with model.cache(**case.sizes) as cache, simulated(cache, seed=1, synchronize=False) as run:
        places = Places(run, cache.session)
        with places.following(model):
            found = play(model, cache, case.calls)
    assert equal(found, wanted)
    run.log.check()
    for (_, prologue), schedule in places.used.items():
        for edge, needed in edges_of(schedule, prologue).items():
            # What only earlier sites can have left unfinished may be finished in this very run.
            of_this_site = waits_for_this_site(schedule, ops_in(schedule)[edge[2]])
            killed, raced = killed_by_verifier(schedule, edge), raced_without(run, edge)
            assert killed == needed >= raced, (edge, killed, needed, raced)
            assert raced or not of_this_site, edge
            counts[f"needed={needed}, race={raced}"] += 1
    return counts


def waits_for_this_site(schedule: Schedule, op: Node) -> bool:
    """Whether an op waits for its own site: not where it reads what the tail held before."""
    if opname(op) == "offload":
        piece: Any = op.args[2].args[4]  # type: ignore[union-attr]
        return schedule.key.appends or schedule.key.pieces[piece].source == "new"
    return opname(op) == "wait"


def raced_without(run: Simulation, edge: Edge) -> bool:
    return bool(replay(run.log.entries, {edge}).races)


@pytest.mark.parametrize("name", ["one page", "new prompt"])
def test_verifier_and_simulator_find_the_same_edges(name: str, model: CompiledModel) -> None:
    counts = compare_edges(name, model)
    print(name, dict(counts))
    assert counts["needed=True, race=True"] > counts["needed=True, race=False"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - {"one page", "new prompt"}))
def test_verifier_and_simulator_find_the_same_edges_of_long_runs(
    name: str, model: CompiledModel
) -> None:
    counts = compare_edges(name, model)
    print(name, dict(counts))
    assert counts["needed=True, race=True"] > counts["needed=True, race=False"]


def test_two_caches_alternate(model: CompiledModel) -> None:
    model.use()
    calls = (40, *[1] * 6)
    with model.cache() as one, model.cache() as two:
        wanted = [play(model, one, calls), play(model, two, calls, seed=1)]
    for seed in range(3):
        found: list[list[Tensor]] = [[], []]
        caches, at = [model.cache(), model.cache()], 0
        with simulated(caches[0], seed=seed), simulated(caches[1], seed=seed + 1):
            for count in calls:
                for index, cache in enumerate(caches):
                    part = random_ids(index, 512)[:, at : at + count]
                    with torch.no_grad():
                        out = model.model(part, past_key_values=cache, use_cache=True)
                    found[index].append(out.logits)
                at += count
        assert equal(found[0], wanted[0]) and equal(found[1], wanted[1]), f"seed {seed}"


def mixed(model: CompiledModel, cache: HeadInferCache) -> list[Tensor]:
    """Logits of a call with a schedule and of two without one."""
    ids = random_ids(0, 60)
    with torch.no_grad():
        model.model(ids[:, :40], past_key_values=cache, use_cache=True)
        with torch.compiler.set_stance("force_eager"):
            return [
                model.model(part, past_key_values=cache, use_cache=True).logits
                for part in (ids[:, 40:50], ids[:, 50:])
            ]


def test_a_call_without_a_schedule_reads_what_one_with_has_written(model: CompiledModel) -> None:
    model.use()
    edge, broken = "compute waits for pages.written", 0
    with model.cache() as cache:
        wanted = mixed(model, cache)
    for seed in range(16):
        drop = edge if seed % 2 else None
        with model.cache() as cache, simulated(cache, seed=seed, drop=drop) as simulation:
            same = equal(mixed(model, cache), wanted)
        assert simulation.edges[edge] == 2 * model.layers
        assert same or drop, f"seed {seed}"
        broken += not same
    assert broken, f"without {edge!r}, 8 orders gave the right logits"


def calls_of() -> st.SearchStrategy[Calls]:
    """A first chunk, then steps, turns, crops, resets, other options and interrupted calls."""
    step = st.sampled_from((1, 1, 1, 1, 7, 25))
    options: list[int | dict[str, Any] | str] = [
        {"num_slots": 4, "head_group": 1},
        {"num_slots": 2, "workspace_bytes": 1},
        {"disable_passes": ["hoist_prefetch"]},
        "fault",
    ]
    change = st.sampled_from([-1, -6, -12, 0, *options])
    piece = st.tuples(st.lists(step, min_size=1, max_size=5), change, step).map(
        lambda found: (*found[0], found[1], found[2])
    )
    rest = st.lists(piece, min_size=1, max_size=3)
    return st.builds(
        lambda first, tail: (first, *(call for calls in tail for call in calls)),
        st.integers(20, 60),
        rest,
    )


REORDERED: Calls = (24, 1, 1, "swap", *[1] * 5, "first", *[1] * 6, -3, "second", 7, 1, "swap", 1, 1)


@pytest.mark.parametrize("budget", [0, 20_000])
def test_rows_are_reordered_between_steps_in_any_order(budget: int, model: CompiledModel) -> None:
    model.use(num_slots=2)
    sizes = {"page_tokens": 8, "tail_tokens": 4, "gpu_budget": budget}
    with model.cache(**sizes) as cache:
        wanted = play(model, cache, REORDERED, batch=2)
    for seed in range(4):
        with (
            model.cache(**sizes) as cache,
            simulated(cache, seed=seed, synchronize=bool(seed % 2)) as simulation,
        ):
            found = play(model, cache, REORDERED, batch=2)
        assert equal(found, wanted), f"seed {seed}"
        simulation.log.check()


@given(
    calls=calls_of(),
    seed=st.integers(0, 2**32),
    num_slots=st.integers(2, 4),
    page_tokens=st.sampled_from((8, 16, 64)),
    tail_tokens=st.integers(1, 6),
    gpu_budget=st.sampled_from((0, 8192)),
    synchronize=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_any_sequence_of_calls_in_any_order(
    model: CompiledModel, calls: Calls, seed: int, num_slots: int, synchronize: bool, **sizes: int
) -> None:
    case = Case(calls, {"num_slots": num_slots}, dict(sizes))
    found, simulation = case.run(model, seed=seed, synchronize=synchronize)
    assert equal(found, case.reference(model))
    simulation.log.check()


def test_only_a_new_cache_can_be_simulated(model: CompiledModel) -> None:
    with model.cache() as cache:
        play(model, cache, (20,))
        with pytest.raises(HeadInferError, match="make a new one"), simulated(cache, seed=0):
            pass


def test_a_copy_stream_may_touch_only_memory_of_the_session(model: CompiledModel) -> None:
    model.use()
    with model.cache() as cache, simulated(cache, seed=0) as simulation:
        play(model, cache, (20,))
        with simulation.on("d2h"), pytest.raises(HeadInferError, match="not the session's"):
            torch.zeros(2).copy_(torch.ones(2))
        assert simulation.edges
