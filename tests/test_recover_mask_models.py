"""Masks of Hugging Face models, captured by Dynamo: the proved form equals the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from headinfer_compile.passes.context import META
from headinfer_compile.runtime.masks import Expr, MaskForm, load
from mask_harness import Capture, capture_model, check

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SOURCES = [
    f"L{prefix}['{name}']{suffix}"
    for prefix in ("", "['kwargs']")
    for name, suffix in [
        *((name, ".length") for name in ("cache", "past_key_values")),
        *((name, "") for name in ("input_ids", "position_ids", "attention_mask")),
    ]
]


@pytest.fixture(autouse=True)
def dynamic_lengths() -> Iterator[None]:
    before = torch.compiler.config.dynamic_sources
    torch.compiler.config.dynamic_sources = ",".join(SOURCES)
    yield
    torch.compiler.config.dynamic_sources = before
    torch._dynamo.reset()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def steps(
    ends: tuple[int, ...], batch: int = 1, mask: Callable[[int, int], Tensor] | None = None
) -> Callable[[Any, Callable[[], Any]], None]:
    """Feed chunks that end at ``ends``, with ``mask(start, end)`` as the attention mask."""

    def calls(model: Any, new_cache: Callable[[], Any]) -> None:
        cache = new_cache()
        ids = torch.randint(0, 97, (batch, ends[-1]))
        for start, end in zip((0, *ends), ends, strict=False):
            extra = {} if mask is None else {"attention_mask": mask(start, end)}
            model(ids[:, start:end], past_key_values=cache, **extra)

    return calls


#: First chunk, later chunk of another length, decode.
CHUNKS = (9, 20, 21)


def forms_by_layer(graphs: list[Capture]) -> list[list[MaskForm]]:
    """The forms of each graph; also asserts that they equal the masks they replaced."""
    assert len(graphs) > 1
    forms = []
    for number, graph in enumerate(graphs):
        forms.append(graph.recover())
        for site in graph.sites:
            assert site.args[4] is None
            if graph.masks[site.meta[META].index] is not None:
                check(graph, site, seed=number)
        masks = [mask.name for mask in graph.masks.values() if mask and mask.op != "placeholder"]
        graph.gm.graph.eliminate_dead_code()
        assert not {node.name for node in graph.gm.graph.nodes} & set(masks)
    return forms


def test_llama_is_causal_in_every_phase() -> None:
    graphs = forms_by_layer(capture_model(llama(), steps(CHUNKS)))
    assert all(form == MaskForm(causal=True) for forms in graphs for form in forms)


def test_sliding_window_is_proved_in_every_phase() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    graphs = forms_by_layer(capture_model(model, steps(CHUNKS)))
    assert all(form == MaskForm(causal=True, window=8) for forms in graphs for form in forms)
    assert graphs[0][0].formula == "kv <= q + past and kv > q + past - 8"


def test_two_masks_in_one_graph() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 2},
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    graphs = forms_by_layer(capture_model(Gemma3ForCausalLM(config), steps(CHUNKS)))
    wanted = [MaskForm(causal=True, window=8), MaskForm(causal=True)]
    assert all(forms == wanted for forms in graphs)


@pytest.mark.parametrize(("batch", "kind"), [(1, "ones"), (2, "left")])
def test_a_2d_mask_becomes_the_padding_input(batch: int, kind: str) -> None:
    mask = torch.ones(batch, 21, dtype=torch.int64)
    mask[-1, : 0 if kind == "ones" else 3] = 0
    calls = steps(CHUNKS, batch, lambda start, end: mask[:, :end])
    graphs = capture_model(llama(), calls)
    for forms in forms_by_layer(graphs):
        assert forms == [MaskForm(causal=True, padding=0)]
        assert forms[0].formula == "kv <= q + past and m0[b, kv]"
    for graph in graphs:
        inputs = [site.args[5] for site in graph.sites]
        assert all(len(nodes) == 1 and nodes[0].op == "placeholder" for nodes in inputs)


def test_a_4d_mask_of_the_caller_is_one_load() -> None:
    def mask(start: int, end: int) -> Tensor:
        return torch.ones(1, 1, end - start, end, dtype=torch.bool if start else torch.float32)

    for forms in forms_by_layer(capture_model(llama(), steps((5, 9), 1, mask))):
        zero = Expr("const", (0,))
        assert forms == [MaskForm(expr=load(0, (zero, zero, Expr("q"), Expr("kv"))))]
