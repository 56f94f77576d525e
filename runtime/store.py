"""The memory of one cache: geometry, budgets, token blocks, slots, staging ring and tail."""

from __future__ import annotations

import bisect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from headinfer_compile.config import HeadInferConfig, format_bytes
from headinfer_compile.errors import CacheError, ClosedError, DoesNotFitError
from headinfer_compile.runtime import sizes
from headinfer_compile.runtime.block_plan import least_bytes
from headinfer_compile.runtime.budget import default_gpu_budget, default_host_budget, refusing
from headinfer_compile.runtime.host_build import library
from headinfer_compile.runtime.host_lane import HostLane
from headinfer_compile.runtime.observer import Observer
from headinfer_compile.runtime.paged import PagedTables
from headinfer_compile.runtime.pages import BlockTable
from headinfer_compile.runtime.slots import SlotRing
from headinfer_compile.runtime.spec import Geometry
from headinfer_compile.runtime.staging import StagingRing, Tail
from headinfer_compile.runtime.step import Phase
from headinfer_compile.runtime.streams import Event, Streams
from headinfer_compile.runtime.trace import Timer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionOptions:
    """Budgets and sizes given to the cache; None means ``"auto"``."""

    gpu_budget: int | None = None
    host_budget: int | None = None
    page_tokens: int | None = None
    tail_tokens: int | None = None
    windows: tuple[tuple[int, int | None], ...] = ()
    """The layers that keep KV, each with the tokens of its window or None; empty: all layers,
    without windows."""
    device: torch.device | None = None
    """The only device that K and V may come from; None: any."""


