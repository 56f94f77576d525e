"""``HeadInferCache``: a ``transformers.Cache`` whose K and V live in host memory."""

from __future__ import annotations

import logging
import sys
from typing import Any, NoReturn

import torch
from transformers import PretrainedConfig

from headinfer_compile.cache_arguments import (
    auto_bytes,
    auto_count,
    check_count,
    find_device,
    layers_with_kv,
    token_bytes,
    window_of,
)
from headinfer_compile.cache_protocol import CacheProtocol
from headinfer_compile.errors import CacheError, ClosedError
from headinfer_compile.flex_masks import register_block_masks
from headinfer_compile.linear_states import LinearStates, linear_layers
from headinfer_compile.passes.schedule import Schedule
from headinfer_compile.runtime.retention import check_crop
from headinfer_compile.runtime.session import Session
from headinfer_compile.runtime.store import SessionOptions
from headinfer_compile.runtime.transfer_ops import update_without_schedule
from headinfer_compile.stats import CacheStats, collect_stats
from headinfer_compile.why_eager import why_eager

log = logging.getLogger(__name__)


class HeadInferCache(CacheProtocol):
    """KV cache in pinned host memory, streamed block by block to exact attention on the GPU."""

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        gpu_budget: int | str = "auto",
        host_budget: int | str = "auto",
        page_tokens: int | str = "auto",
        tail_tokens: int | str = "auto",
        strict: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Make an empty cache; memory is taken when the first K and V come.

        Args:
            config: The model's config (its decoder's part is used).
            gpu_budget: Bytes of KV blocks that may stay on the GPU, as an int or ``"1GiB"``; 0 is
                valid. Slots, staging, tail and workspace come on top. ``"auto"``: what is free,
                less these and what the forward needs; 0 on a CPU.
            host_budget: Bytes of host memory for pages; ``"auto"``: what is available less a tenth.
            page_tokens: Tokens of a page; ``"auto"``: 1,024 and more, up to pages of 32 MiB.
            tail_tokens: Newest tokens kept on the GPU; ``"auto"``: 256, fewer where they would
                exceed 64 MiB.
            strict: Raise instead of returning materialised K and V to an uncompiled model.
            device: Refuse K and V from another device.

        Raises:
            OptionError: A size or the device is malformed.
            CacheError: ``config`` is no config, or that of an encoder-decoder or of a model without
                attention layers.
        """
        text, kinds, with_kv = layers_with_kv(config)
        self._make(
            len(kinds), with_kv[-1], gpu_budget, host_budget, page_tokens, tail_tokens, strict,
            device, tuple((layer, window_of(text, kinds[layer])) for layer in with_kv),
        )  # fmt: skip
        self._token_bytes = token_bytes(text, len(with_kv))
        self._hold_states(linear_layers(text, kinds))
        self.session.max_positions = getattr(text, "max_position_embeddings", None)

    @classmethod
    def from_shape(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        gpu_budget: int | str = "auto",
        host_budget: int | str = "auto",
        page_tokens: int | str = "auto",
        tail_tokens: int | str = "auto",
        strict: bool = False,
        device: torch.device | str | None = None,
    ) -> HeadInferCache:
        """Make a cache for a model that is not from transformers; arguments as ``__init__``.

        Raises:
            OptionError: A count, a size or the device is malformed.
        """
        counts = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, value in counts.items():
            check_count(value, name)
        cache = cls.__new__(cls)
        cache._make(
            num_layers, num_layers - 1, gpu_budget, host_budget, page_tokens, tail_tokens, strict,
            device,
        )  # fmt: skip
        width = head_dim + (v_head_dim or head_dim)
        cache._token_bytes = num_layers * num_kv_heads * width * dtype.itemsize
        return cache

    def _make(
        self, num_layers: int, last_layer: int, gpu_budget: int | str, host_budget: int | str,
        page_tokens: int | str, tail_tokens: int | str, strict: bool,
        device: torch.device | str | None, windows: tuple[tuple[int, int | None], ...] = (),
    ) -> None:  # fmt: skip
        self._hold_states([])
        self.layer_class_to_replicate = None
        self.offloading = False
        options = SessionOptions(
            gpu_budget=auto_bytes(gpu_budget, "gpu_budget"),
            host_budget=auto_bytes(host_budget, "host_budget"),
            page_tokens=auto_count(page_tokens, "page_tokens"),
            tail_tokens=auto_count(tail_tokens, "tail_tokens"),
            windows=windows,
            device=None if device is None else find_device(device),
        )
        self.num_layers = num_layers
        self.last_layer = last_layer
        self.length = 0
        self.strict = strict
        self._warned = False
        with torch.inference_mode(False):
            self.handle = torch.zeros((), dtype=torch.int64)
        self.handle.session = Session(num_layers, last_layer, options)  # type: ignore[attr-defined]

    def _hold_states(self, layers: list[Any]) -> None:
        """Hold the states of linear-attention layers; ``layers`` has None for all other layers."""
        self.layers: list[Any] = layers
        self.linear = LinearStates(layers, self.get_seq_length)
        if layers:
            self.session.around_call = self.linear.around_call

    # -- what models and generate ask ---------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new K ``[B, Hkv, n, D]`` and V ``[B, Hkv, n, Dv]`` of a layer; return all of both.

        In a graph compiled by ``backend="headinfer"`` this call and the attention behind it become
        one site and nothing is returned in full. Run eagerly it is exact, and warns once.

        Raises:
            CacheError: As ``Session.bind`` and ``Session.begin``; also eagerly under ``strict``.
        """
        if torch.compiler.is_compiling():
            past = self.length
            if layer_idx > self.last_layer:
                # A larger model: traced as it is and refused by the graph, since an error raised
                # here would make Dynamo give up on this code for every model.
                past = past - key_states.shape[2]
            full = torch.ops.headinfer.update_kv(
                self.handle, key_states, value_states, layer_idx, past
            )
        else:
            full = self._update_eagerly(key_states, value_states, layer_idx)
        if layer_idx == self.last_layer:
            self.length = self.length + key_states.shape[2]
        return full[0], full[1]

    def _update_eagerly(
        self, k: torch.Tensor, v: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= layer <= self.last_layer:
            raise CacheError(
                f"layer {layer} updates a cache whose last layer is {self.last_layer}: it was made "
                "for another model's config; use HeadInferCache(model.config)"
            )
        self.session.check_layers([layer])
        if not self._warned:
            message = why_eager(sys._getframe(2))
            if self.strict:
                raise CacheError(f"{message} (this cache was made with strict=True)")
            log.warning("%s", message)
            self._warned = True
        session = self.session
        if session.managed:
            # No compiled call is running: one was cut short on its way out.
            session.cancel_call()
            session.leave_call()
        full = update_without_schedule(session, layer, k, v, self.length)
        session.counters.eager_updates += 1
        return full

    # -- life cycle ---------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Check that ``tokens`` tokens can be held, before any of them is computed.

        Raises:
            OptionError: ``tokens`` is no count.
            DoesNotFitError: They cannot; the message says what would.
        """
        check_count(tokens, "reserve: tokens", low=0)
        if self.session.closed:
            raise ClosedError("this HeadInferCache was closed and holds nothing: make a new one")
        self.session.check_room(tokens, self._token_bytes)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens.

        Args:
            tokens_to_remove: Zero or a negative count, as ``generate`` passes it.

        Raises:
            CacheError: The count is positive, or more than the cache holds, or layers with a window
                have given up tokens that they would see again.
        """
        # transformers before 5.23 counts with a tensor.
        counts = isinstance(tokens_to_remove, (int, torch.Tensor))
        count = -int(tokens_to_remove) if counts else -1
        if not 0 <= count <= self.length:
            raise CacheError(
                f"crop({tokens_to_remove!r}) on {self.length} tokens: pass minus the number "
                "of tokens to drop, at most as many as are held"
            )
        length = self.length - count
        check_crop(self.session, length)
        self.linear.crop(count)
        # The session may be ahead: a call that is cut short can end before it is counted here.
        self.session.crop(self.session.length - length)
        self.length = length

    def reset(self) -> None:
        """Drop all tokens and start the counters anew; buffers are kept for the next prompt."""
        self.session.reset()
        self.length = 0
        self.linear.reset()

    def close(self) -> None:
        """Wait for the copies in flight and give all memory back; the cache is of no use after."""
        self.session.close()
        self.length = 0

    def __enter__(self) -> HeadInferCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None and hasattr(handle, "session"):
            handle.session.close()

    def use_schedule(self, schedule: Schedule) -> None:
        """Run ``schedule`` (see ``load_schedule``) wherever its plan key comes up.

        Raises:
            CacheError: It is no ``Schedule``.
        """
        if not isinstance(schedule, Schedule):
            raise CacheError(
                f"use_schedule({schedule!r}): expected what load_schedule(path) returns"
            )
        self.session.schedule_overrides[schedule.key] = schedule

    def _refuse_copy(self, *_: object) -> NoReturn:
        raise CacheError(
            "a HeadInferCache cannot be copied or pickled: its pages are pinned memory in use by "
            "streams. To return to a common prefix, crop(-n) back to it; else make a new cache"
        )

    __deepcopy__ = _refuse_copy
    __copy__ = _refuse_copy
    __reduce_ex__ = _refuse_copy

    def stats(self) -> CacheStats:
        """Where the bytes are and what has moved since the cache was made or reset."""
        return collect_stats(self.session)


# Before the first call is traced, as the backend's settings.
restore_block_masks = register_block_masks()
