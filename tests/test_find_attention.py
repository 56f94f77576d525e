"""find_attention on small graphs: what becomes a site, with which numbers, and what is declined."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as sdpa

import headinfer_compile.runtime.ops  # noqa: F401  (registers torch.ops.headinfer)
from headinfer_compile import HeadInferConfig
from headinfer_compile.errors import DeclinedError
from headinfer_compile.passes import find_attention
from headinfer_compile.passes.context import META, AttentionSite, PassContext

BATCH, HEADS, KV_HEADS, DIM, NEW = 2, 6, 3, 8, 5
ATTENTION = torch.ops.headinfer.attention.default
UPDATE = torch.ops.headinfer.update_kv.default
FLASH_SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)

Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def flash() -> Iterator[Any]:
    """``torch.ops.flash_attn._flash_attn_forward``: the package's, or its schema with plain maths."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield pytest.importorskip("flash_attn") and torch.ops.flash_attn._flash_attn_forward
        return
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(FLASH_SCHEMA)

    def forward(q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool, *_: Any) -> Any:
        ratio = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(ratio, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        if causal:
            n, total = scores.shape[-2:]
            keep = torch.arange(total) <= torch.arange(n)[:, None] + total - n
            scores = scores.masked_fill(~keep, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return out, scores.logsumexp(-1), q.new_empty(0), q.new_empty(2, dtype=torch.int64)

    def fake(q: Tensor, *_: Any) -> Any:
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)

    library.impl("_flash_attn_forward", forward, "CompositeExplicitAutograd")
    torch.library.register_fake("flash_attn::_flash_attn_forward", fake, lib=library)
    yield torch.ops.flash_attn._flash_attn_forward
    library._destroy()


def capture(program: Program, *inputs: Any) -> GraphModule:
    """The graph that Dynamo hands a backend."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        assert detect_fake_mode() is not None
        graphs.append(gm)
        return gm.forward

    handle = torch.zeros((), dtype=torch.int64)
    # The operator needs a session to run; only the graph is wanted.
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        pass
    torch.compile(program, backend=_stop(graphs), fullgraph=True)
    compiled = torch.compile(program, backend=_stop(graphs), fullgraph=True)
    with pytest.raises(_Captured):
        compiled(handle, *inputs)
    return graphs[0]
