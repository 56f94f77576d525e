"""Tiny models whose graphs hold attention sites, and reference operators to run them with.

The passes cut at ``headinfer.*``; the real operators need a session behind the handle. Here the
cuts are rebound to ``region_test.*``, which keep K and V in a plain cache object, as a later pass
rebinds them to schedules.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes import partition
from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import calls
from headinfer_compile.passes.lower import RegionReport, lower_regions

UPDATE_KV = "update_kv(Tensor handle, Tensor k, Tensor v, int layer, SymInt past_len)"
ATTENTION = (
    "attention(Tensor handle, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] mask_inputs, "
    "int layer, SymInt past_len, float scale, bool is_causal)"
)
DYNAMIC_SOURCES = ",".join(
    f"L{prefix}[{name!r}]{suffix}"
    for name, suffix in (
        ("input_ids", ""),
        ("position_ids", ""),
        ("attention_mask", ""),
        ("past_key_values", ".length"),
        ("cache", ".length"),
    )
    for prefix in ("", "['kwargs']")
)

#: K and V by handle and layer; a cache may be gone while its captured graph still runs.
_stored: list[dict[int, tuple[Tensor, Tensor]]] = []


class PlainCache(Cache):
    """Exact K and V, reached through a handle; ``length`` moves once per forward."""

    is_compileable = False

    def __init__(self, config: Any) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.num_layers = config.num_hidden_layers
        self.length = 0
        self.handle = torch.tensor(len(_stored))
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        _stored.append(self.kv)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k, v = torch.ops.headinfer.update_kv(
            self.handle, key_states, value_states, layer_idx, self.length
        )
        if layer_idx == self.num_layers - 1:
            self.length = self.length + key_states.shape[2]
        return k, v


def _update_kv(handle: Tensor, k: Tensor, v: Tensor, layer: int, past_len: int) -> Any:
    kv = _stored[int(handle)]
    if past_len:
        old_k, old_v = kv[layer]
        k = torch.cat([old_k[:, :, :past_len], k], 2)
        v = torch.cat([old_v[:, :, :past_len], v], 2)
    kv[layer] = (k.clone(), v.clone())
    dense = torch.contiguous_format
    return k.clone(memory_format=dense), v.clone(memory_format=dense)


def _attention(
    handle: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_inputs: Sequence[Tensor],
    layer: int,
    past_len: int,
    scale: float,
    is_causal: bool,
) -> Tensor:
    k, v = _update_kv(handle, k, v, layer, past_len)
    seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + past_len
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.to(q.dtype).contiguous()


def _update_kv_fake(handle: Tensor, k: Tensor, v: Tensor, layer: int, past_len: int) -> Any:
    rows = past_len + k.shape[2]
    return tuple(x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in (k, v))


def _attention_fake(handle: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _define(namespace: str) -> Any:
    make: Any = torch.library.Library
    library = make(namespace, "DEF")
    library.define(f"{UPDATE_KV} -> (Tensor, Tensor)")
    library.define(f"{ATTENTION} -> Tensor")
    for name, impl, fake in (
        ("update_kv", _update_kv, _update_kv_fake),
        ("attention", _attention, _attention_fake),
    ):
        library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


LIBRARIES: list[Any] = [_define("region_test")]
if importlib.util.find_spec("headinfer_compile.runtime.ops"):
    importlib.import_module("headinfer_compile.runtime.ops")
else:
    LIBRARIES.append(_define("headinfer"))


def fuse_attention(gm: GraphModule) -> None:
    """Replace each cache update and its SDPA by one causal ``headinfer.attention``."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for update in list(gm.graph.nodes):
        if not calls(update, torch.ops.headinfer.update_kv.default):
            continue
        node = next(iter(update.users))
        while node.target is not sdpa:
            node = next(iter(node.users))
        handle, k, v, layer, past_len = update.args
        scale = node.kwargs["scale"]
        q, op = node.args[0], torch.ops.headinfer.attention.default
        with gm.graph.inserting_before(node):
            site = gm.graph.call_function(
                op, (handle, q, k, v, None, [], layer, past_len, scale, True)
            )
        site.meta = {**node.meta, "headinfer": f"site of layer {layer}"}
        node.replace_all_uses_with(site)
    # The site makes the update, so its effect is no reason to keep it.
    gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    gm.recompile()


def bind_reference(split: GraphModule) -> None:
    """Point the cuts of ``split`` at the reference operators."""
    for node in split.graph.nodes:
        for name in ("update_kv", "attention"):
            if calls(node, getattr(torch.ops.headinfer, name).default):
                node.target = getattr(torch.ops.region_test, name).default
    split.recompile()


@dataclass
class Backend:
    """A Dynamo backend: fuse (optional), partition, lower; keeps what it made."""

    lowering: Literal["eager", "inductor"] = "eager"
    fuse: bool = True
    captured: list[GraphModule] = field(default_factory=list)
    splits: list[GraphModule] = field(default_factory=list)
    inputs: list[Sequence[Any]] = field(default_factory=list)
    reports: list[RegionReport] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.fuse:
            fuse_attention(gm)
        split = split_graph(gm, example_inputs)
        self.captured.append(gm)
        self.printed.append(split.code)
        bind_reference(split)
        report = lower_regions(split, example_inputs, lowering=self.lowering, inductor={})
        self.splits.append(split)
        self.inputs.append(example_inputs)
        self.reports.append(report)
        return split.forward


def tiny_llama(num_layers: int, seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = LlamaConfig(
        **{**shape, "num_key_value_heads": 2, "head_dim": 8, **overrides},
        num_hidden_layers=num_layers,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def dynamic_lengths() -> Iterator[None]:
    """Dynamo as the backend sets it up: lengths are symbols from the first call on."""
    torch._dynamo.reset()
    settings: Any = torch.compiler.config
    with settings.patch(dynamic_sources=DYNAMIC_SOURCES):
        yield
    torch._dynamo.reset()


def attend(cache: PlainCache, x: Tensor, layer: int) -> Tensor:
    """One-head attention of ``x`` ``[n, D]`` to itself."""
    q = x[None, None]
    op = torch.ops.headinfer.attention.default
    out: Tensor = op(cache.handle, q, q, q, None, [], layer, 0, 1.0, True)
    return out[0, 0]


def plain_cache(num_layers: int) -> PlainCache:
    return PlainCache(LlamaConfig(num_hidden_layers=num_layers))


def capture(fn: Callable[..., Any], *args: Any) -> tuple[GraphModule, list[Any]]:
    """Return the graph that Dynamo makes of ``fn(*args)``, and its inputs."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((gm, list(example_inputs)))
        return runnable(gm).forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (pair,) = found
    return pair


def runnable(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` whose cuts are the reference operators."""
    bound = copy.deepcopy(gm)
    bind_reference(bound)
    return bound


def split_graph(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """``gm`` partitioned, checked by FX."""
    split = partition.run(gm, PassContext(HeadInferConfig(), inputs))
    split.graph.lint()
    return split
