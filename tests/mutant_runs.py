"""Runs broken schedules in the simulator, and says what came of each.

A run without a race gives in every order what program order gives. So a mutant that the proof
refuses and the simulator does not notice is explained by two facts that share no code with the
proof: no two conflicting accesses of its run are unordered, and in program order its results are
bitwise those of the schedule it was made from. It is redundant in values, in these calls.

The runtime's own guards (a slot that is not released, a transfer that is in no slot) are off:
``Unguarded`` counts what they would have refused and lets the run go on.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from headinfer_compile import HeadInferCache, HeadInferConfig, headinfer
from headinfer_compile.errors import HeadInferError, ScheduleError
from headinfer_compile.executor import CompiledGraph
from headinfer_compile.passes import verify
from headinfer_compile.passes.schedule import PlanKey, Schedule
from headinfer_compile.passes.schedule_code import compile_schedule
from headinfer_compile.runtime import block_ops
from headinfer_compile.runtime.attention import AttentionRequest, Kernel, kernel_table
from headinfer_compile.runtime.slots import Slot, SlotRing
from headinfer_compile.simulator import Simulation, simulated
from mutator import Mutant, mutants

VOCAB, HEADS, KV_HEADS, DIM, LAYERS = 61, 4, 2, 8, 2
WIDTH = (HEADS + 2 * KV_HEADS) * DIM

#: What a schedule that is no schedule may raise, whichever op meets it first.
ERRORS = (
    HeadInferError, RuntimeError, TypeError, ValueError, NameError, LookupError, AssertionError,
    AttributeError, ArithmeticError,
)  # fmt: skip


class Sites(nn.Module):
    """Two attentions and next to nothing between them: a run is mostly its schedules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in range(LAYERS))

    def forward(
        self, ids: Tensor, cache: Any, mask: Tensor | None = None, window: int = 0
    ) -> Tensor:
        """``[B, n, WIDTH]`` of ids ``[B, n]``.

        Args:
            ids: New tokens.
            cache: With ``get_seq_length`` and ``update``.
            mask: ``[B, S]``, the columns that are no padding; or what attention is given,
                ``[B, 1, n, S]``.
            window: Tokens that a query sees; 0: all before it.
        """
        past, (batch, new) = cache.get_seq_length(), ids.shape
        at = torch.arange(new) + past
        x: Tensor = self.embed(ids) + at[:, None].sin()
        for layer, mix in enumerate(self.mix):
            qkv = x.view(batch, new, -1, DIM).transpose(1, 2)
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            k, v = cache.update(k, v, layer)
            kv = torch.arange(past + new)
            seen = kv <= at[:, None]
            if window:
                seen = seen & (kv > at[:, None] - window)
            if mask is not None:
                seen = mask if mask.dim() == 4 else seen & mask[:, None, None, :]
            a = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            x = x + mix(a.transpose(1, 2).reshape(batch, new, -1))
        return x


@dataclass(frozen=True)
class Scene:
    """Calls, options of the backend and of the cache; a negative count crops."""

    calls: tuple[int, ...]
    options: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=dict)


class Stage:
    """A model, compiled once, on which scenes are played."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.graphs: list[CompiledGraph] = []
        self.model = Sites().eval()
        self.model.compile(backend=self._backend)
        self.ids = torch.randint(0, VOCAB, (1, 4096))

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = headinfer(gm, example_inputs, options={"lowering": "eager"})
        assert isinstance(compiled, CompiledGraph)
        self.graphs.append(compiled)
        return compiled

    def cache(self, scene: Scene) -> HeadInferCache:
        """A new cache for a scene, whose options the compiled graphs have from now on."""
        for graph in self.graphs:
            graph.config = HeadInferConfig.from_options({"lowering": "eager", **scene.options})
        sizes = {"page_tokens": 16, "tail_tokens": 3, "gpu_budget": 0, **scene.sizes}
        return HeadInferCache.from_shape(
            num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, **sizes
        )

    def play(self, scene: Scene, cache: HeadInferCache) -> list[Tensor]:
        """The results of each call."""
        at, found = 0, []
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_ops, "select", plain_kernel)
            for count in scene.calls:
                if count < 0:
                    cache.crop(count)
                else:
                    found.append(self.model(self.ids[:, at : at + count], cache))
                    at += count
        return found

    def reference(self, scene: Scene) -> list[Tensor]:
        """The results in program order."""
        with self.cache(scene) as cache:
            found = self.play(scene, cache)
            stats = cache.stats()
            assert stats.h2d_bytes > 0 and stats.sites_rewritten == LAYERS
            assert stats.eager_updates == stats.materialised_layers == 0
        return found

    def books(self) -> list[tuple[dict[PlanKey, Schedule], bool]]:
        """Schedules and prologues of each graph; whether they are prologues."""
        books = [(graph.schedules, False) for graph in self.graphs]
        return [*books, *((graph.prologues, True) for graph in self.graphs)]

    def schedules(self, scene: Scene) -> list[tuple[dict[PlanKey, Schedule], PlanKey, bool]]:
        """Where each schedule that a scene runs is kept."""
        # Dynamo makes a graph anew when a length changes first.
        self.reference(scene)
        for book, _ in self.books():
            book.clear()
        self.reference(scene)
        return [(book, key, prologue) for book, prologue in self.books() for key in book]


def plain_kernel(request: AttentionRequest) -> Kernel:
    """The kernel that raises on shapes that do not fit; torch's flash kernel ends the process."""
    (kernel,) = (kernel for kernel in kernel_table() if kernel.name == "math")
    return kernel


