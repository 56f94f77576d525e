"""drop_vmap on traced functions: what nothing reads goes, with the writes in it; the rest stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from harness import clean_dynamo
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes import drop_vmap
from headinfer_compile.passes.context import PassContext
from headinfer_compile.passes.graph_utils import in_vmap_machinery, operation


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_dynamo():
        yield


def dropped(function: Callable[..., Any], *args: Tensor) -> tuple[list[str], list[str]]:
    """Names of the operations before and after the pass, whose graph must compute the same."""
    names: list[list[str]] = []

    def operations(gm: GraphModule) -> list[str]:
        return [operation(n) for n in gm.graph.nodes if n.op.startswith("call")]

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        names.append(operations(gm))
        drop_vmap.run(gm, PassContext(HeadInferConfig(), example_inputs))
        gm.graph.lint()
        gm.recompile()
        names.append(operations(gm))
        return gm.forward

    copies = [arg.clone() for arg in args]
    got = torch.compile(function, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close((got, args), (function(*copies), tuple(copies)))
    assert any("vmap" in name for name in names[0])
    before, after = names
    return before, after


def outer(x: Tensor, y: Tensor) -> Tensor:
    """``x[:, None] + y[None]`` by two vmaps."""
    inner = torch.vmap(lambda a, b: a + b, in_dims=(None, 0))
    result: Tensor = torch.vmap(inner, in_dims=(0, None))(x, y)
    return result


def test_a_vmap_that_nothing_reads_is_removed_with_its_writes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        blocks = outer(x, y).new_zeros(3, 4)
        blocks[:, 0] = 1.0
        torch.vmap(lambda row: row.new_zeros(2).add_(1.0))(blocks)
        return x * 2

    before, after = dropped(function, torch.randn(3), torch.randn(4))
    assert "setitem" in before
    assert after == ["mul"]


def test_a_vmap_that_is_read_stays_whole_beside_one_that_is_not() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        outer(x, y)
        return outer(y, x).sum(0)

    before, after = dropped(function, torch.randn(3), torch.randn(4))
    count = {name: (before.count(name), after.count(name)) for name in before}
    assert count["_vmap_increment_nesting"] == count["_vmap_decrement_nesting"] == (4, 2)
    assert count["add"] == (2, 1)


def test_a_write_stays_where_something_reads_it() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        table = x.new_zeros(3)
        table[:2].add_(outer(x, y)[0, :2])
        table[2:] = 5.0
        return table.clone()

    _, after = dropped(function, torch.randn(3), torch.randn(4))
    assert {"add_", "setitem", "_add_batch_dim"} <= set(after)


def test_a_write_to_an_input_stays() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x[1:] = outer(x, y)[1:, 0]
        return y * 2

    _, after = dropped(function, torch.randn(3), torch.randn(4))
    assert "setitem" in after


def test_a_graph_without_vmap_is_left_as_it_is() -> None:
    gm = torch.fx.symbolic_trace(lambda x: (x + 1, x * 2)[0])
    assert not any(in_vmap_machinery(node) for node in gm.graph.nodes)
    before = gm.code
    drop_vmap.run(gm, PassContext(HeadInferConfig(), ()))
    gm.recompile()
    assert gm.code == before
