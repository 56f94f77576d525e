"""One token block: the pages of all layers for a range of tokens.

A page is K and V of one layer in one token block, ``[Hkv, 2, R, T, D]`` (``spec.kv_views``). Of R
stored rows each batch row reads one (``rows.py``): reordering the batch changes maps, and no page
is rewritten for it. The memory of a block is divided by the windows of the layers, so that those
with one can give theirs up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from headinfer_compile.errors import CacheError
from headinfer_compile.runtime.block_plan import Tier
from headinfer_compile.runtime.rows import Rows, canonical, first_readers
from headinfer_compile.runtime.slab import HostSlab

Views = tuple[torch.Tensor, torch.Tensor]


class Pages(dict[int, Views]):
    """The pages of one block by layer."""

    def __missing__(self, layer: int) -> Views:
        raise lacks_pages(layer)


def lacks_pages(layer: int) -> CacheError:
    """What to say where older tokens of a layer are asked for that it has given up."""
    return CacheError(
        f"layer {layer} keeps the newest tokens alone, since a window hid all others, and this "
        "call reads older ones: its mask has another window, or the model runs uncompiled. "
        "reset() the cache, or use a new one. What is stored is intact"
    )


@dataclass
class TokenBlock:
    """Tokens ``[start, start + tokens)`` of every layer."""

    index: int
    start: int
    tokens: int
    tier: Tier
    pages: Pages
    device_bytes: dict[int | None, int]
    """Bytes of its device memory where it is resident, by the window of the layers in it."""
    slabs: dict[int | None, HostSlab]
    """Its host memory, likewise."""
    num_rows: int
    """Batch rows that a page has room for, R."""
    rows: Rows
    """The row of a page that each batch row reads."""
    version: int = 0
    """Bumped when rows that may have been read are given up for rewriting."""
    whole: bool = True
    """Its pages are those of no other block."""

    @property
    def nbytes(self) -> int:
        """Bytes of its memory; a block that was cut counts as its first part."""
        return sum(self.device_bytes.values()) + sum(slab.nbytes for slab in self.slabs.values())

    def can_give_up(self, window: int | None) -> bool:
        """Whether the layers of this window have pages here that are those of no other block."""
        return self.whole and (window in self.slabs or window in self.device_bytes)

    def lacks(self, window: int | None) -> bool:
        """Whether the layers of this window have given up their pages, or have none yet."""
        return self.whole and not self.can_give_up(window)

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
