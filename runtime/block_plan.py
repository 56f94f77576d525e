"""Where the token blocks of a context go, and how long each is, before any is made."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["gpu", "host"]

PAGE_BYTES = 32 << 20
"""Transfer unit that reaches 99 % of a PCIe 5 link even behind a slow host path."""
FIRST_PAGE_TOKENS = 1024
KEPT_TOKENS = 1024
"""Tokens before what a window sees that are kept too, so that ``crop`` can go back by them."""
_LARGEST_RESIDENT_TOKENS = 65536
_MOST_TOKENS = 1 << 32


def first_kept(past: int, window: int) -> int:
    """The oldest token that a layer with a window keeps once ``past`` tokens are held."""
    return max(0, past - window + 1 - KEPT_TOKENS)


def least_bytes(tokens: int, token_bytes: int, windows: Sequence[int | None]) -> int:
    """The least bytes that hold ``tokens`` tokens of ``token_bytes`` in layers of these windows."""
    kept = [tokens if w is None else min(tokens, w + KEPT_TOKENS) for w in windows]
    return sum(kept) * token_bytes // len(kept)


@dataclass
class BlockPlan:
    """Grows block by block: resident while the budget has room, then on the host.

    Host blocks are of constant length when given, else they double up to 32 MiB pages. Resident
    blocks double what there is, so that few are attended: they are never transferred. Where the
    budget ends they become smaller again, down to the first page, so that it is used up.
    """

    layer_token_bytes: int
    """KV bytes of one token in one layer."""
    num_layers: int
    page_tokens: int | None
    """Tokens of every block; None: automatic."""
    gpu_budget: int
    """Bytes of resident blocks."""
    capacity: int = 0
    """Tokens that the blocks hold so far."""
    gpu_bytes: int = 0
    """Of resident blocks, without what layers with a window have given up of them."""
    gpu_peak_bytes: int = 0
    """The most that ``gpu_bytes`` has been."""
    host_bytes: int = 0
    count: int = 0
    """Blocks so far."""
    on_host: bool = False
    """Whether a block is on the host; then all later ones are."""
    stored_bytes: int | None = None
    """KV bytes of one token in all layers where batch rows share; None: none do."""
    windows: tuple[int, ...] = ()
    """Of the layers that keep what their window sees: its tokens."""
    chunk: int = 0
    """Tokens of a prefill chunk; they are all kept until the next one."""
    host_runs: list[tuple[int, int, int]] = field(default_factory=list)
    """Host blocks in order: start of the first, tokens of each, how many of that length."""
    gpu_runs: list[tuple[int, int]] = field(default_factory=list)
    """Start and tokens of the resident blocks made by ``grow``."""
    gpu_given_up: dict[int, int] = field(default_factory=dict)
    """By window, how many of these the layers have given up, the first ones."""

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token in all layers, as stored."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.layer_token_bytes * self.num_layers

    @property
    def gpu_tokens(self) -> int:
        """Tokens of the resident blocks made by ``grow``."""
        return sum(tokens for _, tokens in self.gpu_runs)

    @property
    def _layer_bytes(self) -> int:
        return self.token_bytes // self.num_layers

    def tokens_of(self, index: int) -> int:
        """Tokens of block ``index`` where it is a page of the host."""
        if self.page_tokens is not None:
            return self.page_tokens
        largest = max(256, PAGE_BYTES // self.layer_token_bytes)
        largest = 1 << (largest.bit_length() - 1)
        return min(largest, FIRST_PAGE_TOKENS << max(0, index - 1))

    def grow(self, tokens: int) -> list[tuple[int, Tier]]:
        """Tokens and tier of the blocks that must be added to hold ``tokens`` tokens."""
        made: list[tuple[int, Tier]] = []
        while self.capacity < tokens:
            count = 0 if self.on_host else self._resident_tokens(tokens - self.capacity)
            tier: Tier = "gpu" if count else "host"
            if count:
                self.gpu_runs.append((self.capacity, count))
                self.gpu_bytes += count * self.token_bytes
                self.gpu_peak_bytes = max(self.gpu_peak_bytes, self.gpu_bytes)
            else:
                self.on_host = True
                count = self.tokens_of(self.count)
                self._add_host(self.capacity, count, 1)
            made.append((count, tier))
            self.capacity += count
            self.count += 1
        return made

    def _add_host(self, start: int, tokens: int, count: int) -> None:
        self.host_bytes += count * tokens * self.token_bytes
        if self.host_runs:
            first, size, before = self.host_runs[-1]
            if size == tokens and first + size * before == start:
                self.host_runs.pop()
                start, count = first, count + before
        self.host_runs.append((start, tokens, count))

    def give_up(self, past: int) -> None:
        """Let layers with a window give up what they do not see of resident blocks.

        Args:
            past: Tokens held before the call whose masks prove it; not fewer than the last time.
        """
        for window, layers in Counter(self.windows).items():
            count, end = self.gpu_given_up.get(window, 0), first_kept(past, window)
            while count < len(self.gpu_runs) and sum(self.gpu_runs[count]) <= end:
                self.gpu_bytes -= self.gpu_runs[count][1] * layers * self._layer_bytes
                count += 1
            self.gpu_given_up[window] = count

    def given_up_bytes(self, tokens: int) -> int:
        """Bytes of host blocks that layers with a window have given up at ``tokens`` tokens."""
        given_up = 0
        for window in self.windows:
            end = first_kept(max(0, tokens - self.chunk), window)
            given_up += sum(
                size * min(count, max(0, end - start) // size)
                for start, size, count in self.host_runs
            )
        return given_up * self._layer_bytes

    def _resident_tokens(self, needed: int) -> int:
        """Tokens of a resident block, or 0 if the budget has no room for one."""
        room = self.gpu_budget - self.gpu_bytes
        if self.page_tokens is not None:
            return self.page_tokens if self.page_tokens * self.token_bytes <= room else 0
        smallest = self.tokens_of(0)
        wanted = max(self.capacity, needed, smallest)
        count = min(_LARGEST_RESIDENT_TOKENS, 1 << (wanted - 1).bit_length())
        while count >= smallest and count * self.token_bytes > room:
            count //= 2
        return count if count >= smallest else 0

    def longest(self, host_budget: int) -> int:
        """The most tokens that fit if host blocks may take ``host_budget`` bytes."""
        if self.windows:
            return self._longest_kept(host_budget)
        while not self.on_host or self.tokens_of(self.count) < self.tokens_of(64):
            before = self.capacity
            self.grow(before + 1)
            if self.host_bytes > host_budget:
                return before
        largest = self.tokens_of(64)
        blocks = (host_budget - self.host_bytes) // (largest * self.token_bytes)
        return self.capacity + max(0, blocks) * largest

    def _longest_kept(self, host_budget: int) -> int:
        def fits(tokens: int) -> bool:
            plan = copy.copy(self)
            plan.host_runs, plan.gpu_runs = list(self.host_runs), list(self.gpu_runs)
            plan._grow_far(tokens)
            return plan.host_bytes - plan.given_up_bytes(tokens) <= host_budget

        low, step = self.capacity, 1024
        while low < _MOST_TOKENS and fits(low + step):
            low, step = low + step, 2 * step
        while step > 1:
            step //= 2
            if fits(low + step):
                low += step
        return low

    def place(self, context: int, chunk: int) -> None:
        """Grow as a prefill of ``context`` tokens in chunks of ``chunk`` does."""
        end = 0
        while end < context and not self.on_host:
            self.give_up(end)
            end = min(end + chunk, context)
            self.grow(end)
        self._grow_far(context)

    def _grow_far(self, context: int) -> None:
        """``grow``, without a step for each host page of the largest length."""
        while self.capacity < context and not self.on_host:
            self.grow(self.capacity + 1)
        largest = self.tokens_of(64)
        while self.capacity < context and self.tokens_of(self.count) < largest:
            self.grow(self.capacity + 1)
        if self.capacity < context:
            blocks = -(-(context - self.capacity) // largest)
            self._add_host(self.capacity, largest, blocks)
            self.capacity += blocks * largest
            self.count += blocks
