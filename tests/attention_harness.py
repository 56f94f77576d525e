"""Small programs with one attention: what find_attention makes of them, and the resident oracle.

Legend: B batch, Hq query heads, Hkv KV heads, n new tokens, S all tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer_compile import HeadInferCache, HeadInferConfig, headinfer
from headinfer_compile.errors import DeclinedError
from headinfer_compile.passes import find_attention
from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import calls

HEADS, KV_HEADS, DIM = 6, 3, 8

Program = Callable[[Any, Tensor, Tensor, Tensor], Any]


class ResidentCache:
    """All K and V of one layer, concatenated."""

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, n, D]`` in, ``[B, Hkv, S, D]`` out."""
        self.kv.append((k, v))
        keys, values = zip(*self.kv, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


def offloaded() -> HeadInferCache:
    """A cache of one layer whose tokens go to host pages of 8."""
    return HeadInferCache.from_shape(
        num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32,
        gpu_budget=0, page_tokens=8, tail_tokens=4,
    )  # fmt: skip


def repeat_kv(x: Tensor) -> Tensor:
    """``[B, Hkv, S, D]`` to ``[B, Hq, S, D]`` as models without grouped attention write it."""
    batch, heads, tokens, dim = x.shape
    ratio = HEADS // heads
    expanded = x[:, :, None, :, :].expand(batch, heads, ratio, tokens, dim)
    return expanded.reshape(batch, heads * ratio, tokens, dim)


def causal_mask(q: Tensor, keys: Tensor) -> Tensor | None:
    """``[n, S]`` by index arithmetic; None for one query, which sees everything."""
    new, total = q.shape[2], keys.shape[2]
    if new == 1:
        return None
    return torch.arange(total) <= torch.arange(new)[:, None] + (total - new)


def inputs(seed: int, new: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[B, Hq, n, D]`` and k, v ``[B, Hkv, n, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, new, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def called(gm: GraphModule, op: torch._ops.OpOverload) -> list[Node]:
    """The nodes that call ``op``."""
    return [node for node in gm.graph.nodes if calls(node, op)]


def found(
    program: Program, strict: bool = False, make: Callable[[], tuple[Any, Any]] | None = None
) -> tuple[GraphModule, PassContext]:
    """The graph of a first call after the pass; ``make`` gives another cache and q, k, v."""
    results: list[tuple[GraphModule, PassContext]] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        ctx = PassContext(
            HeadInferConfig(strict=strict), example_inputs, pass_name="find_attention"
        )
        results.append((find_attention.run(gm, ctx), ctx))
        gm.graph.lint()
        raise DeclinedError("captured")

    cache, qkv = make() if make is not None else (offloaded(), inputs(0, 7))
    with pytest.raises(BackendCompilerFailed):
        torch.compile(program, backend=backend, fullgraph=True)(cache, *qkv)
    return results[0]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator made, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 4)
        return result


def assert_exact(program: Program, seed: int, rewritten: bool = True) -> HeadInferCache:
    """Compare the compiled program with itself over ``ResidentCache``, chunk after chunk."""
    compiled = torch.compile(program, backend=headinfer, options={"lowering": "eager"})
    cache, resident = offloaded(), ResidentCache()
    for step, new in enumerate((20, 9, 1, 1, 1, 1, 70)):
        qkv = inputs(seed + step, new)
        torch.testing.assert_close(
            compiled(cache, *qkv), program(resident, *qkv), rtol=1e-5, atol=1e-5
        )
    stats = cache.stats()
    assert stats.eager_updates == 0
    assert stats.sites_rewritten == int(rewritten)
    assert stats.materialised_layers == int(not rewritten)
    return cache
