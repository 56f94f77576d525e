"""What the proof refuses, run in the simulator: found by both, or explained.

A mutant whose values never differ is explained either by a race that the detector sees in its run,
or, where there is none, by program order, which then gives bitwise the right values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness import clean_dynamo, one_thread
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.step import KVBlock
from headinfer_compile.simulator import SimulatedStreams
from mutant_runs import Scene, Stage, Tally, run_mutants, run_orders

SCENES = {
    "two slots": Scene((40, 1, 1, 1, 1), {"num_slots": 2}),
    "three slots": Scene(
        (24, 12, 1, 1),
        {"num_slots": 3, "prefetch_distance": 2, "head_group": 1},
        {"tail_tokens": 2},
    ),
    "some resident": Scene((24, 12, 1, 1), {"workspace_bytes": 1}, {"gpu_budget": 10_000}),
    "pieces": Scene((136, 1), {"slot_tokens": 256}),
}

#: Kinds of mutants of every scene.
KINDS = frozenset(
    {"delay", "drop", "duplicate", "flip", "hoist", "input", "item", "number", "release early",
     "return", "swap", "swap ring outputs", "token", "view"}
)  # fmt: skip
#: Mutants of each kind and op, of all schedules of a scene, in the slow test.
MANY = 12

#: Kinds that a scene must show the simulator to find, with the op that is changed.
FINDS = {
    "two slots": [("drop", "wait"), ("swap", ""), ("release early", ""), ("hoist too far", "")],
    "three slots": [("release early", ""), ("hoist too far", ""), ("shrink the ring", "")],
    "some resident": [("drop", "release"), ("swap ring outputs", "")],
    # A staging buffer is packed again before its copy.
    "pieces": [("hoist", "pack")],
}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One model, compiled once for all tests of this file."""
    with one_thread(), clean_dynamo():
        yield Stage()


def check(name: str, tally: Tally, kinds: frozenset[str]) -> None:
    print(f"\n{name}\n{tally}")
    assert not tally.unexplained, "\n".join(tally.unexplained[:10])
    assert tally.kinds.keys() == kinds
    for kind, op in FINDS[name]:
        assert any(what.startswith("both") for what in tally.of(kind, op)), (kind, op)


def kinds_of(name: str) -> frozenset[str]:
    """Kinds that a scene has: those of every scene, and those that it is there for."""
    return KINDS | {kind for kind, _ in FINDS[name]}


def test_a_mutant_of_each_kind_is_found_or_explained(stage: Stage) -> None:
    name = "three slots"
    tally = run_mutants(stage, SCENES[name], most=2, orders=2, seed=0, by_op=False)
    check(name, tally, kinds_of(name))


def test_staging_that_is_reused_early_is_found(stage: Stage) -> None:
    kinds = frozenset({"hoist"})
    tally = run_mutants(stage, SCENES["pieces"], most=4, orders=3, seed=0, kinds=kinds)
    check("pieces", tally, kinds)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENES)
def test_mutants_are_found_or_explained(name: str, stage: Stage, seed: int) -> None:
    tally = run_mutants(stage, SCENES[name], most=MANY, orders=8, seed=seed)
    check(name, tally, kinds_of(name))
    total = sum(tally.counts.values(), tally.of("none"))
    assert total["both: values"] and total["both: error"]
    assert total["both: race"] or name == "pieces"
    assert total["not executable"] == sum(tally.why.values()) > 0
    assert total["proof only"] and total["proved"] and tally.guarded


def skip_tag_check(patch: pytest.MonkeyPatch) -> None:
    """Take whatever is in flight for what the site expects."""

    def tags(session: Session, layer: int, transfers: Any) -> tuple[object, ...]:
        return ("any",) * len(transfers)

    patch.setattr(Session, "transfer_tags", tags)


def keep_stale_version(patch: pytest.MonkeyPatch) -> None:
    """Know a transfer by its page alone, and keep those in flight when pages are given up."""
    patch.setattr(KVBlock, "tag", property(lambda block: [page.index for page, _ in block.pages]))
    give_up = Session.crop

    def crop(session: Session, count: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Session, "drain", lambda session: None)
            give_up(session, count)

    patch.setattr(Session, "crop", crop)


def skip_drain(patch: pytest.MonkeyPatch) -> None:
    """Give the ring up while transfers into it are under way."""
    patch.setattr(SimulatedStreams, "join", lambda streams, role, other: None)


#: Mutants of what is the runtime's and in no schedule: how, and calls in which it matters.
RUNTIME: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Scene]] = {
    "skip a tag check": (
        skip_tag_check,
        Scene((40, 1, 200, 1), {"num_slots": 2, "head_group": {"prefill": 1, "decode": 2}}),
    ),
    "keep a stale version": (keep_stale_version, Scene((40, 1, 1, -34, 1, 1), {"num_slots": 2})),
    "skip a drain": (skip_drain, Scene((40, 1, 1, -34, 1, 1), {"num_slots": 2})),
}


@pytest.mark.parametrize("name", RUNTIME)
def test_a_mutant_of_the_runtime_is_found(name: str, stage: Stage) -> None:
    change, scene = RUNTIME[name]
    wanted = stage.reference(scene)
    assert run_orders(stage, scene, wanted, range(3)).kind == "same"
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        found = run_orders(stage, scene, wanted, range(8))
    print(name, found)
    assert found.kind in ("values", "race", "error")
