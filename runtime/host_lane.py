"""The CPU lane of decode: host blocks attended where they lie, while others are transferred.

The query is copied to a buffer of the lane on compute and down on the cpu stream; a host function
attends the pages there; ``(out, lse)`` comes up, and compute waits for it before the merge. One set
of buffers serves all sites: a site's query is copied on compute after the merge of the site before.
No Python runs in the host function and nothing waits on the host.

Legend: B batch, Hq query heads, n query tokens, D head dim of K, Dv of V.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import torch

from headinfer_compile.errors import HostAttentionError, ScheduleError
from headinfer_compile.runtime.copies import can_launch_host_functions
from headinfer_compile.runtime.host_attention import (
    DTYPES,
    HostKernel,
    HostReport,
    JobShape,
    available_cores,
    shared_kernel,
    worker_threads,
)
from headinfer_compile.runtime.host_balance import Balance, Race, Races
from headinfer_compile.runtime.numa import device_cpus
from headinfer_compile.runtime.spec import Geometry, SiteSpec
from headinfer_compile.runtime.step import DECODE_MAX_QUERIES, KVBlock, Step
from headinfer_compile.runtime.streams import Streams

if TYPE_CHECKING:
    from headinfer_compile.runtime.session import Session

log = logging.getLogger(__name__)

_OBSERVE_EVERY = 4
"""Sites between two that are timed, for the balance."""


class HostLane:
    """Kernel, buffers and events of one session."""

    def __init__(
        self, geometry: Geometry, kernel: HostKernel, streams: Streams, specs: list[SiteSpec]
    ) -> None:
        """Allocate for the largest of ``specs`` at the most query tokens of a decode step."""
        self.geometry, self.kernel, self.streams = geometry, kernel, streams
        self.report = HostReport()
        tokens = geometry.batch * DECODE_MAX_QUERIES
        q_size = max(tokens * spec.num_heads * spec.head_dim for spec in specs)
        out_size = max(tokens * spec.num_heads * (spec.v_head_dim + 1) for spec in specs)
        pinned, device = streams.is_cuda, geometry.device
        with torch.inference_mode(False):
            self.query = torch.empty(q_size, dtype=geometry.dtype, device=device)
            self.query_host = torch.empty(q_size, dtype=geometry.dtype, pin_memory=pinned)
            self.result_host = torch.empty(out_size, dtype=torch.float32, pin_memory=pinned)
            self.result = torch.empty(out_size, dtype=torch.float32, device=device)
        self.asked = streams.new_event("host.asked")
        self.done = streams.new_event("host.done")
        # Beside pages that are transferred, a copy of the result would wait for them.
        self._pulls = pinned and importlib.util.find_spec("triton") is not None
        self.balances: dict[tuple[SiteSpec, int], Balance] = {}
        self.races = Races()
        self.issued = 0
        """Jobs so far, in the order of the cpu stream."""
        self._done = (0, 0)
        """Bytes and nanoseconds that the report had at the last step."""
        self._steps: deque[tuple[int, int]] = deque(maxlen=16)
        self._failed: tuple[int, str] | None = None
        self._pages: dict[int, tuple[object, ctypes.Array[ctypes.c_int64]]] = {}
        self._shapes: dict[tuple[SiteSpec, int], JobShape] = {}
        self._pending: tuple[int, JobShape, Race | None] | None = None

    @property
    def nbytes(self) -> int:
        """Device bytes of the buffers."""
        return self.query.nbytes + self.result.nbytes

    @property
    def gb_s(self) -> float | None:
        """Rate of the jobs so far while they ran."""
        report = self.report
        return report.bytes / report.nanoseconds if report.nanoseconds else None

    @property
    def lead_us(self) -> float | None:
        """The mean of what the balances observed last."""
        found = [balance.lead_seconds for balance in self.balances.values()]
        leads = [lead for lead in found if lead is not None]
        return sum(leads) / len(leads) * 1e6 if leads else None

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Everything that the cpu stream copies from or to, by name."""
        return {
            "the query": self.query, "the query on the host": self.query_host,
            "the result on the host": self.result_host, "the result": self.result,
        }  # fmt: skip

    def fits(self, spec: SiteSpec) -> bool:
        """Whether the buffers hold a site of this class."""
        tokens = self.geometry.batch * DECODE_MAX_QUERIES * spec.num_heads
        return (
            tokens * spec.head_dim <= self.query.numel()
            and tokens * (spec.v_head_dim + 1) <= self.result.numel()
        )

    def begin_step(self, past: int) -> None:
        """Note where the jobs of a step begin, and learn from the steps whose events are reached.

        Raises:
            HostAttentionError: A job of an earlier step failed, and its tokens are still held.
        """
        self.check(past)
        self._steps.append((self.issued, past))
        for balance in self.balances.values():
            balance.begin_step()
        done = self.report.bytes, self.report.nanoseconds
        if done[0] > self._done[0]:
            self.races.settle((done[0] - self._done[0]) / (done[1] - self._done[1]) * 1e9)
            self._done = done

    def check(self, length: int) -> None:
        """Raise what a job that failed says, as long as the cache holds ``length`` > its tokens.

        Raises:
            HostAttentionError: The message says how many tokens are sound.
        """
        message = self.report.take_error()
        if message is not None and self._failed is None:
            sound = [past for issued, past in self._steps if issued <= self.report.failed]
            self._failed = (sound[-1] if sound else 0, message)
        if self._failed is None or length <= self._failed[0]:
            self._failed = None
            return
        sound_tokens, message = self._failed
        raise HostAttentionError(
            f"attention on the CPU failed ({message}): the tokens from {sound_tokens} on are not "
            f"right, all before are intact. crop({sound_tokens - length}) the cache and go on from "
            "there; cpu_attention='off' does without the CPU"
        )

    def pages(self, layer: int, blocks: tuple[KVBlock, ...]) -> ctypes.Array[ctypes.c_int64]:
        """Address, tokens, valid rows and position of each page of a layer."""
        tags = tuple(block.tag for block in blocks)
        held = self._pages.get(layer)
        if held is None or held[0] != tags:
            flat = [
                number
                for block in blocks
                for page, rows in block.pages
                for number in (page.pages[layer][0].data_ptr(), page.tokens, rows, page.start)
            ]
            held = self._pages[layer] = (tags, (ctypes.c_int64 * len(flat))(*flat))
        return held[1]

    def shape(self, spec: SiteSpec, queries: int) -> JobShape:
        """The job of a class of sites."""
        key = (spec, queries)
        if key not in self._shapes:
            self._shapes[key] = JobShape(
                self.geometry.dtype, self.geometry.batch, spec.num_kv_heads, spec.queries_per_kv,
                queries, spec.head_dim, spec.v_head_dim, spec.scale, spec.soft_cap or 0.0,
            )  # fmt: skip
        return self._shapes[key]

    def balance(self, spec: SiteSpec, queries: int) -> Balance:
        """The share of a class of sites at this many query tokens."""
        return self.balances.setdefault((spec, queries), Balance())

    def ask(
        self, q: torch.Tensor, shape: JobShape, layer: int, blocks: tuple[KVBlock, ...],
        starts: ctypes.Array[ctypes.c_int64] | None, race: Race | None,
    ) -> int:  # fmt: skip
        """Queue a job for ``q`` ``[B, Hq, n, D]``, for whose pages cpu waits; returns a token."""
        streams, size, results = self.streams, q.numel(), shape.rows * (shape.v_head_dim + 1)
        self.query[:size].view(q.shape).copy_(q)
        streams.record(self.asked, "compute")
        streams.wait(self.asked, "cpu")
        out = self.result_host.data_ptr()
        job = self.kernel.job(
            shape, self.report, self.query_host.data_ptr(), out,
            out + 4 * shape.rows * shape.v_head_dim, self.pages(layer, blocks),
            0 if starts is None else ctypes.addressof(starts),
        )  # fmt: skip
        with streams.on("cpu"):
            self.query_host[:size].copy_(self.query[:size], non_blocking=True)
            streams.call(self.kernel, job, partial(self._uses, size, results, layer, blocks))
            self._copy_up(self.result[:results], self.result_host[:results])
        streams.record(self.done, "cpu")
        if race is not None:
            streams.record(race.cpu_done, "cpu")
        self.issued += 1
        self._pending = (self.issued, shape, race)
        return self.issued

    def _copy_up(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not self._pulls:
            target.copy_(source, non_blocking=True)
            return
        from headinfer_compile.runtime.pull_triton import pull

        pull(target, source)  # the stream that is current makes its device current

    def _uses(
        self, size: int, results: int, layer: int, blocks: tuple[KVBlock, ...]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a job reads and writes."""
        read = [self.query_host[:size]]
        for page, rows in (part for block in blocks for part in block.pages):
            read += [x[:, :, :rows] for x in page.pages[layer]]
        return read, [self.result_host[:results]]

    def take(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let compute wait for a result: ``(out, lse)`` of all heads.

        Raises:
            ScheduleError: The token is not that of the last ``ask``.
        """
        if self._pending is None or self._pending[0] != token:
            raise ScheduleError(f"token {token} asks nothing of the CPU, or has been waited for")
        (_, shape, race), self._pending = self._pending, None
        if race is not None:
            self.streams.record(race.gpu_there, "compute")
            self.races.add(race)
        self.streams.wait(self.done, "compute")
        outs = shape.rows * shape.v_head_dim
        heads = shape.num_kv_heads * shape.queries_per_kv
        size = (shape.batch, heads, shape.queries)
        lse = self.result[outs : outs + shape.rows].view(size)
        return self.result[:outs].view(*size, shape.v_head_dim), lse


def cpu_blocks(session: Session, index: int) -> int:
    """How many host blocks of this step the CPU attends at sites of class ``index``.

    Prefill never uses the CPU, nor does a mask that is more than a band over the past, K and V that
    are stored compressed, or a batch of which rows share what is stored. With ``"auto"`` it is
    nothing on a CPU, which has no link to relieve.
    """
    step, geometry, setting = session.step, session.geometry, session.config.cpu_attention
    assert step is not None and geometry is not None
    if setting == "off" or step.phase != "decode":
        return 0
    spec = session.specs[index]
    on_host = [block for block in session.kv_blocks(spec) if block.tier == "host"]
    blocks = len(on_host)
    if (
        not blocks
        or spec.mask.expr is not None
        or spec.expand is not None
        or not all(
            page.is_plain and page.num_rows == geometry.batch
            for block in on_host
            for page, _ in block.pages
        )
        or any(step.padding.values())
        or geometry.dtype not in DTYPES
        or session.query_chunks(index) > 1
    ):
        return 0
    if geometry.device.type == "meta":
        share = Balance().share if setting == "auto" else float(setting)
        return Balance(share).count(blocks)
    if setting == "auto" and geometry.device.type != "cuda":
        return 0
    lane = lane_of(session)
    if lane is None:
        return 0
    if setting == "auto":
        return lane.balance(spec, step.new).count(blocks)
    return Balance(float(setting)).count(blocks)


def lane_of(session: Session) -> HostLane | None:
    """The lane of a session, made when the first step needs it; None where there is no kernel."""
    lane, geometry = session.lane, session.geometry
    assert geometry is not None
    if lane is not None and all(lane.fits(spec) for spec in session.specs):
        return lane
    cpus = device_cpus(geometry.device)
    kernel = shared_kernel(worker_threads(available_cores(cpus)), cpus)
    if kernel is None or (session.streams.is_cuda and not can_launch_host_functions()):
        return None
    if lane is not None:
        # Another model's classes: its buffers are in use no more once the streams are idle.
        session.streams.drain()
    session.lane = HostLane(geometry, kernel, session.streams, session.specs)
    return session.lane


def attend_host(
    session: Session, layer: int, q: torch.Tensor, spec: int, block: int, count: int
) -> int:
    """Let the CPU attend ``count`` KV blocks from ``block`` on; the token is for ``wait_host``."""
    step, lane, site = session.step, session.lane, session.specs[spec]
    assert step is not None and lane is not None and session.geometry is not None
    kv_blocks = session.kv_blocks(site)
    blocks = kv_blocks[block : block + count]
    rows = sum(part.rows for part in blocks)
    session.counters.cpu_bytes += rows * session.geometry.layer_token_bytes
    session.streams.wait(session.written_event(layer), "cpu")
    race = None
    if session.config.cpu_attention == "auto" and lane.issued % _OBSERVE_EVERY == 0:
        on_host = sum(part.tier == "host" for part in kv_blocks)
        whole = max(part.rows for part in kv_blocks) * session.geometry.layer_token_bytes
        done, there = session.streams.timing_event(), session.streams.timing_event()
        race = Race(lane.balance(site, step.new), on_host, count, whole, done, there)
    shape = lane.shape(site, step.new)
    return lane.ask(q, shape, layer, blocks, _starts(step, site, shape), race)


def _starts(step: Step, site: SiteSpec, shape: JobShape) -> ctypes.Array[ctypes.c_int64] | None:
    """The first position that each query sees, for a band."""
    window = site.mask.window
    if window is None:
        return None
    first = [step.past + query - window + 1 for query in range(step.new)] * shape.batch
    return (ctypes.c_int64 * len(first))(*first)


def wait_host(session: Session, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make compute wait for the CPU: out ``[B, Hq, n, Dv]`` and LSE ``[B, Hq, n]`` in fp32."""
    assert session.lane is not None
    return session.lane.take(token)
