"""Implementations of the operators that move K and V (``ops.py`` has the table)."""

from __future__ import annotations

import torch

from headinfer_compile.runtime.copies import copy_kv
from headinfer_compile.runtime.rows import Rows, far_neighbours, first_readers, take_rows
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.step import APPEND, Piece

Views = tuple[torch.Tensor, torch.Tensor]


def _rows(views: Views, start: int, stop: int) -> Views:
    return views[0][:, :, start:stop], views[1][:, :, start:stop]


def _heads_first(views: Views) -> Views:
    """``[B, heads, rows, D]`` of page-layout views and back."""
    return views[0].transpose(0, 1), views[1].transpose(0, 1)


def _assign(target: Views, source: Views) -> None:
    target[0].copy_(source[0])
    target[1].copy_(source[1])


def _stored(views: Views, rows: Rows) -> Views:
    """Rows of the batch dim of page-layout views."""
    return take_rows(views[0], rows, 1), take_rows(views[1], rows, 1)


def _copy_rows(
    target: Views, source: Views, target_rows: Rows, source_rows: Rows, raw: int | None
) -> int:
    """Copy rows of the batch dim between host and device: in one go where each side is all rows."""
    whole = all(
        rows == tuple(range(views[0].shape[1]))
        for views, rows in ((target, target_rows), (source, source_rows))
    )
    if whole:
        return copy_kv(target, source, raw)
    return sum(
        copy_kv(_stored(target, (to,)), _stored(source, (origin,)), raw)
        for to, origin in zip(target_rows, source_rows, strict=True)
    )


def pack(session: Session, layer: int, k: torch.Tensor, v: torch.Tensor, piece: int) -> int:
    """Put new rows where D2H or attention finds them; returns a token for ``tail``/``offload``."""
    step, streams = session.step, session.streams
    assert step is not None
    tail = session.tail
    if piece == APPEND:
        if step.tail_rows == 0:
            streams.wait(tail.copied[layer], "compute")
        if step.paged:
            from headinfer_compile.runtime.append_triton import append_row

            append_row(k, v, tail.layers[layer], session.paged_tables().new_row)
            return APPEND
        new = _heads_first((k, v))
        _assign(_rows(tail.layers[layer], step.tail_rows, step.tail_rows + step.new), new)
        return APPEND
    part = step.pieces[piece]
    source = tail.layers[layer] if part.source == "tail" else _heads_first((k, v))
    source = _rows(source, part.start, part.start + part.rows)
    readers = first_readers(step.groups)
    if step.unequal is not None:
        step.unequal |= far_neighbours(*_heads_first(source))
    source = _stored(source, readers)
    index = -1
    if part.source == "new" and part.to_host:
        assert session.staging is not None
        index = session.staging.advance()
        streams.wait(session.staging.copied[index], "compute")
    for segment in part.segments:
        rows = _rows(source, segment.offset, segment.offset + segment.rows)
        if segment.block.tier == "gpu":
            page = _stored(segment.block.pages[layer], tuple(range(len(readers))))
            _assign(_rows(page, segment.row, segment.row + segment.rows), rows)
        elif index >= 0:
            assert session.staging is not None
            staged = session.staging.views(index, segment.offset, segment.rows, len(readers))
            _assign(staged, rows)
    if part.to_host:
        event = tail.packed if index < 0 else session.staging.packed[index]  # type: ignore[union-attr]
        streams.record(event, "compute")
    # The staging buffer travels in the token, so that `offload` reads what this `pack` wrote.
    return piece * 4 + index + 1


def offload(session: Session, layer: int, packed: int) -> int:
    """Copy a packed piece to its host pages on the d2h stream."""
    step, streams = session.step, session.streams
    assert step is not None
    piece, index = packed // 4, packed % 4 - 1
    part: Piece = step.pieces[piece]
    if not part.to_host:
        return packed
    staging = session.staging
    packed_event = session.tail.packed if index < 0 else staging.packed[index]  # type: ignore[union-attr]
    streams.wait(packed_event, "d2h")
    raw = streams.raw("d2h") if streams.is_cuda else None
    stored = tuple(range(len(set(step.groups))))
    with streams.on("d2h"):
        for segment in part.segments:
            if segment.block.tier != "host":
                continue
            if index < 0:
                first = part.start + segment.offset
                source = _rows(session.tail.layers[layer], first, first + segment.rows)
            else:
                source = staging.views(  # type: ignore[union-attr]
                    index, segment.offset, segment.rows, len(stored)
                )
            page = segment.block.pages[layer]
            target = _rows(page, segment.row, segment.row + segment.rows)
            session.counters.d2h_bytes += _copy_rows(target, source, stored, stored, raw)
    copied = session.tail.copied[layer] if index < 0 else staging.copied[index]  # type: ignore[union-attr]
    streams.record(copied, "d2h")
    streams.record(session.written_event(layer), "d2h")
    return packed


def tail(session: Session, layer: int, packed: int) -> Views:
    """K and V ``[B, Hkv, rows, D]`` of the tail; the new row is among them if it is alone."""
    step = session.step
    assert step is not None
    rows = step.tail_rows + (1 if packed == APPEND and step.new == 1 else 0)
    return _heads_first(_rows(session.tail.layers[layer], 0, rows))


