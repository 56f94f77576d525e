"""Batch rows that share a stored row: beams and samples of one prompt are stored and streamed once.

A row map is a tuple with one entry a batch row: the row of stored K and V that it reads. In a
canonical map the stored rows are numbered in the order in which batch rows first read them.

Rows may share what they store while they hold the same past and all inputs of the call are equal
in them, bit for bit. That their K and V are equal then is checked in every layer (the model might
treat rows unlike), up to rounding.

Legend: B batch rows, U stored rows, H heads, n query tokens, m keys, D / Dv head dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[int, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_PIECE_ELEMENTS = 1 << 24
"""Elements that are compared at a time."""


def canonical(labels: Sequence[Hashable]) -> Rows:
    """The canonical map that puts batch rows of equal labels on one stored row."""
    number: dict[Hashable, int] = {}
    return tuple(number.setdefault(label, len(number)) for label in labels)


def first_readers(groups: Rows) -> Rows:
    """The first batch row that reads each stored row of a canonical map."""
    return tuple(groups.index(group) for group in range(len(set(groups))))


def join_neighbours(history: Rows, unequal: Sequence[bool]) -> Rows:
    """Rows that share a history and whose inputs equal those of the row before them.

    Args:
        history: Canonical map of what the rows hold.
        unequal: B - 1 flags: row ``b + 1`` differs from row ``b``.
    """
    labels, label = [0], 0
    for row, differs in enumerate(unequal):
        label += differs or history[row] != history[row + 1]
        labels.append(label)
    return tuple(labels)


def unequal_neighbours(x: Tensor, dim: int) -> Tensor:
    """Whether row ``b + 1`` of ``x`` along ``dim`` differs from row ``b`` at all, [B - 1]."""
    rows = x.movedim(dim, 0).flatten(1) if x.dim() < 3 else x.movedim(dim, 0)
    longest = max(range(1, rows.dim()), key=lambda other: rows.shape[other])
    step = max(1, _PIECE_ELEMENTS * rows.shape[longest] // max(1, rows.numel()))
    found = torch.zeros(rows.shape[0] - 1, dtype=torch.bool, device=x.device)
    for part in rows.split(step, longest):
        found |= (part[1:] != part[:-1]).flatten(1).any(1)
    return found


def far_neighbours(k: Tensor, v: Tensor) -> Tensor:
    """Whether K ``[B, H, n, D]`` or V of rows ``b + 1`` and ``b`` differ beyond rounding, [B - 1].

    Equal rows of a batch need not come out bit for bit equal: a matrix product may add up those at
    its edge in another order. What counts is the largest difference against the largest element.
    """
    found = torch.zeros(k.shape[0] - 1, dtype=torch.bool, device=k.device)
    limit = torch.finfo(k.dtype).eps ** 0.5
    for x in (k, v):
        # One head at a time, so that the differences stay small.
        for part in x.unbind(1):
            apart = (part[1:] - part[:-1]).abs().amax((1, 2))
            found |= ~(apart <= limit * part[1:].abs().amax((1, 2)))
    return found


def on_host(flags: Tensor) -> list[bool]:
    """The values of a small 1-D tensor; the host waits for them."""
    return [bool(flag) for flag in flags.to("cpu").unbind()]


def take_rows(x: Tensor, rows: Rows, dim: int) -> Tensor:
    """Rows of ``x`` along ``dim``: a view where they are evenly spaced, else a copy."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == tuple(range(rows[0], rows[-1] + 1, step)):
        where = (*(slice(None),) * dim, slice(rows[0], rows[-1] + 1, step))
        return x[where]
    return torch.cat([x.narrow(dim, row, 1) for row in rows], dim)


@dataclass(frozen=True)
class Fold:
    """Consecutive stored rows, each read by the same number of batch rows."""

    start: int
    stop: int
    readers: int
    rows: Rows
    """The batch rows, those of one stored row after the other."""


@functools.lru_cache(maxsize=1024)
def folds(rows: Rows) -> tuple[Fold, ...]:
    """How batch rows are gathered so that each stored row is attended once."""
    found: list[Fold] = []
    for stored in sorted(set(rows)):
        members = tuple(row for row, at in enumerate(rows) if at == stored)
        last = found[-1] if found else None
        if last is not None and last.stop == stored and last.readers == len(members):
            found[-1] = Fold(last.start, stored + 1, last.readers, last.rows + members)
        else:
            found.append(Fold(stored, stored + 1, len(members), members))
    return tuple(found)


def attend_shared(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attend: Attend
) -> tuple[Tensor, Tensor]:
    """Attend stored rows, the queries of all batch rows that read one as queries of that one.

    Args:
        rows: Which row of ``k`` and ``v`` each batch row reads.
        q: ``[B, Hq, n, D]``.
        k: ``[U, Hkv, m, D]``.
        v: ``[U, Hkv, m, Dv]``.
        mask: Broadcasts to ``[B, Hq, n, m]``, or None.
        attend: The kernel: ``(out, lse)`` of q, k, v and mask. No order of the queries may matter.

    Returns:
        out ``[B, Hq, n, Dv]`` and lse ``[B, Hq, n]``.
    """
    n, outs, lses = q.shape[2], [], []
    order: list[int] = []
    for fold in folds(rows):
        part_mask = mask
        if mask is not None and (mask.shape[0] > 1 or mask.shape[2] > 1):
            part_mask = take_rows(mask.expand(q.shape[0], -1, n, -1), fold.rows, 0)
            part_mask = _fold(part_mask, fold.readers)
        out, lse = attend(
            _fold(take_rows(q, fold.rows, 0), fold.readers),
            k[fold.start : fold.stop],
            v[fold.start : fold.stop],
            part_mask,
        )
        outs.append(_unfold(out, fold.readers))
        lses.append(_unfold(lse, fold.readers))
        order += fold.rows
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
    back = tuple(order.index(row) for row in range(len(order)))
    return take_rows(out, back, 0), take_rows(lse, back, 0)


def _fold(x: Tensor, readers: int) -> Tensor:
    """``[U * readers, H, n, D]`` as ``[U, H, readers * n, D]``."""
    split: Tensor = x.unflatten(0, (-1, readers))
    return split.transpose(1, 2).flatten(2, 3)


def _unfold(x: Tensor, readers: int) -> Tensor:
    """``[U, H, readers * n, ...]`` as ``[U * readers, H, n, ...]``."""
    split: Tensor = x.unflatten(2, (readers, -1))
    return split.transpose(1, 2).flatten(0, 1)
