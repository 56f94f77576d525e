"""Batches and masks in any order of the streams: bitwise as in program order, and as the oracle.

The oracle is the same model, uncompiled, on K and V that are concatenated and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import MAX_LOGIT_DIFFERENCE, clean_dynamo, one_thread
from headinfer_compile import HeadInferCache
from headinfer_compile.simulator import simulated
from mutant_runs import LAYERS, VOCAB, Scene, Stage, equal

WINDOW = 11
#: What a query sees beside what causality hides.
MASKS = ("causal", "window", "padding", "window and padding", "additive")
#: Those that the default tests try: each mask has graphs of its own to compile.
QUICK = ("window and padding", "additive")


@dataclass(frozen=True)
class Batch:
    """Rows of a batch: padding before each, and the mask."""

    mask: str
    pads: tuple[int, ...]
    seed: int

    def inputs(self, past: int, new: int) -> dict[str, Any]:
        """Mask and window of a call."""
        window = WINDOW if "window" in self.mask else 0
        if self.mask == "additive":
            return {"mask": self._additive(past, new)}
        if "padding" in self.mask:
            return {"mask": self._valid(past + new), "window": window}
        return {"window": window}

    def _valid(self, total: int) -> Tensor:
        return torch.arange(total) >= torch.tensor(self.pads)[:, None]

    def _additive(self, past: int, new: int) -> Tensor:
        """``[B, 1, n, S]``: a bias of each pair of tokens, other in each row; what is hidden."""
        at, kv = torch.arange(new)[:, None] + past, torch.arange(past + new)
        rows = torch.arange(len(self.pads))[:, None, None]
        bias = (at * 0.37 + kv * 0.61 + rows).sin()
        seen = (kv <= at) & self._valid(past + new)[:, None, :]
        return bias.masked_fill(~seen, float("-inf"))[:, None]

    def play(self, model: Any, cache: Any, calls: Sequence[int]) -> list[Tensor]:
        """The results of each call at the tokens that are no padding, row after row."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, VOCAB, (len(self.pads), 1024), generator=generator)
        at, found = 0, []
        with torch.no_grad():
            for count in calls:
                if count <= 0:
                    cache.crop(count or -cache.get_seq_length())
                    continue
                past = cache.get_seq_length()
                part = ids[:, at : at + count]
                out = model(part, cache, **self.inputs(past, count))
                found.append((out, past))
                at += count
        return [out[row, max(0, pad - past) :]
                for out, past in found for row, pad in enumerate(self.pads)]  # fmt: skip


class Resident:
    """All K and V of all layers."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Tokens of the last layer."""
        return self.kv[LAYERS - 1][0].shape[2] if self.kv else 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, n, D]`` in, ``[B, Hkv, S, D]`` out."""
        if layer in self.kv:
            k, v = (torch.cat([old, x], 2) for old, x in zip(self.kv[layer], (k, v), strict=True))
        self.kv[layer] = k, v
        return k, v

    def crop(self, count: int) -> None:
        """Drop the newest ``-count`` tokens."""
        left = self.get_seq_length() + count
        self.kv = {i: (k[:, :, :left], v[:, :, :left]) for i, (k, v) in self.kv.items()}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One model for all tests of this file."""
    with one_thread(), clean_dynamo():
        yield Stage()


def check(stage: Stage, batch: Batch, calls: Sequence[int], scene: Scene, seed: int) -> None:
    """One order of the streams, program order and the oracle."""
    oracle = batch.play(type(stage.model).forward.__get__(stage.model), Resident(), calls)
    graphs = -1
    # Dynamo may make a graph anew when a length changes first, with other kernels.
    while graphs != len(stage.graphs):
        graphs = len(stage.graphs)
        with stage.cache(scene) as cache:
            wanted = batch.play(stage.model, cache, calls)
            served(cache)
    for found, right in zip(wanted, oracle, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=MAX_LOGIT_DIFFERENCE)
    with stage.cache(scene) as cache:
        with simulated(cache, seed=seed, synchronize=bool(seed % 2)) as simulation:
            in_order = batch.play(stage.model, cache, calls)
        served(cache)
    assert graphs == len(stage.graphs)
    assert equal(in_order, wanted)
    simulation.log.check()


def served(cache: HeadInferCache) -> None:
    """No fallback took the place of the schedules."""
    stats = cache.stats()
    assert stats.h2d_bytes > 0 and stats.sites_rewritten == LAYERS
    assert stats.eager_updates == stats.materialised_layers == 0


def sequences() -> st.SearchStrategy[tuple[int, ...]]:
    """A first chunk longer than any padding, then chunks, steps and crops."""
    step = st.sampled_from((1, 1, 1, 7, 25))
    return st.builds(
        lambda first, one, crop, two: (first, *one, crop, *two),
        st.integers(20, 40),
        st.lists(step, min_size=2, max_size=5),
        st.sampled_from((-1, -4, -8)),
        st.lists(step, min_size=1, max_size=4),
    )


def any_case(masks: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What the properties vary."""
    return given(
        batch=st.builds(
            Batch,
            st.sampled_from(masks),
            st.lists(st.integers(0, 8), min_size=1, max_size=3).map(tuple),
            st.integers(0, 2**31),
        ),
        calls=sequences(),
        num_slots=st.integers(2, 4),
        head_group=st.integers(1, 2),
        page_tokens=st.sampled_from((8, 16)),
        tail_tokens=st.integers(1, 5),
        seed=st.integers(0, 2**31),
    )


def run_case(
    stage: Stage, batch: Batch, calls: Sequence[int], num_slots: int, head_group: int, seed: int,
    **sizes: int,
) -> None:  # fmt: skip
    scene = Scene((), {"num_slots": num_slots, "head_group": head_group}, dict(sizes))
    check(stage, batch, calls, scene, seed)


@pytest.mark.parametrize(
    "mask",
    [pytest.param(mask, marks=() if mask in QUICK else pytest.mark.slow) for mask in MASKS],
)
def test_unequal_rows_in_any_order(mask: str, stage: Stage, seed: int) -> None:
    scene = Scene((), {"num_slots": 2}, {"page_tokens": 8})
    check(stage, Batch(mask, (3, 0, 7), seed), (24, 7, 1, 1, 1, -4, 1, 1), scene, seed)


@any_case(QUICK)
@settings(max_examples=3, deadline=None)
def test_any_batch_and_mask_in_any_order(stage: Stage, **case: Any) -> None:
    run_case(stage, **case)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_many_batches_of_a_mask_in_any_order(mask: str, stage: Stage) -> None:
    @any_case((mask,))
    @settings(max_examples=40, deadline=None)
    def check_case(**case: Any) -> None:
        run_case(stage, **case)

    check_case()