def _group(session: Session, spec: int, group: int) -> slice:
    assert session.step is not None
    size = session.layout(session.step.phase).head_group
    return slice(group * size, min((group + 1) * size, session.specs[spec].num_kv_heads))


def resident(session: Session, layer: int, spec: int, group: int, block: int, packed: int) -> Views:
    """K and V ``[R, g, rows, D]`` of a KV block on the GPU."""
    kv_block = session.kv_blocks(session.specs[spec])[block]
    (token_block, rows) = kv_block.pages[0]
    heads = _group(session, spec, group)
    k, v = token_block.pages[layer]
    return k[heads, :, :rows].transpose(0, 1), v[heads, :, :rows].transpose(0, 1)


def prefetch(
    session: Session,
    layer: int,
    spec: int,
    group: int,
    block: int,
    base: int,
    slot: int,
    after: int,
) -> int:
    """Start filling slot ``(base + slot) % num_slots``; returns the transfer."""
    kv_block = session.kv_blocks(session.specs[spec])[block]
    heads = _group(session, spec, group)
    ring, streams = session.slot_ring(), session.streams
    index = (base + slot) % len(ring.slots)
    transfer, target = ring.acquire(index, after, (layer, heads.start, heads.stop, kv_block.tag))
    streams.wait(target.freed, "h2d")
    streams.wait(session.written_event(layer), "h2d")
    batch = kv_block.batch
    views = ring.view(index, heads.stop - heads.start, batch, kv_block.rows)
    raw = streams.raw("h2d") if streams.is_cuda else None
    with streams.on("h2d"):
        at = 0
        for token_block, rows in kv_block.pages:
            k, v = token_block.pages[layer]
            if rows < k.shape[2] or heads.stop - heads.start < k.shape[0]:
                k, v = k[heads, :, :rows], v[heads, :, :rows]
            session.counters.h2d_bytes += _copy_rows(
                views if rows == kv_block.rows else _rows(views, at, at + rows),
                (k, v),
                tuple(range(batch)),
                token_block.stored_rows,
                raw,
            )
            at += rows
    streams.record(target.filled, "h2d")
    target.views = _heads_first(views)
    return transfer


def wait(session: Session, transfer: int) -> Views:
    """Make compute wait for a transfer; K and V ``[B, g, rows, D]`` of its slot."""
    slot = session.slot_ring().find(transfer)
    session.streams.wait(slot.filled, "compute")
    assert slot.views is not None
    return slot.views


def release(session: Session, transfer: int, last: torch.Tensor) -> int:
    """Let the slot of ``transfer`` be refilled once compute has reached this point."""
    slot = session.slot_ring().find(transfer)
    session.streams.record(slot.freed, "compute")
    slot.released = True
    return transfer


def update_without_schedule(
    session: Session, layer: int, k: torch.Tensor, v: torch.Tensor, past: int
) -> Views:
    """Store new K and V of one layer and return all of it on the device.

    This is the exact path of an uncompiled model, and of a layer whose attention no pass could
    rewrite. Outside a compiled graph the step begins with the first layer that comes and is
    committed with ``session.last_layer``.

    Args:
        session: The cache's session.
        layer: Index of the layer.
        k: ``[B, Hkv, n, D]``.
        v: ``[B, Hkv, n, Dv]``.
        past: Tokens cached before the step.

    Returns:
        K ``[B, Hkv, past + n, D]`` and V ``[B, Hkv, past + n, Dv]``.

    Raises:
        DoesNotFitError: K and V of the layer would exceed the GPU budget.
    """
    step = session.step
    if step is not None and not session.managed and layer in step.eager_layers:
        # The forward before this one was cut short.
        session.abort()
        step = None
    if step is None:
        step = session.start(k, v, past, 0)
    step.eager_layers.add(layer)
    # A step with a schedule leaves its D2H under way, and `_gather` reads on compute.
    session.streams.wait(session.written_event(layer), "compute")
    full = _gather(session, layer, k, v)
    if step.appends:
        pack(session, layer, k, v, APPEND)
    for piece in range(len(step.pieces)):
        offload(session, layer, pack(session, layer, k, v, piece))
    if layer == session.last_layer and not session.managed:
        session.commit()
    return full


def _gather(session: Session, layer: int, k: torch.Tensor, v: torch.Tensor) -> Views:
    step = session.step
    assert step is not None
    total = step.past + step.new
    session.check_materialised(total)
    full = tuple(x.new_empty(x.shape[0], x.shape[1], total, x.shape[3]) for x in (k, v))
    for block in session.table.blocks:
        rows = min(block.tokens, step.stored - block.start)
        for whole, page in zip(full, block.pages[layer], strict=True):
            for head in range(page.shape[0] if rows > 0 else 0):
                for row, stored in enumerate(block.rows):
                    target = whole[row, head, block.start : block.start + rows]
                    target.copy_(page[head, stored, :rows], non_blocking=True)
                    if block.tier == "host":
                        session.counters.h2d_bytes += target.nbytes
    old = _heads_first(_rows(session.tail.layers[layer], 0, step.tail_rows))
    _assign((full[0][:, :, step.stored : step.past], full[1][:, :, step.stored : step.past]), old)
    _assign((full[0][:, :, step.past :], full[1][:, :, step.past :]), (k, v))
    return full[0], full[1]
