"""The batch rows of a session: which may share what is stored, and changes of their order.

Pages stay as they are when rows are reordered, repeated or selected: only the maps of their blocks
change. The tail is small and is rewritten. Such a change is prepared as a whole and then made by
steps that can be repeated, so that an interrupt leaves either the old rows or, at the next use, the
new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headinfer_compile.runtime.budget import refusing
from headinfer_compile.runtime.rows import (
    Rows,
    canonical,
    join_neighbours,
    on_host,
)
from headinfer_compile.runtime.spec import Geometry
from headinfer_compile.runtime.staging import Tail
from headinfer_compile.runtime.token_block import TokenBlock

if TYPE_CHECKING:
    from headinfer_compile.runtime.session import Session


@dataclass
class Sharing:
    """Whether rows of a session share, and a change of its rows that is under way."""

    wanted: bool = True
    """Equal rows of a prefill are stored once."""
    unequal_inputs: Callable[[], torch.Tensor] | None = None
    """Compares each batch row of the running call's inputs with the one before it, ``[B - 1]``;
    None where the call cannot be made again, should the K and V of equal rows differ."""
    change: BatchChange | None = None

    def settle(self, session: Session) -> None:
        """Finish a change of the rows, if one was cut short."""
        if self.change is not None:
            self.change.apply(session)
            self.change = None


def rows_to_store(session: Session, past: int, new: int) -> Rows | None:
    """Which batch rows are stored once in a step that begins: those that were and are equal.

    The host waits for one comparison of the call's inputs. K and V are compared while the step
    runs, and ``Step.rows_hold`` says in the end whether they were equal too.

    Returns:
        A canonical map, or None where each row is stored by itself.
    """
    compare, session.sharing.unequal_inputs = session.sharing.unequal_inputs, None
    history = _shared_history(session, past, new)
    if history is None or compare is None:
        return None
    groups = join_neighbours(history, on_host(compare()))
    return groups if len(set(groups)) < len(groups) else None


def _shared_history(session: Session, past: int, new: int) -> Rows | None:
    """Which rows hold the same past: a canonical map, or None where nothing may be shared."""
    geometry = session.geometry
    assert geometry is not None
    appends = session.tail_rows + new <= session.tail.tokens
    if not (session.managed and session.sharing.wanted):
        return None
    if appends or session.tail_rows or past != session.length or geometry.device.type == "meta":
        return None
    maps = [block.rows for block in session.table.blocks if block.start < past]
    history = canonical(list(zip(*maps, strict=True))) if maps else (0,) * geometry.batch
    return history if len(set(history)) < geometry.batch else None


def open_rows(session: Session, start: int, groups: Rows) -> None:
    """Let the pages from token ``start`` on take rows of ``groups``."""
    narrow = session.table.first_narrow(start, groups)
    if narrow is not None:
        session.wait_idle()
        session.table.truncate(narrow, start)
    session.table.open_rows(start, groups)


@dataclass
class BatchChange:
    """New maps of the blocks, and the tail's rows in their new order."""

    geometry: Geometry
    tail: Tail
    tail_rows: int
    selected: tuple[torch.Tensor, torch.Tensor]
    """K ``[L, Hkv, B, tail_rows, D]`` and V of the tail."""
    maps: list[tuple[TokenBlock, Rows]]

    def apply(self, session: Session) -> None:
        """Make the change; doing it again changes nothing."""
        for whole, part in zip(self.tail.all_layers, self.selected, strict=True):
            whole[..., : self.tail_rows, :].copy_(part)
        for block, rows in self.maps:
            block.rows = rows
        if session.tail is not self.tail:
            # D2H may still read the tail that is given up.
            session.wait_idle()
            session.rebind(self.geometry, self.tail)


def select_rows(session: Session, indices: Rows) -> None:
    """Let batch row ``b`` hold what row ``indices[b]`` holds."""
    session.sharing.settle(session)
    geometry = session.geometry
    # An empty cache takes the batch that the next call brings.
    if geometry is None or session.length == 0 or indices == tuple(range(geometry.batch)):
        return
    session.streams.begin_step()
    with session.around_call():
        session.sharing.change = _prepare(session, geometry, indices)
        session.sharing.settle(session)


def _prepare(session: Session, geometry: Geometry, indices: Rows) -> BatchChange:
    tail = session.tail
    where = torch.tensor(indices, dtype=torch.int64, device=geometry.device)
    k, v = (x[..., : session.tail_rows, :].index_select(2, where) for x in tail.all_layers)
    if len(indices) != geometry.batch:
        geometry = geometry.with_batch(len(indices))
        with refusing(
            f"the GPU has no room for the newest {tail.tokens} tokens of {len(indices)} rows: "
            "lower tail_tokens, or free GPU memory. What is stored is intact"
        ):
            tail = Tail(geometry, tail.tokens, session.streams)
    maps = [
        (block, tuple(block.rows[index] for index in indices)) for block in session.table.blocks
    ]
    return BatchChange(geometry, tail, session.tail_rows, (k, v), maps)
