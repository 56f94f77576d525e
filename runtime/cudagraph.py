"""Capture of a whole decode step as one CUDA graph, replayed while its buffers stay the same.

Inductor's own graph trees are not used: pieces of a graph lose what says which inputs are static,
so all weights would be copied at each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class CapturedStep:
    """One captured forward pass; parameters are read in place, other tensors are copied in."""

    def __init__(
        self, call: Callable[..., Sequence[Any]], args: Sequence[Any], unread: int | None
    ) -> None:
        """Capture ``call(*args)`` on the current device.

        Args:
            call: Queues kernels on the current stream only and never waits for them.
            args: Its arguments; tensors on the GPU that are no parameters are cloned.
            unread: Index of an argument that no kernel of ``call`` reads, if there is one.
        """
        self._copied = [
            index
            for index, value in enumerate(args)
            if index != unread
            and isinstance(value, torch.Tensor)
            and value.is_cuda
            and not isinstance(value, torch.nn.Parameter)
        ]
        self._parameters = _addresses(args)
        self._static = list(args)
        for index in self._copied:
            self._static[index] = args[index].clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = call(*self._static)

    def matches(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` has the parameters and shapes of the capture."""
        return self._parameters == _addresses(args) and all(
            args[index].shape == self._static[index].shape for index in self._copied
        )

    def replay(self, args: Sequence[Any]) -> list[Any]:
        """Run the graph on ``args``; tensor outputs are fresh, others are those of the capture."""
        for index in self._copied:
            self._static[index].copy_(args[index], non_blocking=True)
        self._graph.replay()
        return [
            value.clone() if isinstance(value, torch.Tensor) else value for value in self._outputs
        ]


def _addresses(args: Sequence[Any]) -> list[int]:
    return [value.data_ptr() for value in args if isinstance(value, torch.nn.Parameter)]
