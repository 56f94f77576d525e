"""Captures graphs with attention sites, and runs the mask that a site had before the pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg
from transformers.cache_utils import Cache

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes import recover_mask
from headinfer_compile.passes.context import META, AttentionSite, PassContext
from headinfer_compile.runtime.masks import MaskForm, block_mask

SDPA = (
    torch.nn.functional.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
)

LIB: Any = torch.library.Library("headinfer_mask_tests", "FRAGMENT")
LIB.define("update(Tensor k, Tensor v, int layer, SymInt past) -> (Tensor, Tensor)")


def _update(k: Tensor, v: Tensor, layer: int, past: int) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], k.shape[1], past + k.shape[2])
    return k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])


LIB.impl("update", _update, "CompositeExplicitAutograd")
LIB._register_fake("update", _update)


class GrowingCache(Cache):
    """Holds a length only; K and V are zeros, which masks do not depend on."""

    is_compileable = False

    def __init__(self, config: Any) -> None:
        self.layers: list[Any] = []
        self.length = 0
        self.num_layers = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        self.sliding = (
            [kind == "sliding_attention" for kind in kinds]
            if kinds
            else [window is not None] * self.num_layers
        )

    @property
    def is_sliding(self) -> list[bool]:
        return self.sliding

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.num_layers

    is_dummy = is_linear

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k, v = torch.ops.headinfer_mask_tests.update(
            key_states, value_states, layer_idx, self.length
        )
        if layer_idx == self.num_layers - 1:
            self.length = self.length + key_states.shape[2]
        return k, v


def attention(*args: Any) -> Tensor:
    """Stands for ``torch.ops.headinfer.attention`` in the graphs under test."""
    raise AssertionError("the graphs under test are not run")


@dataclasses.dataclass
class Capture:
    """A graph with sites, and what its masks were before the pass."""

    gm: GraphModule
    masks: dict[int, Node | None]
    ctx: PassContext
    batch: int

    @property
    def sites(self) -> list[Any]:
        return [node for node in self.gm.graph.nodes if META in node.meta]

    def recover(self) -> list[MaskForm]:
        """Run the pass and return the forms of all sites."""
        recover_mask.run(self.gm, self.ctx)
        self.gm.graph.lint()
        assert [node.meta[META] for node in self.sites] == self.ctx.sites
        assert all(site.mask is not None for site in self.ctx.sites), self.ctx.declines
        return [site.mask for site in self.ctx.sites if site.mask is not None]


def make_sites(gm: GraphModule, past: Callable[[Node], Any], strict: bool = False) -> Capture:
    """Replace each attention of a Dynamo graph by a site; ``past`` finds its length."""
    capture = Capture(gm, {}, PassContext(HeadInferConfig(strict=strict), [], pass_name="mask"), 0)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in SDPA:
            continue
        q, k, v = node.args[:3]
        mask = node.kwargs.get("attn_mask")
        causal = bool(node.kwargs.get("is_causal", False))
        index = len(capture.masks)
        site = AttentionSite(index, index, 2, 2, 8, 8, 1.0, causal, None, "test")
        with gm.graph.inserting_before(node):
            args: Any = (q, q, k, v, mask, [], index, past(node), 1.0, causal)
            new = gm.graph.call_function(attention, args)
        new.meta = {**node.meta, META: site}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        capture.masks[index] = mask
        capture.batch = int(q.meta["example_value"].shape[0])
        capture.ctx.sites.append(site)
    return capture


def capture_model(
    model: torch.nn.Module, calls: Callable[[Any, Callable[[], GrowingCache]], None]
) -> list[Capture]:
    """Compile a Hugging Face model and return its graphs; ``calls`` gets it and a cache factory."""
    found: list[Capture] = []

    def past(node: Node) -> Any:
        source = node.args[1]
        while isinstance(source, Node) and "update" not in str(source.target):
            source = source.args[0]
        assert isinstance(source, Node)
        return source.args[3]

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(make_sites(GraphModule(gm, gm.graph.__deepcopy__()), past))
        return gm.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    with torch.no_grad():
        calls(model, lambda: GrowingCache(model.config))
    return found


def capture_masks(
    builds: Sequence[Callable[..., Tensor | None]],
    tensors: Sequence[Tensor] = (),
    past: int = 5,
    new: int = 3,
    strict: bool = False,
) -> Capture:
    """Capture one attention per ``build(past, new, *tensors)``, its mask; lengths are symbolic."""
    found: list[Capture] = []

    def model(q: Tensor, old: Tensor, *tensors: Tensor) -> list[Tensor]:
        k = torch.cat([old, q], 2)
        masks = [build(old.shape[2], q.shape[2], *tensors) for build in builds]
        return [
            torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
            for mask in masks
        ]

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        copy = GraphModule(gm, gm.graph.__deepcopy__())
        nodes = list(copy.graph.nodes)
        length = next(n for n in nodes if n.name == "l_old_").meta["example_value"].shape[2]
        if isinstance(length, torch.SymInt):
            scalars = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
            length = next(
                n for n in scalars if n.meta["example_value"].node.expr == length.node.expr
            )
        found.append(make_sites(copy, lambda node: length, strict))
        return gm.forward

    torch._dynamo.reset()
    q, old = torch.zeros(2, 2, new, 8), torch.zeros(2, 2, past, 8)
    torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(q, old, *tensors)
    (capture,) = found
    return capture


class Values:
    """Concrete values of nodes of a graph for given lengths; placeholders are made on demand."""

    def __init__(self, capture: Capture, site: Any, past: int, new: int, seed: int) -> None:
        self.past, self.new, self.batch = past, new, capture.batch
        self.rng = random.Random(seed)
        self.known: dict[Node, Any] = {}
        self.symbols: dict[sympy.Symbol, int] = {}
        q, length = site.args[1], site.args[7]
        assert isinstance(q, Node)
        for value, size in ((q.meta["example_value"].shape[2], new), (self.fake(length), past)):
            if isinstance(value, torch.SymInt):
                self.symbols[value.node.expr] = size
            else:
                assert value == size, "the graph is specialised to another length"

    @staticmethod
    def fake(arg: Any) -> Any:
        value = arg.meta["example_value"] if isinstance(arg, Node) else arg
        is_constant = isinstance(value, torch.SymInt) and value.node.expr.is_number
        return int(value) if is_constant else value

    def size(self, value: Any, default: int) -> int:
        expr = value.node.expr.subs(self.symbols) if isinstance(value, torch.SymInt) else value
        return int(expr) if isinstance(expr, int) or expr.is_number else default

    def placeholder(self, node: Node) -> Any:
        fake = node.meta["example_value"]
        if not isinstance(fake, Tensor):
            return self.size(fake, self.new)
        shape = [
            self.size(size, self.batch if dim == 0 else self.past + self.new)
            for dim, size in enumerate(fake.shape)
        ]
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        if fake.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=fake.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(fake.dtype)

    def __getitem__(self, node: Node) -> Any:
        if node not in self.known:
            if node.op == "placeholder":
                self.known[node] = self.placeholder(node)
            else:
                args: Any = map_arg(node.args, self.__getitem__)
                kwargs: Any = map_arg(node.kwargs, self.__getitem__)
                target: Any = node.target
                if node.op == "call_method":
                    target = getattr(torch.Tensor, str(node.target))
                self.known[node] = target(*args, **kwargs)
        return self.known[node]


def blocks_of(
    form: MaskForm, inputs: Sequence[Tensor], past: int, new: int, rng: random.Random
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Tensor]]:
    """Every piece of a random cut of the mask, with True for a block without a mask."""
    q_cut, k_cut = rng.randint(0, new - 1), rng.randint(0, past + new - 1)
    for q in ((0, q_cut), (q_cut, new)):
        for k in ((0, k_cut), (k_cut, past + new)):
            if q[0] < q[1] and k[0] < k[1]:
                block = block_mask(
                    form,
                    inputs,
                    past=past,
                    new=new,
                    q_start=q[0],
                    q_stop=q[1],
                    k_start=k[0],
                    k_stop=k[1],
                    device="cpu",
                )
                yield q, k, torch.tensor(True) if block is None else block


def assert_same_mask(
    capture: Capture, site: Any, past: int, new: int, seed: int, hidden: float | None = None
) -> None:
    """Assert that the blocks of a recovered form equal the mask that the graph computed.

    ``hidden`` is the additive value that a bool form stands for.
    """
    record = site.meta[META]
    mask = capture.masks[record.index]
    assert mask is not None
    values = Values(capture, site, past, new, seed)
    expected = values[mask]
    if hidden is not None:
        assert set(expected.unique().tolist()) <= {0.0, hidden}
        expected = expected == 0
    shape = (1,) * (4 - expected.dim()) + tuple(expected.shape[:-2]) + (new, past + new)
    nodes: Any = site.args[5]
    inputs = [values[node] for node in nodes]
    for q, k, block in blocks_of(record.mask, inputs, past, new, random.Random(seed)):
        wanted = expected.expand(shape)[:, :, q[0] : q[1], k[0] : k[1]]
        got, wanted = torch.broadcast_tensors(block, wanted)
        message = f"seed {seed}, past {past}, new {new}, block {q} x {k}: {record.mask.formula}"
        assert got.dtype == wanted.dtype, message
        assert torch.equal(got, wanted), message


def check(capture: Capture, site: Any, seed: int, hidden: float | None = None) -> None:
    """Compare with brute force at random lengths that the graph accepts."""
    rng = random.Random(seed)
    fakes = (Values.fake(site.args[7]), Values.fake(site.args[1]).shape[2])
    for trial in range(3):
        past, new = (size if isinstance(size, int) else rng.randint(2, 12) for size in fakes)
        assert_same_mask(capture, site, past, new, seed * 10 + trial, hidden)
