"""Partition: what goes into regions, what stays between them, and that nothing changes."""

from __future__ import annotations

import operator
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from headinfer_compile.passes.graph_utils import calls, count_ops, readable
from region_harness import (
    Backend,
    PlainCache,
    attend,
    capture,
    dynamic_lengths,
    plain_cache,
    runnable,
    split_graph,
    tiny_llama,
)

ATTENTION = torch.ops.headinfer.attention.default
UPDATE_KV = torch.ops.headinfer.update_kv.default


def captured_llama(num_layers: int, *, fuse: bool) -> Backend:
    model = tiny_llama(num_layers)
    backend = Backend("eager", fuse)
    with dynamic_lengths(), torch.no_grad():
        model.compile(backend=backend)
        model(input_ids=torch.randint(0, 97, (1, 7)), past_key_values=PlainCache(model.config))
    return backend


def steps(split: GraphModule) -> list[str]:
    """The calls of the outer graph, in order, without the nodes that unpack them."""
    return [
        str(node.target)
        for node in split.graph.nodes
        if node.op in ("call_module", "call_function") and node.target is not operator.getitem
    ]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_sites_stay_calls_of_the_outer_graph(num_layers: int) -> None:
    backend = captured_llama(num_layers, fuse=True)
    split = split_graph(backend.captured[0], backend.inputs[0])
    expected = ["region_0"]
    for layer in range(num_layers):
        expected += ["headinfer.attention.default", f"region_{layer + 1}"]
    assert [step for step in steps(split) if step != "<built-in function add>"] == expected

    sites = [node for node in split.graph.nodes if calls(node, ATTENTION)]
    assert [site.args[6] for site in sites] == list(range(num_layers))
    assert [site.meta["headinfer"] for site in sites] == [
        f"site of layer {layer}" for layer in range(num_layers)
    ]
    assert all("modeling_llama.py" in site.stack_trace for site in sites)


def test_outer_graph_reads_as_the_model_does() -> None:
    backend = captured_llama(2, fuse=True)
    split = split_graph(backend.captured[0], backend.inputs[0])
    before = [node.name for node in backend.captured[0].graph.nodes if node.op == "placeholder"]
    assert [node.name for node in split.graph.nodes if node.op == "placeholder"] == before
    assert "q_embed_1 = region_1[" in split.code
    assert " = L_" not in split.code
    assert re.search(r'q_embed_1: "f32\[1, 4, s\d+, 8\]\[.*\]cpu" = ', readable(split))
    assert count_ops(split)["self.region_1"] == 1
    for name, region in split.named_children():
        assert not list(region.parameters()) and not list(region.buffers()), name


def test_update_kv_is_a_piece_of_its_own() -> None:
    backend = captured_llama(2, fuse=False)
    split = split_graph(backend.captured[0], backend.inputs[0])
    updates = [node for node in split.graph.nodes if node.name.startswith("update_kv")]
    assert len(updates) == 2 and all(calls(node, UPDATE_KV) for node in updates)
    for update in updates:
        assert [user.target for user in update.users] == [operator.getitem, operator.getitem]
    for name in ("region_1", "region_2"):
        region = split.get_submodule(name)
        assert isinstance(region, GraphModule)
        assert any("scaled_dot_product" in op for op in count_ops(region)), name


def random_program(seed: int) -> Any:
    """A function of random pointwise operations, in-place ones among them, and attentions."""
    rng = random.Random(seed)
    plan = [(rng.choice("amrcia"), rng.random(), rng.random()) for _ in range(25)]

    def program(cache: PlainCache, *args: Tensor) -> tuple[Tensor, ...]:
        values, layer = [arg.clone() for arg in args], 0
        for kind, one, two in plan:
            a, b = (values[int(share * len(values))] for share in (one, two))
            if kind == "a":
                values.append(a + b)
            elif kind == "m":
                values.append(a * 0.5 - b)
            elif kind == "r":
                values.append(torch.relu(a).t().contiguous().t())
            elif kind == "i":
                a.mul_(0.75)
            else:
                values.append(attend(cache, a, layer))
                layer += 1
        return tuple(values[-4:])

    return program


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_compute_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    args = [torch.randn(4, 4) for _ in range(3)]
    gm, inputs = capture(random_program(seed), plain_cache(25), *args)
    expected = runnable(gm)(*inputs)
    split = split_graph(gm, inputs)
    for i, (out, ref) in enumerate(zip(runnable(split)(*inputs), expected, strict=True)):
        assert torch.equal(out, ref), f"{seed=} output {i}\n{split.code}"


