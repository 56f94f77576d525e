"""The states of linear-attention layers, held beside the offloaded KV as transformers holds them.

A hybrid model's linear layers keep states of a fixed size. They stay on the device in transformers'
own layer objects. What is added: a call that fails leaves the states of the call before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from headinfer_compile.errors import CacheError


def linear_layers(config: PretrainedConfig, kinds: Sequence[str]) -> list[Any]:
    """transformers' layer objects of the linear layers, None elsewhere; empty if there are none.

    Args:
        config: Of the decoder.
        kinds: Its layer types.
    """
    if not any(kind in ("linear_attention", "mamba", "conv", "hybrid") for kind in kinds):
        return []
    layers = [
        layer if hasattr(layer, "update_conv_state") else None
        for layer in DynamicCache(config=config).layers
    ]
    return layers if any(layer is not None for layer in layers) else []


class LinearStates:
    """Keeps the states of ``layers`` in step with the length of the cache."""

    def __init__(self, layers: Sequence[Any], length: Callable[[], int]) -> None:
        """Watch ``layers``; ``length`` gives the tokens that the cache has counted."""
        self._layers = [layer for layer in layers if layer is not None]
        self._length = length
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._saved_at = -1

    def _tensors(self) -> list[torch.Tensor]:
        return [
            state
            for layer in self._layers
            for states in (layer.conv_states, layer.recurrent_states)
            for state in (states.values() if isinstance(states, dict) else [states])
            if state is not None
        ]

    @contextmanager
    def around_call(self) -> Iterator[None]:
        """Save the states before a call; first undo a call that did not come to its end."""
        length = self._length()
        with torch.no_grad():
            if self._saved_at == length:
                for state, saved in self._saved:
                    state.copy_(saved)
            self._saved = [(state, state.clone()) for state in self._tensors()]
        self._saved_at = length
        yield

    @property
    def can_roll_back(self) -> bool:
        """Whether tokens can be dropped again."""
        return all(layer.is_croppable for layer in self._layers)

    def crop(self, count: int) -> None:
        """Drop the newest ``count`` tokens, and what was recorded to drop more than these.

        Raises:
            CacheError: States cannot go back so far; nothing is dropped.
        """
        if count == 0:
            self._forget_past()
            return
        if not self._layers:
            return
        if not self.can_roll_back or not all(layer.record_past for layer in self._layers):
            raise CacheError(
                f"crop(-{count}) on a model with linear-attention layers: their states hold every "
                "token that was seen and cannot go back. Use reset() and feed the prompt again, or "
                "a mode of generate without rollback (no assistant, no prompt lookup)"
            )
        recorded = min(self._recorded(layer) for layer in self._layers)
        if count > recorded:
            raise CacheError(
                f"crop(-{count}) on a model with convolutions: their states have recorded the "
                f"newest {recorded} tokens, and what was before cannot come back. Use reset() and "
                "feed the prompt again"
            )
        for layer in self._layers:
            layer.crop(-count)
        self._forget()

    def _recorded(self, layer: Any) -> int:
        """Tokens by which the convolutions of ``layer`` can go back: to nothing, or to a kernel."""
        length = self._length()
        widths = {at: state.shape[-1] for at, state in layer.conv_states.items()}
        return min(
            length if width >= length else width - layer.conv_kernel_size[at]
            for at, width in widths.items()
        )

    def _forget_past(self) -> None:
        """Let go of recorded inputs, a whole prompt's at first, that no later call reads.

        A call to undo is undone still: what is left are views of the tensors that are restored.
        """
        for layer in self._layers:
            if layer.record_past and all(layer.is_conv_states_initialized.values()):
                layer.crop(0)

    def reset(self) -> None:
        """Start from nothing."""
        for layer in self._layers:
            layer.reset()
        self._forget()

    def reorder(self, rows: torch.Tensor) -> None:
        """Take batch rows ``rows`` (int64) of every state."""
        for layer in self._layers:
            layer.reorder_cache(rows)
        self._forget()

    def record_past(self) -> None:
        """Keep what a ``crop`` needs, where that is possible."""
        for layer in self._layers:
            layer.activate_past_recording()

    def _forget(self) -> None:
        self._saved, self._saved_at = [], -1
