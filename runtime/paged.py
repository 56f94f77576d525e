"""Device tables that let one kernel attend the tail and all resident blocks of a decode step.

The tables say where the pages are and how many rows they hold. They are filled before the step's
kernels are queued, so the kernels themselves, and a CUDA graph of them, do not depend on lengths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from headinfer_compile.runtime.spec import Geometry
from headinfer_compile.runtime.staging import Tail
from headinfer_compile.runtime.token_block import TokenBlock, lacks_pages


def is_supported(geometry: Geometry) -> bool:
    """Whether the kernel runs for this geometry: CUDA with Triton, head dims up to 256."""
    return (
        geometry.device.type == "cuda"
        and geometry.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(geometry.head_dim, geometry.v_head_dim) <= 256
        and importlib.util.find_spec("triton") is not None
    )


class PagedTables:
    """Addresses, capacities and rows of the resident blocks and, last, the tail."""

    def __init__(self, geometry: Geometry, tail: Tail) -> None:
        self._geometry, self._tail = geometry, tail
        self._blocks: list[tuple[int, int, int]] | None = None
        self._rows: list[int] = []
        self._lacking: set[int] = set()
        """Layers that have given up what they do not see."""
        self.version = 0
        """Changes whenever the tensors below are other ones than before."""
        with torch.inference_mode(False):
            self._visible = torch.ones(
                (geometry.batch, tail.tokens), dtype=torch.int8, device=geometry.device
            )
            self.new_row = torch.zeros(1, dtype=torch.int64, device=geometry.device)
        self.visible: torch.Tensor | None = None
        self.addresses: torch.Tensor
        self.capacity: torch.Tensor
        self.rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Device bytes of the tables."""
        tables = (self.addresses, self.capacity, self.rows) if self._blocks is not None else ()
        return self._visible.nbytes + sum(table.nbytes for table in tables)

    def sync(
        self,
        blocks: Sequence[tuple[TokenBlock, int]],
        tail_rows: int,
        mask: torch.Tensor | None,
        first_column: int,
    ) -> None:
        """Make the tables say what this step attends.

        Args:
            blocks: Resident blocks with their valid rows.
            tail_rows: Rows of the tail, the new token's among them.
            mask: Padding mask ``[B, kv]`` of which the tail's columns are applied, or None.
            first_column: Position of the tail's first row.
        """
        if self._blocks != [_memory_of(block) for block, _ in blocks]:
            self._rebuild([block for block, _ in blocks])
        rows = [*(count for _, count in blocks), tail_rows]
        for index, count in enumerate(rows):
            if self._rows[index] != count:
                # Not known while it is being written, should an interrupt come between.
                self._rows[index] = -1
                # The value travels as a kernel argument: no host buffer that must outlive a copy.
                self.rows[index].fill_(count)
                self._rows[index] = count
        self.new_row.fill_(tail_rows - 1)
        if (mask is None) != (self.visible is None):
            self.version += 1
        self.visible = None if mask is None else self._visible
        if mask is not None:
            columns = mask[:, first_column : first_column + tail_rows]
            self._visible[:, :tail_rows].copy_(columns != 0)

    def of(self, layer: int) -> torch.Tensor:
        """Addresses for a layer, ``[blocks, 2]``.

        Raises:
            CacheError: It has given up pages of a block.
        """
        if layer in self._lacking:
            raise lacks_pages(layer)
        return self.addresses[layer]

    def _rebuild(self, blocks: Sequence[TokenBlock]) -> None:
        sources = [*(block.pages for block in blocks), self._tail.layers]
        addresses = [[[0, 0] for _ in sources] for _ in range(self._geometry.num_layers)]
        self._lacking = {
            layer for layer in self._geometry.layers if any(layer not in pages for pages in sources)
        }
        for layer in set(self._geometry.layers) - self._lacking:
            views = [pages[layer] for pages in sources]
            addresses[layer] = [[k.data_ptr(), v.data_ptr()] for k, v in views]
        capacity = [*(block.tokens for block in blocks), self._tail.tokens]
        device = self._geometry.device
        with torch.inference_mode(False):
            self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
            self.capacity = torch.tensor(capacity, dtype=torch.int32, device=device)
            self.rows = torch.zeros(len(capacity), dtype=torch.int32, device=device)
        self._rows = [0] * len(capacity)
        self.version += 1
        self._blocks = [_memory_of(block) for block in blocks]


def _memory_of(block: TokenBlock) -> tuple[int, int, int]:
    """What tells one block's pages from another's: numbers of blocks are used again."""
    page = next(iter(block.pages.values()), None)
    return block.tokens, len(block.pages), 0 if page is None else page[0].data_ptr()
