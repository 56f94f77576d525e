"""Token blocks: the pages of all layers for a range of tokens, resident on the GPU or on the host.

A page is K and V of one layer in one token block, ``[Hkv, 2, B, T, D]`` (``spec.kv_views``). Blocks
are placed once and never move, grow or are copied again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.slab import HostSlab, SlabAllocator
from headinfer_compile.runtime.spec import Geometry, kv_views

log = logging.getLogger(__name__)

Views = tuple[torch.Tensor, torch.Tensor]

_PAGE_BYTES = 32 << 20
"""Transfer unit that reaches 99 % of a PCIe 5 link even behind a slow host path."""
_FIRST_PAGE_TOKENS = 1024
_LARGEST_RESIDENT_TOKENS = 65536


@dataclass
class TokenBlock:
    """Tokens ``[start, start + tokens)`` of every layer."""

    index: int
    start: int
    tokens: int
    tier: Literal["gpu", "host"]
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
    may_overflow: bool
    """Whether a resident block that the GPU refuses may go to the host (``gpu_budget="auto"``)."""
    blocks: list[TokenBlock] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._slabs = SlabAllocator(self.geometry.device)

    def tokens_of(self, index: int) -> int:
        """Tokens of block ``index``: constant when given, else doubling up to 32 MiB pages."""
        if self.page_tokens is not None:
            return self.page_tokens
        largest = max(256, _PAGE_BYTES // self.geometry.layer_token_bytes)
        largest = 1 << (largest.bit_length() - 1)
        return min(largest, _FIRST_PAGE_TOKENS << max(0, index - 1))

    @property
    def largest_page_tokens(self) -> int:
        """Tokens of the largest page this table will ever make."""
        return self.tokens_of(64)

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

    def plan(self, tokens: int) -> list[tuple[int, Literal["gpu", "host"]]]:
        """Tokens and tier of the blocks still to be made to hold ``tokens`` tokens.

        Raises:
            DoesNotFitError: The host budget does not hold them. Nothing has been made.
        """
        made: list[tuple[int, Literal["gpu", "host"]]] = []
        capacity, gpu, host = self.capacity, self.bytes_on("gpu"), self.bytes_on("host")
        on_host = any(block.tier == "host" for block in self.blocks)
        while capacity < tokens:
            index = len(self.blocks) + len(made)
            count = 0
            if not on_host:
                room = self.gpu_budget - gpu
                count = self._resident_tokens(capacity, tokens - capacity, index, room)
            if count:
                made.append((count, "gpu"))
                gpu += count * self.geometry.token_bytes
            else:
                on_host = True
                count = self.tokens_of(index)
                made.append((count, "host"))
                host += count * self.geometry.token_bytes
            capacity += count
        if host > self.host_budget:
            held = capacity - (host - self.host_budget) // self.geometry.token_bytes
            raise DoesNotFitError(
                f"{tokens} tokens need {format_bytes(host)} of host memory for KV pages beside "
                f"{format_bytes(gpu)} on the GPU, and host_budget is "
                f"{format_bytes(self.host_budget)}: raise host_budget or gpu_budget, or keep the "
                f"context under about {max(0, held)} tokens"
            )
        return made

    def _resident_tokens(self, capacity: int, needed: int, index: int, budget: int) -> int:
        """Tokens of a resident block after ``capacity`` tokens, or 0 if the budget has no room.

        Blocks double what there is, so that few are attended: a resident block is never
        transferred, and 32 MiB pages bound only its smallest size.
        """
        page = self.tokens_of(index)
        if self.page_tokens is not None:
            return page if page * self.geometry.token_bytes <= budget else 0
        wanted = max(capacity, needed, _FIRST_PAGE_TOKENS)
        count = min(_LARGEST_RESIDENT_TOKENS, 1 << (wanted - 1).bit_length())
        while count >= page and count * self.geometry.token_bytes > budget:
            count //= 2
        return count if count >= page else 0

    def ensure(self, tokens: int) -> None:
        """Make blocks until there are pages for ``tokens`` tokens.

        Raises:
            DoesNotFitError: Budget or machine do not hold them; what was stored is intact.
        """
        for count, tier in self.plan(tokens):
            self._append(count, tier)

    def prepare(self, tokens: int) -> None:
        """Start making, in the background, the host slabs still missing for ``tokens`` tokens.

        Slabs prepared for more than that are given back.
        """
        if self.geometry.device.type != "cuda":
            return
        try:
            made = self.plan(tokens)
        except DoesNotFitError:
            # The caller has not asked for these tokens yet; `ensure` says so if it does.
            return
        self._slabs.prepare([self._slab_size(count) for count, tier in made if tier == "host"])

    def _slab_size(self, tokens: int) -> tuple[int, int]:
        return tokens * self.geometry.token_bytes, tokens * self.geometry.layer_token_bytes

    def _append(self, tokens: int, tier: Literal["gpu", "host"]) -> None:
        geometry = self.geometry
        nbytes, page_bytes = self._slab_size(tokens)
        slab = None
        buffer: torch.Tensor | None = None
        if tier == "gpu":
            try:
                with torch.inference_mode(False):
                    buffer = torch.empty(nbytes, dtype=torch.uint8, device=geometry.device)
            except torch.OutOfMemoryError as error:
                if not self.may_overflow:
                    raise DoesNotFitError(
                        f"the GPU has no room for a resident block of {format_bytes(nbytes)}, "
                        f"which gpu_budget={format_bytes(self.gpu_budget)} allows: lower "
                        "gpu_budget, or free GPU memory. What is stored is intact"
                    ) from error
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