class Unguarded:
    """Does with the ring what a schedule says; ``refused`` is what its guards would have done."""

    def __init__(self) -> None:
        self.refused = 0
        self._held: dict[tuple[SlotRing, int], Slot] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take the guards off."""
        acquire, find = SlotRing.acquire, SlotRing.find

        def acquired(
            ring: SlotRing, index: int, after: int, tag: tuple[object, ...]
        ) -> tuple[int, Slot]:
            slot = ring.slots[index]
            if slot.transfer != after or not slot.released:
                self.refused += 1
                slot.transfer, slot.released = after, True
            made = acquire(ring, index, after, tag)
            self._held[ring, made[0]] = slot
            return made

        def found(ring: SlotRing, transfer: int) -> Slot:
            try:
                return find(ring, transfer)
            except ScheduleError:
                self.refused += 1
                if (ring, transfer) not in self._held:
                    raise
                return self._held[ring, transfer]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlotRing, "acquire", acquired)
            patch.setattr(SlotRing, "find", found)
            yield


@dataclass(frozen=True)
class Outcome:
    """What became of one run: ``values``, ``race``, ``error``, ``not executable``, ``same``."""

    kind: str
    detail: str = ""
    guarded: bool = False
    """Whether a guard of the runtime would have refused it as well."""


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Bitwise equality of all results."""
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def _simulate(stage: Stage, scene: Scene, seed: int) -> tuple[list[Tensor] | Exception, Simulation]:
    """The results of one order, or the error that ended it."""
    cache = stage.cache(scene)
    run = simulated(cache, seed=seed, synchronize=bool(seed % 2))
    simulation = run.__enter__()
    result: list[Tensor] | Exception
    try:
        result = stage.play(scene, cache)
        run.__exit__(None, None, None)
    except ERRORS as error:
        result = error
    simulation.finished = True
    for _ in range(100_000):
        # Each error takes one op from a queue: nothing of a broken run is left to raise later.
        try:
            simulation.synchronize()
            cache.close()
            break
        except ERRORS:
            continue
    return result, simulation


def run_orders(stage: Stage, scene: Scene, wanted: Sequence[Tensor], seeds: range) -> Outcome:
    """Play a scene in the order of each seed, until one gives other values.

    Without a race and with equal values in the first order, the others are as that one.
    """
    race, guards = "", Unguarded()
    for seed in seeds:
        with guards.active():
            result, simulation = _simulate(stage, scene, seed)
        if isinstance(result, Exception):
            return Outcome(*_reason(result), bool(guards.refused))
        race = race or next(iter(simulation.log.replay.races), "")
        if not equal(result, wanted):
            return Outcome("values", race, bool(guards.refused))
        if not race and seed > seeds.start:
            break
    return Outcome("race" if race else "same", race, bool(guards.refused))


def in_program_order(stage: Stage, scene: Scene) -> list[Tensor]:
    """The results of a scene without queues, as far as the schedules can run; guards are off."""
    with Unguarded().active(), stage.cache(scene) as cache:
        return stage.play(scene, cache)


