"""Which launches share a compiled variant; ``test_gpu.py`` launches the kernels themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headinfer_compile.runtime.triton_launch import Launcher


class Kernel:
    """Stands for a ``triton.jit`` function: counts what is compiled and what is launched."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if len(grid) == 3:  # a compiled variant
            return lambda *args: self.launched.append((grid, args))

        def first(*args: Any, **options: int) -> Kernel:
            self.compiled.append((grid, args, options))
            return self

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_a_variant_is_searched_for_once(kernel: Kernel) -> None:
    launch, x = Launcher(kernel), torch.zeros(64)
    for number in (3, 16, 1):
        launch((2, number), (x,), (number, 0.5), (8, True), num_warps=2)
    ((grid, args, options),) = kernel.compiled
    assert (grid, args[1:], options) == ((2, 3), (3, 0.5, 8, True), {"num_warps": 2})
    assert [(grid, args[1:]) for grid, args in kernel.launched] == [
        ((2, 16, 1), (16, 0.5, 8, True)),
        ((2, 1, 1), (1, 0.5, 8, True)),
    ]


@pytest.mark.parametrize(
    ("tensor", "numbers", "constants"),
    [
        (torch.zeros(64)[1:], (32, 7), (8,)),
        (torch.zeros(64, dtype=torch.bfloat16), (32, 7), (8,)),
        (torch.zeros(64), (33, 7), (8,)),
        (torch.zeros(64), (1, 7), (8,)),
        (torch.zeros(64), (32, 7), (16,)),
    ],
    ids=["unaligned", "type", "no multiple of 16", "one", "constant"],
)
def test_what_triton_compiles_for_makes_a_variant(
    kernel: Kernel, tensor: torch.Tensor, numbers: tuple[int, int], constants: tuple[int]
) -> None:
    launch = Launcher(kernel, specialized=slice(0, 1))
    launch((1, 1), (torch.zeros(64),), (32, 7), (8,))
    launch((1, 1), (tensor,), numbers, constants)
    assert len(kernel.compiled) == 2
    launch((1, 1), (torch.zeros(64),), (64, 8), (8,))
    assert len(kernel.launched) == 1


def test_devices_have_variants_of_their_own(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, x = Launcher(kernel), torch.zeros(64)
    launch((1, 1), (x,), (), ())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch((1, 1), (x,), (), ())
    assert len(kernel.compiled) == 2
