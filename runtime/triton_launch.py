"""Launch a Triton kernel without Triton's search among its compiled variants.

``kernel[grid](...)`` inspects every argument to find the variant compiled for it, about 35 us of
host time for ten arguments. A decode step launches the same few variants three times a layer, so
they are kept here under a short key and launched directly, as Triton's own tutorials do with
``kernel.warmup``.
"""

# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Launcher:
    """One kernel.

    Args:
        function: A ``triton.jit`` function. Parameters in order: tensors, then numbers, then
            constants.
        specialized: Which of the numbers Triton compiles for; ``do_not_specialize`` has the others.
    """

    def __init__(self, function: Any, specialized: slice = slice(0)) -> None:
        self._function, self._specialized = function, specialized
        self._variants: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int], tensors: tuple[Tensor, ...], numbers: tuple[int | float, ...],
        constants: tuple[int | bool, ...], **options: int,
    ) -> None:  # fmt: skip
        """Launch on the current stream of the current device.

        Args:
            grid: Programs along x and y.
            tensors: On the current device.
            numbers: Integers below 2**31, and floats; each place always of the same type.
            constants: Values of the ``constexpr`` parameters.
            options: Of the compiler, the same in every call.
        """
        # What Triton compiles for, of which a device has code of its own.
        key = (
            torch.cuda.current_device(), constants,
            *[(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors],
            *[(number % 16 == 0, number == 1) for number in numbers[self._specialized]],
        )  # fmt: skip
        variant = self._variants.get(key)
        if variant is None:
            self._variants[key] = self._function[grid](*tensors, *numbers, *constants, **options)
        else:
            variant[(*grid, 1)](*tensors, *numbers, *constants)
