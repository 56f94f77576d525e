"""Runs a lowered graph: its regions in order, and at each site the schedule of its plan key.

The executor decides only which schedule runs with which layer and ring; what happens inside a site
is in the schedule and nowhere else.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from headinfer_compile.activations import ActivationModel, sizes_of
from headinfer_compile.auto_settings import AutoSettings
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import CacheError
from headinfer_compile.passes.context import META, AttentionSite, Decline
from headinfer_compile.passes.lower import RegionReport
from headinfer_compile.passes.pipeline import Dump, PassReport, build_prologue, build_schedule
from headinfer_compile.passes.schedule import PlanContext, PlanKey, Schedule
from headinfer_compile.plan_key import chained_key
from headinfer_compile.runtime.masks import MaskForm
from headinfer_compile.runtime.observer import observer_for
from headinfer_compile.runtime.ops import session_of
from headinfer_compile.runtime.rows import unequal_neighbours
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.spec import SiteSpec
from headinfer_compile.runtime.step import Step
from headinfer_compile.step_graphs import StepGraphs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphReport:
    """What the compiler did with one Dynamo graph."""

    sites: tuple[AttentionSite, ...]
    declines: tuple[Decline, ...]
    passes: tuple[PassReport, ...]
    regions: RegionReport


@dataclass
class _Plan:
    """The schedules of one class of sites in one step."""

    schedule: Schedule
    prologue: Schedule | None
    """Starts the entry transfers when the ring does not bring them."""


@dataclass
class CompiledGraph:
    """One Dynamo graph, compiled; called by Dynamo with the graph's flat inputs."""

    graph_module: GraphModule
    config: HeadInferConfig
    sites: Sequence[AttentionSite]
    report: GraphReport
    handle_index: int
    parameter_index: int
    """Of an input that tells models apart: the first parameter."""
    positions_index: int | None
    last_layer: int
    """The last layer that updates the cache in this graph."""
    dump: Dump
    activations: ActivationModel
    auto: AutoSettings
    batch_inputs: Sequence[tuple[int, int]]
    """Inputs with the batch as a dim, and that dim; none where a call cannot be made twice."""
    specs: list[SiteSpec] = field(default_factory=list)
    schedules: dict[PlanKey, Schedule] = field(default_factory=dict)
    prologues: dict[PlanKey, Schedule] = field(default_factory=dict)
    plan_reports: dict[PlanKey, list[PassReport]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.site_specs: list[int] = []
        for site in self.sites:
            assert site.mask is not None
            spec = SiteSpec(
                site.num_heads,
                site.num_kv_heads,
                site.head_dim,
                site.v_head_dim,
                site.scale,
                site.mask,
                site.soft_cap,
                site.sinks,
                site.expand,
            )
            if spec not in self.specs:
                self.specs.append(spec)
            self.site_specs.append(self.specs.index(spec))
        materialised = {
            node.args[3]
            for node in self.graph_module.graph.nodes
            if node.target is torch.ops.headinfer.update_kv.default
        }
        self.forms: dict[int, list[MaskForm]] = {}
        for site, number in zip(self.sites, self.site_specs, strict=True):
            if site.layer not in materialised:
                self.forms.setdefault(site.layer, []).append(self.specs[number].mask)
        self._steps = StepGraphs(self)
        self._nvtx = self.config.nvtx and torch.cuda.is_available()
        self._install_sites()

    def _install_sites(self) -> None:
        """Make every site node of the model graph a call of ``run_site``."""
        graph = self.graph_module.graph
        for node in list(graph.nodes):
            site = node.meta.get(META)
            if node.op != "call_function" or not isinstance(site, AttentionSite):
                continue
            if node.target is not torch.ops.headinfer.attention.default:
                continue
            handle, q, k, v, _, masks, _, past, *_ = node.args
            name = f"site_{site.index}"
            self.graph_module.add_module(name, _SiteCall(self, site.index))
            with graph.inserting_before(node):
                call = graph.call_module(name, (handle, q, k, v, masks, past))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        graph.lint()
        self.graph_module.recompile()

    # -- a call -----------------------------------------------------------------------------

    @property
    def __code__(self) -> types.CodeType:
        """That of ``__call__``: depyf and others look at the code of what Dynamo calls."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any) -> Any:
        """Run one forward pass; on an error the cache is as before it."""
        session = session_of(args[self.handle_index])
        try:
            session.enter_call()
            session.observer = observer_for(session.timer, self._nvtx)
            self._claim(session, args)
            session.announced = self._announced(session, args)
            if session.length == 0:
                # Only then may buffers and the automatic budget be made, in the first site.
                found = self.activations.evaluate(sizes_of(self.graph_module, args))
                session.forward_bytes = max(0, found.peak_bytes(0) - found.site_input_bytes)
            with session.around_call():
                result = self._run(session, args)
                if session.step is not None and not session.step.rows_hold():
                    log.warning(
                        "the inputs of some batch rows are equal and their K and V are not: the "
                        "call is made again, and each row is stored by itself until reset()"
                    )
                    session.abort()
                    session.plans.clear()
                    session.sharing.wanted = False
                    result = self._run(session, args)
            session.commit()
        except BaseException as error:
            session.cancel_call()
            _say_what_to_do(error, session)
            raise
        finally:
            session.leave_call()
        return result

    def _run(self, session: Session, args: Sequence[Any]) -> Any:
        return self._steps.run(session, args) if self.config.cuda_graphs else self.forward(*args)

    def forward(self, *args: Any) -> Any:
        """The regions and sites in order."""
        return self.graph_module.forward(*args)

    def _claim(self, session: Session, args: Sequence[Any]) -> None:
        if self.last_layer != session.last_layer:
            raise CacheError(
                f"this graph updates layers up to {self.last_layer} and the cache expects layers "
                f"up to {session.last_layer}: it was made for another model's config, or Dynamo "
                "broke the model into several graphs (TORCH_LOGS=graph_breaks shows why)"
            )
        if self.positions_index is not None:
            self._check_positions(session, args[self.positions_index])
        # Dynamo shares a graph between models of one shape: which one calls is in the arguments.
        caller = (id(self), id(args[self.parameter_index]))
        if session.claimed_by != caller:
            session.check_layers(site.layer for site in self.sites)
            session.claim(frozenset(id(a) for a in args if isinstance(a, torch.nn.Parameter)))
            session.claimed_by = caller
        self.auto.claim(session, self.config)
        session.specs = self.specs
        session.forms = self.forms
        batched = [(args[index], dim) for index, dim in self.batch_inputs]
        session.sharing.unequal_inputs = partial(_unequal_inputs, batched) if batched else None

    def _announced(self, session: Session, args: Sequence[Any]) -> int:
        """Tokens that a chunked prompt will reach, or 0 where the call does not tell.

        ``generate`` cuts the positions of every chunk out of those of the whole prompt, whose
        length is therefore their stride.
        """
        positions = None if self.positions_index is None else args[self.positions_index]
        if positions is None or positions.dim() != 2:
            return 0
        whole: int = positions.stride(0)
        is_slice = whole > positions.shape[1] > 1 and positions.storage_offset() == session.length
        return whole if is_slice and _is_called_by_generate() else 0

    @staticmethod
    def _check_positions(session: Session, positions: torch.Tensor) -> None:
        """Refuse a prompt that starts over at position 0 on a cache that holds tokens."""
        if session.length == 0 or positions.shape[-1] == 1:
            return
        if int(positions[..., 0].max()) == 0:
            raise CacheError(
                f"the cache holds {session.length} tokens and the new tokens start at position 0 "
                "again: with use_cache=False every call feeds the whole conversation, which needs "
                "no HeadInferCache; transformers before 5.21 does so when prefill_chunk_size is "
                "given on a non-empty cache: leave it out for this turn (queries are split "
                "anyway), or upgrade transformers. Nothing was stored"
            )

    def start(self, session: Session, k: torch.Tensor, v: torch.Tensor, past: int) -> Step:
        """Begin the step of this call at its first site."""
        self.auto.settle(session, session.geometry_of(k, v), past, k.shape[2])
        return session.start(k, v, past, session.forward_bytes)

    def run_site(
        self, index: int, handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        """Attend at one site.

        Args:
            index: Index of the site in this graph.
            handle: The cache's handle.
            q: ``[B, Hq, n, D]``.
            k: ``[B, Hkv, n, D]``, the new tokens.
            v: ``[B, Hkv, n, Dv]``.
            masks: What the site's mask form reads.
            past: Tokens cached before.

        Returns:
            ``[B, Hq, n, Dv]``.
        """
        session = session_of(handle)
        if torch.is_autocast_enabled(q.device.type):
            # SDPA under autocast casts its inputs; inside the site nothing is cast again.
            dtype = torch.get_autocast_dtype(q.device.type)
            with torch.autocast(q.device.type, enabled=False):
                return self._run_site(
                    session, index, handle, q.to(dtype), k.to(dtype), v.to(dtype), masks, past
                )
        return self._run_site(session, index, handle, q, k, v, masks, past)

    def _run_site(
        self, session: Session, index: int, handle: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor, masks: Sequence[torch.Tensor], past: int,
    ) -> torch.Tensor:  # fmt: skip
        site, spec = self.sites[index], self.site_specs[index]
        if session.step is None:
            self.start(session, k, v, past)
        assert session.step is not None
        form = self.specs[spec].mask
        if form.padding is not None:
            session.learn_padding(masks[form.padding])
        last = index + 1 == len(self.sites)
        following = self.sites[0 if last else index + 1]
        if not session.step.paged and session.fuses_resident(self.specs[spec]):
            session.sync_paged(None if form.padding is None else masks[form.padding])
        plan = self._plan(session, spec, None if last else self.site_specs[index + 1], masks)
        schedule = plan.schedule
        if session.observer is not None:
            session.observer.begin_site(site.layer, schedule)
        self._enter(session, plan, site.layer, handle, q, k, v, masks)
        out, *ring = schedule.function(
            handle, q, k, v, masks, site.layer, following.layer, session.base, *session.ring
        )
        if session.observer is not None:
            session.observer.end_site()
        session.ring = tuple(ring)
        session.base = (session.base + schedule.num_transfers) % len(ring)
        session.in_flight = session.transfer_tags(following.layer, schedule.key.next_transfers)
        session.counters.sites.add(site.layer)
        return out  # type: ignore[no-any-return]

    def _enter(
        self, session: Session, plan: _Plan, layer: int, handle: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor, masks: Sequence[torch.Tensor],
    ) -> None:  # fmt: skip
        """Make the ring hold what the schedule expects, reusing what is in flight if it matches."""
        expected = session.transfer_tags(
            layer, plan.schedule.key.transfers()[: plan.schedule.entry]
        )
        if session.in_flight == expected:
            return
        if session.in_flight:
            session.drain()
        if plan.prologue is not None:
            _, *ring = plan.prologue.function(
                handle, q, k, v, masks, layer, layer, session.base, *session.ring
            )
            session.ring = tuple(ring)

    # -- plans ------------------------------------------------------------------------------

    def _plan(
        self, session: Session, spec: int, next_spec: int | None, masks: Sequence[torch.Tensor]
    ) -> _Plan:
        # Kept by the session: another thread may run this graph over another cache.
        plans: dict[tuple[int, int | None], _Plan] = session.plans
        plan = plans.get((spec, next_spec))
        if plan is None:
            plan = plans[spec, next_spec] = self._make_plan(session, spec, next_spec)
        return plan

    def _make_plan(self, session: Session, spec: int, next_spec: int | None) -> _Plan:
        key = chained_key(session, spec, next_spec, self.site_specs[0], session.config)
        schedule = session.schedule_overrides.get(key) or self.schedules.get(key)
        if schedule is None:
            context = PlanContext(key, session.config)
            schedule, self.plan_reports[key] = build_schedule(context, self.dump, keep_text=False)
            self.schedules[key] = schedule
            log.info(
                "schedule: %d nodes, %d transfers, built in %.1f ms, of it %.1f ms of proof",
                schedule.num_nodes, schedule.num_transfers, schedule.build_seconds * 1e3,
                schedule.verify_seconds * 1e3,
            )  # fmt: skip
        prologue = None
        if key.entry:
            cold = replace(key, next_transfers=())
            if cold not in self.prologues:
                self.prologues[cold] = build_prologue(PlanContext(cold, session.config))
            prologue = self.prologues[cold]
        return _Plan(schedule, prologue)


def _say_what_to_do(error: BaseException, session: Session) -> None:
    """Add to the error of a refused device allocation, which stays the one it is."""
    if isinstance(error, torch.OutOfMemoryError) and sys.version_info >= (3, 11):
        error.add_note(
            f"the HeadInferCache holds {session.length} tokens, as before this call. To need less "
            "of the GPU, lower gpu_budget, prefill_chunk_size or workspace_bytes, and call again"
        )


def _is_called_by_generate() -> bool:
    """Whether transformers' ``generate`` is running: a caller's own positions may be any slice."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and "transformers" in code.co_filename:
            return True
        frame = frame.f_back
    return False


def _unequal_inputs(batched: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    found = [unequal_neighbours(value, dim) for value, dim in batched]
    return torch.stack([flags.to(found[0].device) for flags in found]).any(0)


class _SiteCall(torch.nn.Module):
    """A site as the model graph calls it."""

    def __init__(self, owner: CompiledGraph, index: int) -> None:
        super().__init__()
        self._run: Callable[..., torch.Tensor] = owner.run_site
        self._index = index

    def forward(self, *args: Any) -> torch.Tensor:
        return self._run(self._index, *args)