class Store:
    """Everything a cache has allocated; nothing here knows what is stored."""

    def __init__(self, num_layers: int, options: SessionOptions) -> None:
        self.num_layers = num_layers
        self.options = options
        self.config = HeadInferConfig()
        """The options in use: those asked for, with numbers for what these leave open."""
        self.asked = self.config
        self.reasons: Mapping[str, str] = {}
        """Why ``config`` has its numbers, by the name of the option and the phase."""
        self.closed = False
        self.capability: tuple[int, int] | None = None
        self.max_positions: int | None = None
        """Tokens that the model was made for; one warning is given beyond."""
        self.regular_chunk = 0
        """Tokens of the first call: the chunk that most calls of a prefill have."""
        self.reserved = 0
        """Tokens announced by ``check_room``; their slabs are made in the background."""
        self.announced = 0
        """Tokens that the prompt of the call in progress will reach, where the call tells."""
        self.forward_bytes = 0
        """What the forward in progress needs on the device beyond what its first site finds."""
        self.geometry: Geometry | None = None
        self.generation = 0
        """How often the memory was given back: captured addresses hold within one generation."""
        self.make_streams: Callable[[torch.device], Streams] = Streams
        self.streams: Streams
        self.table: BlockTable
        self.slots: SlotRing | None = None
        self.staging: StagingRing | None = None
        self.lane: HostLane | None = None
        """What attention on the CPU needs, once a step has asked for it."""
        self.tail: Tail
        self._paged: PagedTables | None = None
        self.timer: Timer | None = None
        """Times the ops while the cache is profiled."""
        self.observer: Observer | None = None
        """Sees the ops of the call that is running."""
        self._layouts: dict[Phase, sizes.Layout] = {}
        self._layouts_of: tuple[Geometry | None, HeadInferConfig | None] = (None, None)

    def bind(self, k: torch.Tensor, v: torch.Tensor, activation_bytes: int) -> Geometry:
        """Fix the geometry by the first K ``[B, Hkv, n, D]`` and V ``[B, Hkv, n, Dv]``.

        Raises:
            ClosedError: The cache was closed.
            CacheError: They are no K and V, or a later call has another batch, shape, dtype or
                device.
            DoesNotFitError: The device has no room for the fixed buffers.
        """
        if self.closed:
            raise ClosedError("this HeadInferCache was closed and holds nothing: make a new one")
        found, device = self.geometry_of(k, v), self.options.device
        if device is not None and (
            device.type != k.device.type or device.index not in (None, k.device.index)
        ):
            raise CacheError(
                f"K and V came on {k.device} and this cache was made with device={device}: move "
                "the model there, or leave device out"
            )
        if self.geometry is None:
            self.regular_chunk = k.shape[2]
            self._allocate(found, activation_bytes)
        elif found != self.geometry:
            self._explain_mismatch(found)
        assert self.geometry is not None
        return self.geometry

    def geometry_of(self, k: torch.Tensor, v: torch.Tensor) -> Geometry:
        """The geometry that K ``[B, Hkv, n, D]`` and V ``[B, Hkv, n, Dv]`` need."""
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or not k.is_floating_point():
            raise CacheError(
                f"K came as {tuple(k.shape)} of {k.dtype} and V as {tuple(v.shape)}: expected "
                "floating point [batch, KV heads, new tokens, head dim], alike but for the last. "
                "Nothing was stored"
            )
        return Geometry(
            self.num_layers, k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device,
            tuple(layer for layer, _ in self.options.windows),
        )  # fmt: skip

    def _explain_mismatch(self, found: Geometry) -> None:
        held = self.geometry
        assert held is not None
        causes = {
            "batch": "batch size changed; use a new cache (or reset()) for another batch",
            "num_kv_heads": "this cache belongs to another model; use one cache per model",
            "head_dim": "this cache belongs to another model; use one cache per model",
            "v_head_dim": "this cache belongs to another model; use one cache per model",
            "dtype": "the dtype of K and V changed; use a new cache for another dtype",
            "device": "K and V moved to another device; use a new cache for another device",
        }
        for name, cause in causes.items():
            if getattr(held, name) != getattr(found, name):
                raise CacheError(
                    f"the cache holds K and V with {name}={getattr(held, name)}, and K "
                    f"and V came with {name}={getattr(found, name)}: {cause}. "
                    "What is stored is intact"
                )

    def _allocate(self, geometry: Geometry, activation_bytes: int) -> None:
        options = self.options
        self.streams = self.make_streams(geometry.device)
        tail_tokens = sizes.tail_tokens(geometry, options.tail_tokens)
        table = BlockTable(
            geometry, options.page_tokens, 0, 0, self._resident_room,
            {layer: window for layer, window in options.windows if window is not None},
            self.regular_chunk,
        )  # fmt: skip
        fixed = (
            self.config.slots * sizes.slot_bytes(self.config, geometry, table.largest_page_tokens)
            + tail_tokens * geometry.token_bytes
            + sizes.staging_bytes(geometry, options.page_tokens)
        )
        workspace = int(self.config.workspace_bytes)
        table.gpu_budget = (
            default_gpu_budget(geometry.device, fixed + workspace + activation_bytes)
            if options.gpu_budget is None
            else options.gpu_budget
        )
        table.host_budget = (
            default_host_budget() if options.host_budget is None else options.host_budget
        )
        with refusing(
            f"the GPU has no room for the fixed buffers: {format_bytes(fixed)} of slots, "
            f"staging and tail, beside {format_bytes(workspace)} of workspace. Lower "
            "tail_tokens, page_tokens or num_slots, or free GPU memory"
        ):
            self.tail = Tail(geometry, tail_tokens, self.streams)
        self._written = [
            self.streams.new_event("pages.written") for _ in range(geometry.num_layers)
        ]
        if geometry.device.type == "cuda":
            self.capability = torch.cuda.get_device_capability(geometry.device)
            if self.config.cpu_attention != "off":
                # Built now, if it has to be: the first decode step would wait for it.
                library()
        self.table = table
        self.geometry = geometry

    def _resident_room(self) -> int:
        """Bytes of the device that the forward in progress and buffers to come leave now."""
        geometry = self.geometry
        if geometry is None or geometry.device.type != "cuda":
            return sys.maxsize
        needed = self.forward_bytes + int(self.config.workspace_bytes)
        if self.slots is None:
            page = self.table.largest_page_tokens
            needed += self.config.slots * sizes.slot_bytes(self.config, geometry, page)
        if self.staging is None:
            needed += sizes.staging_bytes(geometry, self.options.page_tokens)
        return default_gpu_budget(geometry.device, needed)

    def layout(self, phase: Phase) -> sizes.Layout:
        """Head group and slot tokens of a phase (``HeadInferConfig``)."""
        assert self.geometry is not None
        # Operators ask several times a site: computed once for each geometry and config.
        of = (self.geometry, self.config)
        if self._layouts_of[0] is not of[0] or self._layouts_of[1] is not of[1]:
            self._layouts_of, self._layouts = of, {}
        if phase not in self._layouts:
            page = self.table.largest_page_tokens
            self._layouts[phase] = sizes.phase_layout(self.config, self.geometry, page, phase)
        return self._layouts[phase]

    def slot_ring(self) -> SlotRing:
        """The slots, made when the first streamed step needs them.

        Raises:
            DoesNotFitError: The device has no room for them.
        """
        if self.slots is None:
            geometry = self.geometry
            assert geometry is not None
            nbytes = sizes.slot_bytes(self.config, geometry, self.table.largest_page_tokens)
            count = self.config.slots
            with refusing(
                f"the GPU has no room for {count} slots of {format_bytes(nbytes)}: lower "
                "slot_tokens, page_tokens or num_slots, or free GPU memory"
            ):
                self.slots = SlotRing(geometry, count, nbytes, self.streams)
            # The allocator may give memory that compute, in whose order it was freed, still uses.
            self.streams.join("h2d", "compute")
        return self.slots

    def drop_slots_unless(self, config: HeadInferConfig) -> None:
        """Give the slots up, none of which is in use, unless ``config`` has the same ones."""
        assert self.slots is not None and self.geometry is not None
        nbytes = sizes.slot_bytes(config, self.geometry, self.table.largest_page_tokens)
        if (config.slots, nbytes) != (len(self.slots.slots), self.slots.slot_bytes):
            self.slots = None

    def staging_tokens(self, geometry: Geometry) -> int:
        """Tokens of one staging buffer."""
        return sizes.staging_tokens(geometry, self.options.page_tokens)

    def make_staging(self) -> StagingRing:
        """The staging ring, made when the first step needs it.

        Raises:
            DoesNotFitError: The device has no room for it.
        """
        if self.staging is None:
            assert self.geometry is not None
            tokens = self.staging_tokens(self.geometry)
            nbytes = sizes.staging_bytes(self.geometry, self.options.page_tokens)
            with refusing(
                f"the GPU has no room for {format_bytes(nbytes)} of staging buffers: lower "
                "page_tokens, or free GPU memory. What is stored is intact"
            ):
                self.staging = StagingRing(self.geometry, tokens, self.streams)
        return self.staging

    def check_room(self, tokens: int, token_bytes: int) -> None:
        """Check that ``tokens`` tokens of ``token_bytes`` bytes (all layers) can be held.

        Raises:
            DoesNotFitError: The budgets do not hold them.
        """
        if self.geometry is not None:
            self.table.plan(tokens)
            self.reserved = tokens
            return
        host = self.options.host_budget
        host = default_host_budget() if host is None else host
        windows = [window for _, window in self.options.windows] or [None]
        needed = least_bytes(tokens, token_bytes, windows)
        gpu = self.options.gpu_budget
        if gpu is None:
            # Not known before the first forward; whatever is free now is the most it can be.
            gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        if needed > host + gpu:
            longest = bisect.bisect_right(
                range(tokens), host + gpu, key=lambda t: least_bytes(t, token_bytes, windows)
            )
            raise DoesNotFitError(
                f"{tokens} tokens of KV take {format_bytes(needed)}; there is room for "
                f"{format_bytes(host)} on the host and {format_bytes(gpu)} on the GPU. What would "
                f"work: a context of at most {max(0, longest - 1)} tokens; "
                f"host_budget={needed - gpu}; gpu_budget={needed - host}, where the machine has "
                "them"
            )
        self.reserved = tokens

    def warn_beyond_positions(self, past: int, new: int) -> None:
        """Warn once where tokens pass what the model was made for."""
        limit = self.max_positions
        if limit is not None and past <= limit < past + new:
            log.warning(
                "the cache will hold %d tokens and the model was made for %d "
                "(max_position_embeddings): depending on the model, expect errors or nonsense",
                past + new, limit,
            )  # fmt: skip

    def check_announced(self, num_rows: int | None) -> None:
        """Refuse a prompt whose end does not fit, before anything is computed for it.

        Args:
            num_rows: Rows that are stored of each token; None: one for each batch row.

        Raises:
            DoesNotFitError: The budgets do not hold it.
        """
        if self.announced > self.reserved:
            self.table.plan(self.announced, num_rows)
            self.reserved = self.announced

    def prepare_chunk(self, length: int, tokens: int, num_rows: int | None) -> None:
        """Make slabs for what was announced, or for another chunk of ``tokens`` after ``length``.

        A chunk that would be refused is not known to come, so that it is only warned of.
        """
        if self.reserved > length:
            self.table.prepare(self.reserved, num_rows, soon=length + tokens)
        elif not self.table.prepare(length + tokens, num_rows, soon=length + tokens):
            log.warning(
                "there is room for %d tokens and the cache holds %d: another chunk of %d does not "
                "fit and would be refused",
                self.table.longest, length, tokens,
            )  # fmt: skip

    def check_layers(self, layers: Iterable[int]) -> None:
        """Refuse layers that the cache keeps no KV for.

        Raises:
            CacheError: The model has KV in layers where the cache's config has none.
        """
        held = {layer for layer, _ in self.options.windows} or set(range(self.num_layers))
        unknown = sorted(set(layers) - held)
        if unknown:
            raise CacheError(
                f"layer {unknown[0]} updates a cache whose config has no KV there: it was made for "
                "another model's config; use HeadInferCache(model.config)"
            )

    def check_materialised(self, tokens: int) -> None:
        """Refuse to put all K and V of one layer on the GPU where the budget forbids it.

        Raises:
            DoesNotFitError: ``tokens`` tokens of one layer exceed the ``gpu_budget`` given.
        """
        assert self.geometry is not None
        needed, budget = tokens * self.geometry.layer_token_bytes, self.options.gpu_budget
        if self.geometry.device.type == "cuda" and budget is not None and needed > budget:
            raise DoesNotFitError(
                f"all K and V of one layer take {format_bytes(needed)} on the GPU and gpu_budget "
                f"is {format_bytes(budget)}: call model.compile(backend='headinfer'), so that "
                "attention runs block by block, or raise gpu_budget. What is stored is intact"
            )

    def paged_tables(self) -> PagedTables:
        """The tables of ``attend_resident``; ``sync_paged`` fills them."""
        if self._paged is None:
            assert self.geometry is not None
            self._paged = PagedTables(self.geometry, self.tail)
        return self._paged

    def written_event(self, layer: int) -> Event:
        """Recorded on d2h after the last offload of a layer."""
        return self._written[layer]

    def rebind(self, geometry: Geometry, tail: Tail) -> None:
        """Go on with another batch and a tail for it; no copy is under way."""
        self.slots = self.staging = self.lane = self._paged = None
        self.generation += 1
        self.geometry = self.table.geometry = geometry
        self.tail = tail

    def free(self) -> None:
        """Wait for the copies in flight and give all memory back; ``bind`` may follow."""
        if self.geometry is not None:
            # Compute may still read pinned pages (a gather without a schedule).
            self.streams.join("h2d", "compute")
            self.streams.drain()
            self.table.close()
            self.__dict__.pop("tail", None)
        self.slots = self.staging = self.lane = self._paged = None
        self.generation += 1
        # Last: without a geometry there is nothing to give back.
        self.geometry = None

    def bytes_of(self, part: Literal["slots", "staging", "tail"]) -> int:
        """Device bytes of a fixed buffer."""
        if self.geometry is None:
            return 0
        buffer = {"slots": self.slots, "staging": self.staging, "tail": self.tail}[part]
        return buffer.nbytes if buffer is not None else 0
