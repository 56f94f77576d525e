"""Token blocks of a cache, resident on the GPU or on the host: made, given up, cut and ended here.

Blocks (``token_block.py``) are placed once and never move, grow or are copied again. A host block
has one slab for all layers of a class, so that layers with a window can give theirs up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from headinfer_compile.config import format_bytes
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.runtime.block_plan import BlockPlan, Tier
from headinfer_compile.runtime.rows import Rows
from headinfer_compile.runtime.slab import SlabAllocator
from headinfer_compile.runtime.spec import Geometry, kv_views
from headinfer_compile.runtime.token_block import Pages, TokenBlock

log = logging.getLogger(__name__)


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
    windows: dict[int, int] = field(default_factory=dict)
    """Of the layers that may come to keep only what a window sees: its tokens."""
    chunk: int = 0
    """Tokens of a prefill chunk."""
    blocks: list[TokenBlock] = field(default_factory=list)
    changes: int = 0
    """How often memory was taken or given up."""

    def __post_init__(self) -> None:
        self._slabs = SlabAllocator(self.geometry.device)
        self.classes: dict[int | None, list[int]] = {}
        """The layers with a slab of their own in each host block, by their window."""
        for layer in self.geometry.layers:
            self.classes.setdefault(self.windows.get(layer), []).append(layer)
        self.largest_page_tokens = self._block_plan().tokens_of(64)
        """Tokens of the largest page this table will ever make."""

    def _block_plan(self, num_rows: int | None = None) -> BlockPlan:
        """The blocks there are, as a plan that may grow."""
        held = self.bytes_on("gpu")
        on_host = any(block.tier == "host" for block in self.blocks)
        budget = self.gpu_budget
        if held < budget and not on_host:
            budget = min(budget, held + max(0, self.room()))
        complete = [b for b in self.blocks if b.whole and len(b.slabs) == len(self.classes)]
        return BlockPlan(
            self.geometry.layer_token_bytes,
            len(self.geometry.layers),
            self.page_tokens,
            budget,
            capacity=self.capacity,
            gpu_bytes=held,
            host_bytes=self.bytes_on("host") - self._slabs.free_bytes,
            count=len(self.blocks),
            on_host=on_host,
            stored_bytes=self._stored(num_rows).token_bytes,
            windows=tuple(self.windows.values()),
            chunk=self.chunk,
            host_runs=[(block.start, block.tokens, 1) for block in complete],
        )

    @property
    def capacity(self) -> int:
        """Tokens for which there are pages."""
        return self.blocks[-1].start + self.blocks[-1].tokens if self.blocks else 0

    def bytes_on(self, tier: str) -> int:
        """Bytes of the blocks on ``"gpu"`` or ``"host"``."""
        held = sum(block.nbytes for block in self.blocks if block.tier == tier)
        return held + (self._slabs.free_bytes if tier == "host" else 0)

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest host block so far, the granularity of host memory."""
        return max((block.nbytes for block in self.blocks if block.slabs), default=0)

    def plan(
        self, tokens: int, num_rows: int | None = None, *, stored: int | None = None
    ) -> list[tuple[int, Tier]]:
        """Tokens and tier of the blocks still to be made to hold ``tokens`` tokens.

        Args:
            tokens: Tokens in all.
            num_rows: Rows to store of each new token; None: one for each batch row.
            stored: Tokens held now, where one step brings all others, so that nothing more is
                given up before; None: chunks do.

        Raises:
            DoesNotFitError: The host budget does not hold them. Nothing has been made.
        """
        plan = self._block_plan(num_rows)
        made = plan.grow(tokens)
        if stored is None:
            host_bytes = plan.host_bytes - plan.given_up_bytes(tokens)
        else:
            missing = self._missing(stored, tokens)
            lacks = [lack for lack in missing if lack[0].tier == "host"]
            host_bytes = plan.host_bytes + sum(self._class_bytes(*lack) for lack in lacks)
        if host_bytes > self.host_budget:
            longest = self._block_plan(num_rows).longest(self.host_budget)
            everything = plan.gpu_bytes + host_bytes
            raise DoesNotFitError(
                f"{tokens} tokens need {format_bytes(host_bytes)} of host memory for KV pages "
                f"beside {format_bytes(plan.gpu_bytes)} on the GPU, and host_budget is "
                f"{format_bytes(self.host_budget)}. What would work: a context of at most "
                f"{longest} tokens; host_budget={host_bytes}; "
                f"gpu_budget={everything - self.host_budget}, where the GPU has room for it. "
                "What is stored is intact"
            )
        return made

    def _stored(self, num_rows: int | None) -> Geometry:
        return self.geometry if num_rows is None else self.geometry.with_batch(num_rows)

    def ensure(self, tokens: int, groups: Rows | None = None, stored: int = 0) -> None:
        """Make blocks until there are pages for ``tokens`` tokens, of which ``stored`` are written.

        Args:
            tokens: Tokens in all.
            groups: Canonical map of the rows of new blocks; None: one row for each batch row.
            stored: Tokens whose pages stay as they are.

        Raises:
            DoesNotFitError: Budget or machine do not hold them; what was stored is intact.
        """
        groups = tuple(range(self.geometry.batch)) if groups is None else groups
        made = self.plan(tokens, len(set(groups)), stored=stored)
        for block, window in self._missing(stored, tokens):
            self._restore(block, window)
        for count, tier in made:
            self._append(count, tier, groups)

    def _missing(self, stored: int, tokens: int) -> list[tuple[TokenBlock, int | None]]:
        """What layers with a window have given up of the blocks that a step writes."""
        return [
            (block, window)
            for block in (self.blocks if self.windows else ())
            if block.start < tokens and block.start + block.tokens > stored
            for window in self.classes
            if block.lacks(window)
        ]

    def surplus(self, stored: int, tokens: int) -> list[tuple[TokenBlock, int | None]]:
        """Pages past ``tokens`` of layers that a step needs older ones of again, after a crop."""
        lacking = {window for _, window in self._missing(stored, tokens)}
        return [
            (block, window)
            for block in self.blocks
            for window in lacking
            if block.start >= tokens and block.can_give_up(window)
        ]

    @property
    def lacks_resident(self) -> bool:
        """Whether layers with a window have given up pages of a resident block."""
        resident = [block for block in self.blocks if block.tier == "gpu"]
        return any(block.lacks(window) for block in resident for window in self.classes)

    def give_up(self, block: TokenBlock, window: int | None) -> None:
        """Drop the pages of a class of layers in a block; no copy of them is under way."""
        unit, layers = self._unit_bytes(block), self.classes[window]
        pages = block.pages.items()
        block.pages = Pages((layer, page) for layer, page in pages if layer not in layers)
        self.changes += 1
        if block.tier == "gpu":
            del block.device_bytes[window]
        else:
            self._slabs.give_back(block.slabs.pop(window), unit)

    def _restore(self, block: TokenBlock, window: int | None) -> None:
        """Have the pages of a class of layers in a block; nothing was written to them."""
        layers, nbytes = self.classes[window], self._class_bytes(block, window)
        if block.tier == "gpu":
            with torch.inference_mode(False):
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.geometry.device)
            block.device_bytes[window] = nbytes
        else:
            slab = self._slabs.take(nbytes, self._unit_bytes(block))
            block.slabs[window], buffer = slab, slab.tensor
        block.pages = Pages({**block.pages, **self._views(block, buffer, layers)})
        self.changes += 1

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
            _close(self.blocks.pop())

    def place_anew(self) -> None:
        """Have no blocks; host memory is kept for those that come. No copy is under way."""
        for block in self.blocks:
            for window in list(block.slabs) if block.whole else ():
                self.give_up(block, window)
        self.truncate(0, 0)

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
            pages = Pages(
                (layer, (k[:, :, used:], v[:, :, used:])) for layer, (k, v) in block.pages.items()
            )
        rest = replace(
            block, index=self._new_index(), start=block.start + used, tokens=block.tokens - used,
            pages=pages, device_bytes={}, slabs={}, rows=groups, version=0, whole=False,
        )  # fmt: skip
        # The slabs and their bytes stay with the first part, which is given back last.
        self.blocks[index : index + 1] = [replace(block, tokens=used, whole=False), rest]

    def prepare(self, tokens: int, num_rows: int | None = None, soon: int = 0) -> bool:
        """Start making, in the background, the host slabs still missing for ``tokens`` tokens.

        Slabs prepared for more than that are given back; ``num_rows`` as ``plan``. Those of layers
        with a window are made for ``soon`` tokens only: later ones are given up by then.

        Returns:
            Whether they fit; the caller has not asked for them yet, and ``ensure`` raises if it
            does.
        """
        try:
            made = self.plan(tokens, num_rows)
        except DoesNotFitError:
            return False
        layer_bytes = self._stored(num_rows).layer_token_bytes
        sizes, start = [], self.capacity
        for count, tier in made:
            for window, layers in self.classes.items():
                if tier == "host" and (window is None or start < soon):
                    sizes.append((len(layers) * count * layer_bytes, count * layer_bytes))
            start += count
        self._slabs.prepare(sizes)
        return True

    @property
    def longest(self) -> int:
        """The most tokens that fit under the budgets."""
        return self._block_plan().longest(self.host_budget)

    def _append(self, tokens: int, tier: Tier, groups: Rows) -> None:
        block = TokenBlock(
            index=self._new_index(), start=self.capacity, tokens=tokens, tier=tier, pages=Pages(),
            device_bytes={}, slabs={}, num_rows=len(set(groups)), rows=groups,
        )  # fmt: skip
        if tier == "gpu":
            try:
                for window in self.classes:
                    self._restore(block, window)
            except torch.OutOfMemoryError:
                block.pages, block.device_bytes, block.tier = Pages(), {}, "host"
                log.warning(
                    "the GPU has no room for another resident block of %s: the rest of the KV goes "
                    "to the host",
                    format_bytes(len(self.geometry.layers) * self._unit_bytes(block)),
                )
                self.gpu_budget = self.bytes_on("gpu")
        if block.tier == "host":
            with ExitStack() as refused:
                # The slabs that there were are then of no block.
                refused.callback(_close, block)
                for window in self.classes:
                    self._restore(block, window)
                refused.pop_all()
        self.blocks.append(block)

    def _unit_bytes(self, block: TokenBlock) -> int:
        """Bytes of a page of a block."""
        return block.tokens * self.geometry.with_batch(block.num_rows).layer_token_bytes

    def _class_bytes(self, block: TokenBlock, window: int | None) -> int:
        """Bytes of the pages of a class of layers in a block."""
        return len(self.classes[window]) * self._unit_bytes(block)

    def _views(self, block: TokenBlock, buffer: torch.Tensor, layers: Sequence[int]) -> Pages:
        """The pages of some layers in a buffer."""
        geometry = self.geometry.with_batch(block.num_rows)
        elements = self._unit_bytes(block) // geometry.dtype.itemsize
        # A view in another dtype made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            typed = buffer.view(geometry.dtype)
            return Pages(
                (layer, kv_views(part, geometry, geometry.num_kv_heads, block.tokens))
                for layer, part in zip(layers, typed.split(elements), strict=True)
            )

    def close(self) -> None:
        """Give every block back."""
        for block in self.blocks:
            _close(block)
        self.blocks.clear()
        self._slabs.close()


def _close(block: TokenBlock) -> None:
    block.pages.clear()
    for slab in block.slabs.values():
        slab.close()
