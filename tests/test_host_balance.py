"""The share of the CPU: moved by what sites observe until it pays no more, without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from headinfer_compile.runtime.host_balance import Balance, Race, Races


def settle(link: float, cpu: float, blocks: int, steps: int = 120) -> tuple[Balance, list[float]]:
    """Let a balance find its share; seconds of a block on the link and on the CPU."""
    balance, times = Balance(), []
    for _ in range(steps):
        count = balance.count(blocks)
        ends = (blocks - count) * link, count * cpu
        times.append(max(ends))
        balance.update(blocks, count, [ends[0] - ends[1]] * 3, cpu, 0.6 * link)
    return balance, times


@pytest.mark.parametrize("blocks", [2, 7, 16, 64])
@pytest.mark.parametrize(("link", "cpu"), [(1.0, 0.6), (1.0, 1.0), (0.6, 1.0), (1.0, 0.3)])
def test_the_share_moves_until_both_finish_together(blocks: int, link: float, cpu: float) -> None:
    best = min(max((blocks - n) * link, n * cpu) for n in range(blocks + 1))
    _, times = settle(link, cpu, blocks)
    assert times[-1] <= 1.1 * best
    assert len({*times[-20:]}) == 1, "it does not come to rest"


@pytest.mark.parametrize("cpu", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("blocks", [6, 16, 64])
def test_transfers_ahead_do_not_look_like_a_late_cpu(blocks: int, cpu: float) -> None:
    """While compute waits for the CPU, the link fills slots for the sites to come."""
    link, dense, slots = 1.0, 0.5, 3

    def site(count: int) -> tuple[float, float]:
        sent, attended = (blocks - count) * link, count * cpu + dense
        ahead = min(slots * link, max(0.0, attended - sent) * slots)
        return max(sent, attended), sent - ahead - attended

    balance, counts = Balance(), []
    for _ in range(160):
        counts.append(balance.count(blocks))
        balance.update(blocks, counts[-1], [site(counts[-1])[1]] * 3, cpu, 0.6 * link)
    best = min(site(count)[0] for count in range(blocks + 1))
    assert site(counts[-1])[0] <= best + max(cpu, 0.1 * best)
    assert len({*counts[-20:]}) == 1, "it does not come to rest"


@pytest.mark.parametrize("blocks", [1, 4, 16, 64])
def test_a_slow_cpu_is_left_out(blocks: int) -> None:
    balance, times = settle(1.0, 200.0, blocks)
    assert balance.count(blocks) == 0
    assert times[-1] == blocks


def test_an_outlier_does_not_decide() -> None:
    balance = Balance(0.5)
    balance.update(16, 8, [-1.0], 1e-3, 1e-3)
    assert balance.count(16) == 8
    balance.update(16, 8, [1e-4], 1e-3, 1e-3)
    balance.update(16, 8, [-1.0], 1e-3, 1e-3)
    assert balance.count(16) == 8
    balance.update(16, 8, [-1.0], 1e-3, 1e-3)
    assert balance.count(16) == 6


def test_a_cpu_that_was_left_out_is_tried_again_and_less_and_less_often() -> None:
    balance, tries = Balance(1 / 16), []
    for step in range(400):
        balance.begin_step()
        count = balance.count(16)
        if count:
            tries.append(step)
            balance.update(16, count, [-0.5], 1e-3, 1e-3)
    assert 0 < len(tries) < 12
    gaps = [b - a for a, b in pairwise(tries) if b - a > 1]
    assert gaps == sorted(gaps) and gaps[0] >= 32


def test_an_observation_of_another_count_moves_nothing() -> None:
    balance = Balance(0.5)
    balance.update(16, 3, [1.0], 1e-3, 1e-3)
    balance.update(16, 8, [], 1e-3, 1e-3)
    balance.update(16, 8, [1e-3], 1e-3, 1e-3)
    assert balance.share == 0.5


@dataclass
class At:
    """A timing event that is reached at a time, or never."""

    milliseconds: float | None

    def query(self) -> bool:
        return self.milliseconds is not None

    def synchronize(self) -> None:
        raise AssertionError("nothing waits for an event")

    def elapsed_time(self, end: At, /) -> float:
        assert end.milliseconds is not None and self.milliseconds is not None
        return end.milliseconds - self.milliseconds


def test_races_are_settled_without_waiting() -> None:
    balance, races = Balance(0.5), Races()
    for cpu, gpu in ((5.0, 9.0), (5.0, 9.5), (5.0, 9.0), (None, None)):
        races.add(Race(balance, 16, 8, 1_000_000, At(cpu), At(gpu)))
    races.settle(cpu_rate=1e9)
    assert balance.lead_seconds == pytest.approx(4e-3)
    assert balance.count(16) == 8
    share = balance.share
    races.settle(cpu_rate=1e9)
    assert balance.share == share
