"""What a cache reports about itself."""

from __future__ import annotations

from dataclasses import dataclass

from headinfer_compile.runtime.retention import given_up_tokens
from headinfer_compile.runtime.session import Session


@dataclass(frozen=True)
class CacheStats:
    """Where the bytes of a cache are and what has moved. All sizes are bytes."""

    tokens: int
    kv_bytes: int
    """Of these tokens, without what layers with a window have given up."""
    resident_bytes: int
    tail_bytes: int
    host_bytes: int
    slab_bytes: int
    """The largest host slab, the granularity of ``host_bytes``."""
    slot_bytes: int
    staging_bytes: int
    fixed_bytes: int
    """Slots, staging ring and tail; independent of the context length."""
    workspace_bytes: int
    """The most that attention accumulators, kernel outputs and block masks were planned to take."""
    h2d_bytes: int
    d2h_bytes: int
    cpu_bytes: int
    """K and V attended by the CPU where they lie."""
    cpu_gb_s: float | None
    """Rate of that while the CPU was at it; None where it was not."""
    cpu_lead_us: float | None
    """By how much the CPU was last ahead of the GPU when their results met (negative: the GPU
    waited); None where ``cpu_attention`` is not ``"auto"`` or nothing was measured."""
    link_utilisation: float | None
    """Share of the profiled decode steps in which the link was copying; None without ``profile``.
    Copies run at the link's rate, so it is the share of that rate that was reached."""
    exposed_wait_us: float | None
    """Time that compute waited for transfers, over the profiled steps; None without ``profile``."""
    op_calls: dict[str, int]
    blocks_by_tier: dict[str, int]
    sites_rewritten: int
    eager_updates: int
    materialised_layers: int


def _kv_bytes(session: Session) -> int:
    geometry = session.geometry
    if geometry is None:
        return 0
    given_up = given_up_tokens(session.table, session.length - session.tail_rows).values()
    lost = sum(count for count, _ in given_up) * geometry.layer_token_bytes
    return session.length * geometry.token_bytes - lost


def collect_stats(session: Session) -> CacheStats:
    """The figures of a session as they are now; nothing waits for the device."""
    counters = session.counters
    geometry, timings = session.geometry, session.counters.timings
    lane = session.lane
    blocks = session.table.blocks if geometry is not None else []
    tiers = [block.tier for block in blocks]
    fixed = {part: session.bytes_of(part) for part in ("slots", "staging", "tail")}
    return CacheStats(
        tokens=session.length,
        kv_bytes=_kv_bytes(session),
        resident_bytes=session.table.bytes_on("gpu") if blocks else 0,
        tail_bytes=fixed["tail"],
        host_bytes=session.table.bytes_on("host") if blocks else 0,
        slab_bytes=session.table.slab_bytes if blocks else 0,
        slot_bytes=fixed["slots"],
        staging_bytes=fixed["staging"],
        fixed_bytes=sum(fixed.values()),
        workspace_bytes=counters.workspace_bytes,
        h2d_bytes=counters.h2d_bytes,
        d2h_bytes=counters.d2h_bytes,
        cpu_bytes=counters.cpu_bytes,
        cpu_gb_s=lane.gb_s if lane is not None else None,
        cpu_lead_us=lane.lead_us if lane is not None else None,
        link_utilisation=(
            timings.decode_link_us / timings.decode_us if timings.decode_us else None
        ),
        exposed_wait_us=timings.exposed_wait_us,
        op_calls=dict(counters.op_calls),
        blocks_by_tier={tier: tiers.count(tier) for tier in sorted(set(tiers))},
        sites_rewritten=len(counters.sites),
        eager_updates=counters.eager_updates,
        materialised_layers=len(counters.materialised_layers),
    )
