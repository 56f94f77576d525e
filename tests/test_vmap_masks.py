"""Masks that are made under ``torch.vmap``, such as those of ``or_mask_function``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from harness import CompiledModel, assert_same, clean_dynamo, generate, tiny_llama
from headinfer_compile.passes import drop_vmap
from headinfer_compile.passes.graph_utils import in_vmap_machinery
from headinfer_compile.runtime.masks import MaskForm
from mask_harness import blocks_of, capture_masks

Build = Callable[[int, int, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_dynamo():
        yield


def mapped(function: Callable[..., Tensor]) -> Build:
    """``function(b, q, kv, padding, table)`` of absolute positions under three vmaps."""

    def build(past: int, new: int, padding: Tensor, table: Tensor) -> Tensor:
        each = function
        for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
            each = torch.vmap(each, in_dims=(*dims, None, None))
        rows = torch.arange(padding.shape[0])
        made: Tensor = each(
            rows, torch.arange(new) + past, torch.arange(past + new), padding, table
        )
        return made[:, None]

    return build


def by_columns(past: int, new: int, padding: Tensor, table: Tensor) -> Tensor:
    """A vmap over the second dimension of a grid, put back last."""
    ahead = torch.arange(past + new) - (torch.arange(new) + past)[:, None]
    near = torch.vmap(lambda column: (column <= 0) & (column > -4), in_dims=-1, out_dims=1)
    mask: Tensor = near(ahead)
    return mask


def causal_and_padding(b: Tensor, q: Tensor, kv: Tensor, padding: Tensor, _: Tensor) -> Tensor:
    return (kv <= q) & padding[b, kv]


def with_prefix(b: Tensor, q: Tensor, kv: Tensor, _: Tensor, table: Tensor) -> Tensor:
    return (kv <= q) | (kv < 4) | (table[kv] & (kv < 9))


def cumulative(b: Tensor, q: Tensor, kv: Tensor, padding: Tensor, _: Tensor) -> Tensor:
    return (kv <= q) & (padding[b].cumsum(0)[kv] > 1)


@pytest.mark.parametrize(
    ("build", "form"),
    [
        (by_columns, MaskForm(causal=True, window=4)),
        (mapped(causal_and_padding), MaskForm(causal=True, padding=0)),
        (mapped(with_prefix), None),
    ],
    ids=["columns", "padding", "prefix"],
)
def test_a_mask_under_vmap_is_read(build: Build, form: MaskForm | None, seed: int) -> None:
    past, new = 9, 6
    tensors = (torch.rand(2, past + new) < 0.7, torch.rand(past + new) < 0.5)
    graph = capture_masks([build], tensors, past=past, new=new)
    (found,) = graph.recover()
    assert not graph.ctx.declines
    assert form is None or found == form
    # What is read are the caller's tensors; what made the mask is dead, and goes.
    (site,) = graph.sites
    assert {node.op for node in site.args[5]} <= {"placeholder"}
    inputs = [tensors[2 - node.meta["example_value"].dim()] for node in site.args[5]]
    drop_vmap.run(graph.gm, graph.ctx)
    assert not any(in_vmap_machinery(node) for node in graph.gm.graph.nodes)
    truth = build(past, new, *tensors)
    for q, k, block in blocks_of(found, inputs, past, new, random.Random(seed)):
        got, want = torch.broadcast_tensors(block, truth[..., q[0] : q[1], k[0] : k[1]])
        assert torch.equal(got, want), found.formula


def test_what_no_element_tells_is_made_in_full() -> None:
    tensors = (torch.rand(2, 15) < 0.7, torch.rand(15) < 0.5)
    graph = capture_masks([mapped(cumulative)], tensors, past=9, new=6)
    graph.recover()
    assert "is not index arithmetic" in graph.ctx.declines[0].reason
    drop_vmap.run(graph.gm, graph.ctx)
    assert sum(in_vmap_machinery(node) for node in graph.gm.graph.nodes) >= 6


@pytest.mark.slow
def test_a_model_with_or_mask_function(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(*args: Any, **kwargs: Any) -> Any:
        kwargs["or_mask_function"] = lambda b, h, q, kv: kv < 9
        return create_causal_mask(*args, **kwargs)

    monkeypatch.setattr(llama, "create_causal_mask", masks)
    compiled = CompiledModel(tiny_llama(seed))
    ids, oracle = compiled.prompt(seed, 53, 8, prefill_chunk_size=24)
    cache = compiled.cache()
    assert_same(generate(compiled.model, ids, cache, 8, prefill_chunk_size=24), oracle)
    compiled.assert_streamed(cache)
    for graph in compiled.graphs:
        assert not graph.report.declines
        for module in graph.graph_module.modules():
            nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
            assert not any(in_vmap_machinery(node) for node in nodes)
