"""The plan key of a site in the current step of a session: what its schedule is built for.

Both who runs a step and who only reports one ask here. Nothing is allocated and no K or V is read,
so a session on the meta device, whose steps move nothing, gives the keys of the real one.
"""

from __future__ import annotations

from dataclasses import replace

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes.schedule import PieceKind, PlanKey
from headinfer_compile.runtime.host_lane import cpu_blocks
from headinfer_compile.runtime.session import Session


def chained_key(
    session: Session, spec: int, next_spec: int | None, first_spec: int, config: HeadInferConfig
) -> PlanKey:
    """The key of a site and of the transfers that it starts for the site after it.

    Args:
        session: In a step, with ``specs`` set.
        spec: Placement class of the site, an index into ``session.specs``.
        next_spec: Class of the site after it; None after the last site of the model.
        first_spec: Class of the first site of the model.
        config: Options of the compiled call.
    """
    step = session.step
    assert step is not None
    key = plan_key(session, spec, config)
    if next_spec is not None:
        following = plan_key(session, next_spec, config)
        return replace(key, next_transfers=following.transfers()[: following.entry])
    if step.new == 1 and not step.flushes:
        # The next step reads the same blocks: they change only when the tail is flushed.
        first = plan_key(session, first_spec, config)
        return replace(key, next_transfers=first.transfers()[: first.entry])
    return key


def plan_key(session: Session, spec: int, config: HeadInferConfig) -> PlanKey:
    """The key of a site that starts no transfer for another; arguments as ``chained_key``."""
    step, site = session.step, session.specs[spec]
    assert step is not None
    blocks = session.kv_blocks(site)
    resident = sum(block.tier == "gpu" for block in blocks)
    on_cpu = cpu_blocks(session, spec)
    group = session.layout(step.phase).head_group
    return PlanKey(
        spec=spec,
        phase=step.phase,
        one_query=step.new == 1,
        causal=site.mask.causal and site.mask.expr is None,
        appends=step.appends,
        has_tail=step.tail_rows > 0,
        pieces=tuple(PieceKind(piece.source, piece.to_host) for piece in step.pieces),
        groups=-(-site.num_kv_heads // group),
        chunks=session.query_chunks(spec),
        resident=resident,
        host=len(blocks) - resident - on_cpu,
        num_slots=config.slots,
        distance=0 if "hoist_prefetch" in config.disable_passes else config.distance,
        padded=any(step.padding.values()),
        fused=session.fuses_resident(site),
        cpu=on_cpu,
    )