def test_every_size_symbol_of_a_live_in_is_an_input() -> None:
    def program(cache: PlainCache, x: Tensor, past: Tensor) -> Tensor:
        kv = x[None, None]
        rows = past.shape[0]
        k, v = torch.ops.headinfer.update_kv.default(cache.handle, kv, kv, 0, rows)
        out: Tensor = k.sin() + v.view(1, 1, rows + x.shape[0], 4)
        return out

    cache, x, past = plain_cache(1), torch.randn(5, 4), torch.randn(3)
    cache.kv[0] = (torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(past, 0)
    gm, inputs = capture(program, cache, x, past)
    split = split_graph(gm, inputs)
    call = next(node for node in split.graph.nodes if node.target == "region_1")
    sizes = [node for node in call.args if isinstance(node.meta.get("example_value"), torch.SymInt)]
    symbols = {str(node.meta["example_value"]) for node in sizes}
    rows = next(node for node in call.args if node not in sizes).meta["example_value"].shape[2]
    assert {str(s) for s in rows.node.expr.free_symbols} <= symbols, split.code
    assert len(rows.node.expr.free_symbols) == 2


def test_autocast_is_reentered_in_each_region_and_left() -> None:
    def program(cache: PlainCache, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a = x @ w
            b = attend(cache, a, 0) @ w
            c = attend(cache, b, 1) @ w
        return a, b, c, attend(cache, x, 2) @ w

    gm, inputs = capture(program, plain_cache(3), torch.randn(4, 4), torch.randn(4, 4))
    split = runnable(split_graph(gm, inputs))
    outputs = split(*inputs)
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 3 + [torch.float32]
    assert not torch.is_autocast_enabled("cpu")
    for out, ref in zip(outputs, runnable(gm)(*inputs), strict=True):
        assert torch.equal(out, ref)
    regions = [module for _, module in split.named_children() if isinstance(module, GraphModule)]
    for region in regions:
        ops = count_ops(region)
        name = "torch.amp.autocast_mode._{}_autocast".format
        assert ops.get(name("enter"), 0) == ops.get(name("exit"), 0), region.code


def test_grad_mode_follows_the_program() -> None:
    def program(cache: PlainCache, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            a = attend(cache, x * w, 0) * w
        return a, a * w

    w = torch.randn(4, 4, requires_grad=True)
    gm, inputs = capture(program, plain_cache(1), torch.randn(4, 4), w)
    outputs = runnable(split_graph(gm, inputs))(*inputs)
    assert [out.requires_grad for out in outputs] == [False, True]
    assert torch.is_grad_enabled()


def test_a_region_that_only_mutates_survives_dead_code_elimination() -> None:
    def program(cache: PlainCache, x: Tensor, state: Tensor) -> Tensor:
        out = attend(cache, x, 0)
        state.add_(1)
        return out

    state = torch.zeros(3)
    gm, inputs = capture(program, plain_cache(1), torch.randn(4, 4), state)
    split = split_graph(gm, inputs)
    split.graph.eliminate_dead_code()
    split.recompile()
    before = state.clone()
    runnable(split)(*inputs)
    assert torch.equal(state, before + 1), split.code


def test_constants_are_inputs_of_regions() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(4.0)

        def forward(self, handle: Tensor, x: Tensor) -> Tensor:
            q = (x + self.table)[None, None]
            op = torch.ops.headinfer.attention.default
            out: Tensor = op(handle, q, q, q, None, [], 0, 0, 1.0, True)
            return out * self.table

    cache, x = plain_cache(1), torch.randn(4, 4)
    gm = torch.fx.symbolic_trace(Model())
    split = split_graph(gm, [cache.handle, x])
    assert torch.equal(runnable(split)(cache.handle, x), runnable(gm)(cache.handle, x))
    assert all(not list(region.buffers()) for _, region in split.named_children())
    assert count_ops(split) == {
        "headinfer.attention.default": 1,
        "_operator.getitem": 2,
        "self.region_0": 1,
        "self.region_1": 1,
    }
