"""Implementations of the operators that attend (``ops.py`` has the table)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headinfer_compile.runtime.attention import AttentionRequest, Kernel, select
from headinfer_compile.runtime.expand import attend_expanded, rows_within
from headinfer_compile.runtime.masks import block_mask
from headinfer_compile.runtime.merge import fold_sinks, merge_
from headinfer_compile.runtime.rows import attend_shared
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.spec import SiteSpec
from headinfer_compile.runtime.step import NEW, NEW_PREFIX, TAIL, Step, UnmaskedAttend


def output(session: Session, q: torch.Tensor, spec: int) -> torch.Tensor:
    """An unwritten result ``[B, Hq, n, Dv]`` in ``[B, n, Hq, Dv]`` memory."""
    batch, heads, new, _ = q.shape
    return q.new_empty(batch, new, heads, session.specs[spec].v_head_dim).transpose(1, 2)


def _head_range(session: Session, spec: SiteSpec, group: int) -> tuple[slice, slice]:
    assert session.step is not None
    size = session.layout(session.step.phase).head_group
    start, stop = group * size, min((group + 1) * size, spec.num_kv_heads)
    ratio = spec.queries_per_kv
    return slice(start, stop), slice(start * ratio, stop * ratio)


def _span(
    session: Session, spec: SiteSpec, step: Step, span: int, queries: tuple[int, int]
) -> tuple[int, int]:
    """Positions of the keys of a span."""
    low, high = queries
    if span >= 0:
        block = session.kv_blocks(spec)[span]
        return block.start, block.start + block.rows
    if span == TAIL:
        return step.stored, step.past + (1 if step.new == 1 and step.appends else 0)
    if span == NEW_PREFIX:
        return step.past, step.past + low
    return step.past + (low if spec.mask.causal else 0), step.past + (
        high if spec.mask.causal else step.new
    )


def _mask(
    spec: SiteSpec,
    step: Step,
    masks: Sequence[torch.Tensor],
    keys: tuple[int, int],
    queries: tuple[int, int],
    span: int,
    device: torch.device,
) -> tuple[bool, torch.Tensor | None]:
    """Whether the causal kernels do, and the explicit mask where they do not."""
    form = spec.mask
    padded = form.padding is not None and (
        step.padding.get(id(masks[form.padding]), True) or (span == TAIL and step.new == 1)
    )
    square = span == NEW and form.causal
    if form.expr is None and not padded:
        form = form.without_padding()
        if square and (form.window is None or queries[1] - queries[0] <= form.window):
            return queries[1] - queries[0] > 1, None
        if not square and form.window is None:
            return False, None
    built = block_mask(
        form,
        masks,
        past=step.past,
        new=step.new,
        q_start=queries[0],
        q_stop=queries[1],
        k_start=keys[0],
        k_stop=keys[1],
        device=device,
    )
    return False, built


def _kernel(
    session: Session, spec: SiteSpec, q: torch.Tensor, k: torch.Tensor, causal: bool,
    masked: bool, fixed: bool,
) -> Kernel:  # fmt: skip
    request = AttentionRequest(
        device_type=q.device.type,
        capability=session.capability,
        dtype=q.dtype,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        query="one" if q.shape[2] == 1 else "many",
        causal=causal,
        masked=masked,
        fixed_shape=fixed,
        soft_cap=spec.soft_cap is not None,
    )
    kernel = session.kernels.get(request)
    if kernel is None:
        kernel = session.kernels[request] = select(request)
    return kernel


def _attend(
    session: Session, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    masks: Sequence[torch.Tensor], spec_index: int, group: int, chunk: int, span: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    step, spec = session.step, session.specs[spec_index]
    assert step is not None
    padding = spec.mask.padding
    place = (spec_index, group, chunk, span, None if padding is None else id(masks[padding]))
    known = step.unmasked.get(place)
    if known is not None:
        if known.queries is not None:
            q = q[known.queries]
        if known.keys is not None:
            k, v = k[known.keys], v[known.keys]
        return known.kernel.run(
            q, k, v, scale=spec.scale, causal=known.causal, mask=None, soft_cap=spec.soft_cap
        )
    queries = step.query_range(spec_index, chunk)
    keys = _span(session, spec, step, span, queries)
    kv_heads, q_heads = _head_range(session, spec, group)
    all_heads = q_heads == slice(0, spec.num_heads)
    whole = (slice(None), q_heads, slice(*queries))
    of_q = None if all_heads and queries == (0, step.new) else whole
    of_kv: tuple[slice, ...] | None = None
    if span == TAIL:
        of_kv = None if all_heads else (slice(None), kv_heads)
    elif span < 0:
        low, high = keys[0] - step.past, keys[1] - step.past
        some = (slice(None), kv_heads, slice(low, high))
        of_kv = None if all_heads and (low, high) == (0, step.new) else some
    if of_q is not None:
        q = q[of_q]
    if of_kv is not None:
        k, v = k[of_kv], v[of_kv]
    causal, mask = _mask(spec, step, masks, keys, queries, span, q.device)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, q_heads]
    rows = keys[1] - keys[0]
    fixed = step.regular and span != TAIL and step.is_common_length(rows)
    shared = span >= 0 and session.kv_blocks(spec)[span].batch_rows != tuple(range(q.shape[0]))
    if mask is None and spec.expand is None and not shared:
        kernel = _kernel(session, spec, q, k, causal, False, fixed)
        step.unmasked[place] = UnmaskedAttend(of_q, of_kv, causal, kernel)

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = _kernel(session, spec, q, k, causal, mask is not None, fixed)
        return kernel.run(
            q, k, v, scale=spec.scale, causal=causal, mask=mask, soft_cap=spec.soft_cap
        )

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.expand is None:
            return run(q, k, v, causal, mask)
        piece = rows_within(
            int(session.config.workspace_bytes) // 2,
            spec.expand,
            k.shape[0],
            spec.head_dim + spec.v_head_dim,
            k.dtype.itemsize,
        )
        return attend_expanded(
            run, spec.expand, masks, q, k, v, causal=causal, mask=mask, rows=piece
        )

    if shared:
        return attend_shared(session.kv_blocks(spec)[span].batch_rows, q, k, v, mask, attend)
    return attend(q, k, v, mask)


def attend(
    session: Session, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    masks: Sequence[torch.Tensor], spec: int, group: int, chunk: int, span: int, accumulate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out, lse)`` of one query chunk over one span; fp32 accumulators when more spans follow."""
    out, lse = _attend(session, q, k, v, masks, spec, group, chunk, span)
    site = session.specs[spec]
    if site.sinks is not None:
        # Once for each result: every other span is merged to this one.
        heads = _head_range(session, site, group)[1]
        out, lse = fold_sinks(out, lse, masks[site.sinks].reshape(-1)[heads])
    if not accumulate:
        return out, lse
    # Fresh tensors: some kernels return views, and the merge writes in place.
    return out.to(torch.float32, memory_format=torch.contiguous_format, copy=True), lse.contiguous()


