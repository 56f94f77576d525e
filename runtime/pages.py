"""Token blocks: the pages of all layers for a range of tokens, resident on the GPU or on the host.

A page is K and V of one layer in one token block, ``[Hkv, 2, B, T, D]`` (``spec.kv_views``). Blocks
are placed once and never move, grow or are copied again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.block_plan import BlockPlan, Tier
from headinfer_compile.runtime.slab import HostSlab, SlabAllocator
from headinfer_compile.runtime.spec import Geometry, kv_views

log = logging.getLogger(__name__)

Views = tuple[torch.Tensor, torch.Tensor]


@dataclass
class TokenBlock:
    """Tokens ``[start, start + tokens)`` of every layer."""

    index: int
    start: int
    tokens: int
    tier: Tier
    pages: list[Views]
    nbytes: int
    slab: HostSlab | None
    version: int = 0
    """Bumped when rows that may have been read are given up for rewriting."""


@dataclass
class BlockTable:
    """All token blocks of one cache, in order."""

    geometry: Geometry
    page_tokens: int | None
    gpu_budget: int
    """Bytes of resident blocks."""
    host_budget: int
    room: Callable[[], int]
    """Bytes that the device has for further resident blocks now: others may allocate too."""
    blocks: list[TokenBlock] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._slabs = SlabAllocator(self.geometry.device)
        self.largest_page_tokens = self._block_plan().tokens_of(64)
        """Tokens of the largest page this table will ever make."""

    def _block_plan(self) -> BlockPlan:
        """The blocks there are, as a plan that may grow."""
        held = self.bytes_on("gpu")
        on_host = any(block.tier == "host" for block in self.blocks)
        budget = self.gpu_budget
        if held < budget and not on_host:
            budget = min(budget, held + max(0, self.room()))
        return BlockPlan(
            self.geometry.layer_token_bytes,
            self.geometry.num_layers,
            self.page_tokens,
            budget,
            capacity=self.capacity,
            gpu_bytes=held,
            host_bytes=self.bytes_on("host"),
            count=len(self.blocks),
            on_host=on_host,
        )

    @property
    def capacity(self) -> int:
        """Tokens for which there are pages."""
        return self.blocks[-1].start + self.blocks[-1].tokens if self.blocks else 0

    def bytes_on(self, tier: str) -> int:
        """Bytes of the blocks on ``"gpu"`` or ``"host"``."""
        return sum(block.nbytes for block in self.blocks if block.tier == tier)

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest host slab so far, the granularity of host memory."""
        return max((block.nbytes for block in self.blocks if block.slab), default=0)

    def plan(self, tokens: int) -> list[tuple[int, Tier]]:
        """Tokens and tier of the blocks still to be made to hold ``tokens`` tokens.

        Raises:
            DoesNotFitError: The host budget does not hold them. Nothing has been made.
        """
        plan = self._block_plan()
        made = plan.grow(tokens)
        if plan.host_bytes > self.host_budget:
            longest = self._block_plan().longest(self.host_budget)
            everything = plan.gpu_bytes + plan.host_bytes
            raise DoesNotFitError(
                f"{tokens} tokens need {format_bytes(plan.host_bytes)} of host memory for KV pages "
                f"beside {format_bytes(plan.gpu_bytes)} on the GPU, and host_budget is "
                f"{format_bytes(self.host_budget)}. What would work: a context of at most "
                f"{longest} tokens; host_budget={plan.host_bytes}; "
                f"gpu_budget={everything - self.host_budget}, where the GPU has room for it. "
                "What is stored is intact"
            )
        return made

    def ensure(self, tokens: int) -> None:
        """Make blocks until there are pages for ``tokens`` tokens.

        Raises:
            DoesNotFitError: Budget or machine do not hold them; what was stored is intact.
        """
        for count, tier in self.plan(tokens):
            self._append(count, tier)

    def prepare(self, tokens: int) -> bool:
        """Start making, in the background, the host slabs still missing for ``tokens`` tokens.

        Slabs prepared for more than that are given back.

        Returns:
            Whether they fit; the caller has not asked for them yet, and ``ensure`` raises if it
            does.
        """
        try:
            made = self.plan(tokens)
        except DoesNotFitError:
            return False
        self._slabs.prepare([self._slab_size(count) for count, tier in made if tier == "host"])
        return True

    @property
    def longest(self) -> int:
        """The most tokens that fit under the budgets."""
        return self._block_plan().longest(self.host_budget)

    def _slab_size(self, tokens: int) -> tuple[int, int]:
        return tokens * self.geometry.token_bytes, tokens * self.geometry.layer_token_bytes

    def _append(self, tokens: int, tier: Tier) -> None:
        geometry = self.geometry
        nbytes, page_bytes = self._slab_size(tokens)
        slab = None
        buffer: torch.Tensor | None = None
        if tier == "gpu":
            try:
                with torch.inference_mode(False):
                    buffer = torch.empty(nbytes, dtype=torch.uint8, device=geometry.device)
            except torch.OutOfMemoryError:
                log.warning(
                    "the GPU has no room for another resident block of %s: the rest of the KV goes "
                    "to the host",
                    format_bytes(nbytes),
                )
                self.gpu_budget, tier = self.bytes_on("gpu"), "host"
        if buffer is None:
            slab = self._slabs.take(nbytes, page_bytes)
            buffer = slab.tensor
        elements = page_bytes // geometry.dtype.itemsize
        # A view in another dtype made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            typed = buffer.view(geometry.dtype)
            pages = [
                kv_views(typed[at : at + elements], geometry, geometry.num_kv_heads, tokens)
                for at in range(0, elements * geometry.num_layers, elements)
            ]
        self.blocks.append(
            TokenBlock(len(self.blocks), self.capacity, tokens, tier, pages, nbytes, slab)
        )

    def close(self) -> None:
        """Give every block back."""
        for block in self.blocks:
            block.pages.clear()
            if block.slab is not None:
                block.slab.close()
        self.blocks.clear()
        self._slabs.close()