def _reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, NameError):
        return "not executable", "uses a value before it is made"
    if "Expected a value of type" in str(error):
        return "not executable", "gives an op an argument of another type"
    return "error", type(error).__name__


def stratum(mutant: Mutant) -> tuple[str, str]:
    """Kind of a mutant and the op that it changes."""
    name = re.match(r"[a-z_]*[a-z]", mutant.what)
    return mutant.kind, name[0].removesuffix("_default") if name else ""


@dataclass
class Tally:
    """Outcomes by kind of mutant and op."""

    counts: dict[tuple[str, str], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    why: Counter[str] = field(default_factory=Counter)
    guarded: int = 0
    """Mutants that the guards of the runtime would have refused as well."""
    unexplained: list[str] = field(default_factory=list)

    def of(self, kind: str, op: str = "") -> Counter[str]:
        """Counts of a kind, over all ops or of one."""
        found: Counter[str] = Counter()
        for (its_kind, its_op), counts in self.counts.items():
            if its_kind == kind and op in ("", its_op):
                found += counts
        return found

    @property
    def kinds(self) -> dict[str, Counter[str]]:
        """Counts by kind."""
        return {kind: self.of(kind) for kind, _ in sorted(self.counts)}

    def __str__(self) -> str:
        lines = [f"{kind:20} {dict(sorted(counts.items()))}" for kind, counts in self.kinds.items()]
        total: Counter[str] = sum(self.counts.values(), Counter())
        lines += [f"{'all':20} {dict(sorted(total.items()))}"]
        return "\n".join([*lines, f"not executable: {dict(self.why)}; guarded: {self.guarded}"])


def run_mutants(
    stage: Stage, scene: Scene, most: int, orders: int, seed: int,
    kinds: frozenset[str] = frozenset(), by_op: bool = True,
) -> Tally:  # fmt: skip
    """Run up to ``most`` mutants of each kind and op of the schedules of a scene.

    Args:
        stage: The model.
        scene: What is played with each mutant.
        most: Mutants of one kind and op, drawn from all schedules of the scene.
        orders: Orders in which each is played at most.
        seed: Which are drawn.
        kinds: Those to run; none: all.
        by_op: Draw from each kind and op, not from each kind.
    """
    tally, places = Tally(), stage.schedules(scene)
    wanted = stage.reference(scene)
    assert run_orders(stage, scene, wanted, range(orders)).kind == "same"
    strata: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for number, (book, key, _) in enumerate(places):
        for index, mutant in enumerate(mutants(book[key].graph_module, key)):
            if not kinds or mutant.kind in kinds:
                kind, op = stratum(mutant)
                strata[kind, op if by_op else ""].append((number, index))
    draw = random.Random(seed)
    chosen = {
        place for found in strata.values() for place in draw.sample(found, min(most, len(found)))
    }
    for number, (book, key, prologue) in enumerate(places):
        schedule = book[key]
        if all(place[0] != number for place in chosen):
            continue
        for index, mutant in enumerate(mutants(schedule.graph_module, key)):
            if (number, index) in chosen:
                book[key] = replace(schedule, function=compile_schedule(mutant.graph_module))
                refused = _refused(mutant.graph_module, key, prologue)
                _count(tally, stage, scene, wanted, mutant, refused, range(orders))
        book[key] = schedule
    return tally


def _refused(gm: GraphModule, key: PlanKey, prologue: bool) -> bool:
    try:
        verify.run(gm, key, prologue=prologue)
    except ScheduleError:
        return True
    return False


def _count(
    tally: Tally, stage: Stage, scene: Scene, wanted: Sequence[Tensor], mutant: Mutant,
    refused: bool, seeds: range,
) -> None:  # fmt: skip
    found, counts = run_orders(stage, scene, wanted, seeds), tally.counts[stratum(mutant)]
    what = f"{mutant.kind}: {mutant.what}"
    tally.guarded += found.guarded
    if not refused:
        counts["proved"] += 1
        if found.kind != "same":
            tally.unexplained.append(f"proved, and the simulator finds {found}: {what}")
    elif found.kind == "not executable":
        counts[found.kind] += 1
        tally.why[found.detail] += 1
    elif found.kind == "same":
        counts["proof only"] += 1
        if not equal(in_program_order(stage, scene), wanted):
            tally.unexplained.append(f"no race, and other values in program order: {what}")
    else:
        counts[f"both: {found.kind}"] += 1