def attend_resident(
    session: Session, layer: int, q: torch.Tensor, spec: int, packed: int, accumulate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of one query token over the tail and all resident blocks, in one kernel."""
    from headinfer_compile.runtime.paged_triton import attend_paged

    tables, site = session.paged_tables(), session.specs[spec]
    return attend_paged(
        q,
        tables.of(layer),
        tables.capacity,
        tables.rows,
        tables.visible,
        num_kv_heads=site.num_kv_heads,
        v_head_dim=site.v_head_dim,
        scale=site.scale,
        dtype=torch.float32 if accumulate else q.dtype,
    )


def attend_merge(
    session: Session, acc: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, masks: Sequence[torch.Tensor], spec: int, group: int, chunk: int, span: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend one more span and join it to the accumulators by their LSE, in place."""
    merge_(acc, lse, *_attend(session, q, k, v, masks, spec, group, chunk, span))
    return acc, lse


def merge_host(
    session: Session, acc: torch.Tensor, lse: torch.Tensor, out: torch.Tensor,
    other_lse: torch.Tensor, spec: int, group: int, chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Join the CPU's result, of all heads and queries, to the accumulators, in place."""
    step = session.step
    assert step is not None
    _, heads = _head_range(session, session.specs[spec], group)
    low, high = step.query_range(spec, chunk)
    merge_(acc, lse, out[:, heads, low:high], other_lse[:, heads, low:high])
    return acc, lse


def store(
    session: Session, out: torch.Tensor, acc: torch.Tensor, spec: int, group: int, chunk: int
) -> torch.Tensor:
    """Write a finished accumulator into its heads and queries of the result."""
    step = session.step
    assert step is not None
    if acc.shape == out.shape:
        return out.copy_(acc)
    _, heads = _head_range(session, session.specs[spec], group)
    low, high = step.query_range(spec, chunk)
    out[:, heads, low:high].copy_(acc)
    return out
