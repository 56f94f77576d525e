"""Token blocks: the pages of all layers for a range of tokens, resident on the GPU or on the host.

A page is K and V of one layer in one token block, ``[Hkv, 2, R, T, D]`` (``spec.kv_views``). Blocks
are placed once and never move, grow or are copied again. Of R stored rows each batch row reads one
(``rows.py``): reordering the batch changes maps, and no page is rewritten for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.block_plan import BlockPlan, Tier
from headinfer_compile.runtime.rows import Rows, canonical, first_readers
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
    num_rows: int
    """Batch rows that a page has room for, R."""
    rows: Rows
    """The row of a page that each batch row reads."""
    version: int = 0
    """Bumped when rows that may have been read are given up for rewriting."""
    whole: bool = True
    """Its pages are those of no other block."""

    @property
    def groups(self) -> Rows:
        """Batch rows that read one stored row, as a canonical map."""
        return _groups_and_stored(self.rows)[0]

    @property
    def stored_rows(self) -> Rows:
        """The row of a page for each of ``groups``."""
        return _groups_and_stored(self.rows)[1]

    @property
    def is_plain(self) -> bool:
        """Each batch row has the row of its own number in a page of ``tokens`` tokens."""
        return self.whole and self.rows == tuple(range(self.num_rows))


# Asked at every transfer, of the same few maps.
@functools.lru_cache(maxsize=1024)
def _groups_and_stored(rows: Rows) -> tuple[Rows, Rows]:
    groups = canonical(rows)
    return groups, tuple(rows[row] for row in first_readers(groups))


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

    def _block_plan(self, num_rows: int | None = None) -> BlockPlan:
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
            stored_bytes=self._stored(num_rows).token_bytes,
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

    def plan(self, tokens: int, num_rows: int | None = None) -> list[tuple[int, Tier]]:
        """Tokens and tier of the blocks still to be made to hold ``tokens`` tokens.

        Args:
            tokens: Tokens in all.
            num_rows: Rows to store of each new token; None: one for each batch row.

        Raises:
            DoesNotFitError: The host budget does not hold them. Nothing has been made.
        """
        plan = self._block_plan(num_rows)
        made = plan.grow(tokens)
        if plan.host_bytes > self.host_budget:
            longest = self._block_plan(num_rows).longest(self.host_budget)
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

    def _stored(self, num_rows: int | None) -> Geometry:
        return self.geometry if num_rows is None else self.geometry.with_batch(num_rows)

    def ensure(self, tokens: int, groups: Rows | None = None) -> None:
        """Make blocks until there are pages for ``tokens`` tokens.

        Args:
            tokens: Tokens in all.
            groups: Canonical map of the rows of new blocks; None: one row for each batch row.

        Raises:
            DoesNotFitError: Budget or machine do not hold them; what was stored is intact.
        """
        groups = tuple(range(self.geometry.batch)) if groups is None else groups
        for count, tier in self.plan(tokens, len(set(groups))):
            self._append(count, tier, groups)

    def first_narrow(self, start: int, groups: Rows) -> int | None:
        """Index of the first block that has too few rows for tokens from ``start`` on, if any."""
        for index, block in enumerate(self.blocks):
            after = block.start + block.tokens > start
            if after and block.rows != groups and block.num_rows < len(set(groups)):
                return index
        return None

    def truncate(self, index: int, start: int) -> None:
        """End at token ``start`` in block ``index``; no copy of what comes after is under way."""
        block = self.blocks[index]
        if block.start < start:
            self.blocks[index] = replace(block, tokens=start - block.start, whole=False)
            index += 1
        while len(self.blocks) > index:
            block = self.blocks.pop()
            block.pages.clear()
            if block.slab is not None:
                block.slab.close()

    def open_rows(self, start: int, groups: Rows) -> None:
        """Let tokens from ``start`` on be stored under ``groups``; what is before stays as it is.

        A block that holds tokens of another map is cut in two, which share its pages.
        """
        for index, block in enumerate(self.blocks):
            if block.start >= start:
                block.rows = groups
            elif block.start + block.tokens > start and block.rows != groups:
                self._cut(index, start - block.start, groups)
                return self.open_rows(start, groups)
        return None

    def _new_index(self) -> int:
        return 1 + max((block.index for block in self.blocks), default=-1)

    def _cut(self, index: int, used: int, groups: Rows) -> None:
        block = self.blocks[index]
        with torch.inference_mode(False):
            pages = [(k[:, :, used:], v[:, :, used:]) for k, v in block.pages]
        rest = replace(
            block, index=self._new_index(), start=block.start + used, tokens=block.tokens - used,
            pages=pages, nbytes=0, slab=None, rows=groups, version=0, whole=False,
        )  # fmt: skip
        # The slab and its bytes stay with the first part, which is given back last.
        self.blocks[index : index + 1] = [replace(block, tokens=used, whole=False), rest]

    def prepare(self, tokens: int, num_rows: int | None = None) -> bool:
        """Start making, in the background, the host slabs still missing for ``tokens`` tokens.

        Slabs prepared for more than that are given back; ``num_rows`` as ``plan``.

        Returns:
            Whether they fit; the caller has not asked for them yet, and ``ensure`` raises if it
            does.
        """
        try:
            made = self.plan(tokens, num_rows)
        except DoesNotFitError:
            return False
        stored = self._stored(num_rows)
        self._slabs.prepare([_slab_size(stored, count) for count, tier in made if tier == "host"])
        return True

    @property
    def longest(self) -> int:
        """The most tokens that fit under the budgets."""
        return self._block_plan().longest(self.host_budget)

    def _append(self, tokens: int, tier: Tier, groups: Rows) -> None:
        geometry = self.geometry.with_batch(len(set(groups)))
        nbytes, page_bytes = _slab_size(geometry, tokens)
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
            TokenBlock(
                index=self._new_index(),
                start=self.capacity,
                tokens=tokens,
                tier=tier,
                pages=pages,
                nbytes=nbytes,
                slab=slab,
                num_rows=geometry.batch,
                rows=groups,
            )
        )

    def close(self) -> None:
        """Give every block back."""
        for block in self.blocks:
            block.pages.clear()
            if block.slab is not None:
                block.slab.close()
        self.blocks.clear()
        self._slabs.close()


def _slab_size(geometry: Geometry, tokens: int) -> tuple[int, int]:
    return tokens * geometry.token_bytes, tokens * geometry.layer_token_bytes
