"""What models and ``generate`` ask of a cache beside ``update``: lengths, kinds of layers, rows."""

from __future__ import annotations

import inspect

import torch
from transformers import Cache

from headinfer_compile.errors import CacheError
from headinfer_compile.linear_states import LinearStates
from headinfer_compile.runtime.batch import select_rows
from headinfer_compile.runtime.ops import session_of
from headinfer_compile.runtime.session import Session

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The argument of models for their cache: since transformers 5.24, and before."""


def cache_argument(model: torch.nn.Module) -> str:
    """The one of ``CACHE_ARGUMENTS`` that ``model`` takes."""
    newer, older = CACHE_ARGUMENTS
    return newer if newer in inspect.signature(model.forward).parameters else older


class CacheProtocol(Cache):
    """The part of ``HeadInferCache`` that answers ``transformers``."""

    handle: torch.Tensor
    num_layers: int
    length: int
    linear: LinearStates

    @property
    def session(self) -> Session:
        """The store behind this cache."""
        return session_of(self.handle)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that the next mask covers."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the length is bounded by memory only."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the length is bounded by memory only."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False, or ``generate`` would build masks of chunk x context outside the graph."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether K and V have come."""
        return self.session.geometry is not None

    @property
    def is_croppable(self) -> bool:
        """Whether cached tokens can be dropped again: not from the states of linear layers."""
        return self.linear.can_roll_back

    @property
    def is_sliding(self) -> list[bool]:
        """All False: every token is kept, windows are read from whole pages."""
        return [False] * self.num_layers

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep a state of linear attention and no KV."""
        held = [*self.layers, *[None] * self.num_layers][: self.num_layers]
        return [layer is not None and not hasattr(layer, "keys") for layer in held]

    @property
    def is_dummy(self) -> list[bool]:
        """All False."""
        return [False] * self.num_layers

    @property
    def batch_size(self) -> int:
        """Batch size of what is held, 1 before."""
        self.session.sharing.settle(self.session)
        geometry = self.session.geometry
        return geometry.batch if geometry is not None else 1

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"HeadInferCache(tokens={self.length}, layers={self.num_layers})"

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let batch row ``b`` go on from what row ``beam_idx[b]`` holds; no page is rewritten.

        Args:
            beam_idx: Integers ``[B]``.

        Raises:
            CacheError: There is no such row.
        """
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row; the repetitions share what is stored.

        Raises:
            CacheError: ``repeats`` is less than 1.
        """
        if repeats < 1:
            raise CacheError(f"batch_repeat_interleave({repeats}): expected a count of at least 1")
        self._select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some batch rows.

        Args:
            indices: Integers, or a mask of bools over the rows.

        Raises:
            CacheError: There is no such row, or none is left.
        """
        kept = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select_rows(kept.tolist())

    def _select_rows(self, rows: list[int]) -> None:
        batch = self.batch_size
        if self.session.geometry is None:
            return
        if not rows or not all(-batch <= row < batch for row in rows):
            raise CacheError(
                f"rows {rows} were asked for, and the cache holds rows 0 to {batch - 1}: nothing "
                "was changed"
            )
        select_rows(self.session, tuple(row % batch for row in rows))
        self.linear.reorder(torch.tensor([row % batch for row in rows]))

    def activate_past_recording(self) -> None:
        """Keep what ``crop`` needs: of KV every token is kept anyway."""
        self.linear.record_past()
