"""Families of models give the tokens of a resident cache, every attention layer a rewritten site.

``pytest tests/test_models.py -m "slow or not slow" --models-report docs/models.md`` writes the
table of the documentation from what these tests find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness import (
    CompiledModel,
    assert_same,
    assert_written_once,
    clean_dynamo,
    generate,
)
from headinfer_compile.passes.context import AttentionSite
from model_zoo import FAMILIES, Family
from models_report import PROPERTY

# More than 64 new tokens are prefill to the runtime, fewer decode: 70, 70, 21, and ones.
PROMPT, CHUNK, NEW = 161, 70, 24


def families() -> list[Any]:
    """All families; those that are not default are slow."""
    return [
        pytest.param(
            family,
            id=family.id,
            marks=[
                *([] if family.default else [pytest.mark.slow]),
                *([pytest.mark.oldest] if family.oldest else []),
            ],
        )
        for family in FAMILIES
    ]


def describe(family: Family, model: CompiledModel) -> dict[str, Any]:
    """A row of the table, from the sites that the compiler found."""
    sites = [site for graph in model.graphs for site in graph.sites]
    layers = {site.layer: site for site in sites}.values()

    def distinct(text: Callable[[AttentionSite], str], of: Sequence[AttentionSite]) -> str:
        return "; ".join(dict.fromkeys(text(site) for site in of))

    ordered = sorted(layers, key=lambda site: site.layer)
    config = model.resident.config.get_text_config(decoder=True)
    forms = [dataclasses.replace(site, source="") for site in sites]
    return {
        "family": family.name,
        "class": f"`{family.model}`",
        "attention": config._attn_implementation,
        "heads": distinct(lambda site: f"{site.num_heads} / {site.num_kv_heads}", ordered),
        "dims": distinct(lambda site: f"{site.head_dim} / {site.v_head_dim}", ordered),
        "sites": distinct(_properties, ordered),
        "masks": distinct(_mask, forms),
        "tests": "default" if family.default else "slow",
    }


def _properties(site: AttentionSite) -> str:
    found = []
    if site.soft_cap is not None:
        found.append(f"soft cap {site.soft_cap:g}")
    if site.sinks is not None:
        found.append("sinks")
    if site.expand is not None:
        found.append("K and V expanded per block")
    elif site.num_kv_heads == 1:
        found.append("one KV head")
    return " + ".join(found) or "plain"


def _mask(site: AttentionSite) -> str:
    assert site.mask is not None
    if site.mask.expr is not None:
        return "evaluated a block"
    causal = "causal" if site.mask.causal else "full"
    window = "" if site.mask.window is None else f", window {site.mask.window}"
    return causal + window


@pytest.mark.parametrize("family", families())
def test_family(family: Family, seed: int, record_property: Callable[[str, object], None]) -> None:
    missing = family.missing()
    if missing:
        pytest.skip(missing)
    with clean_dynamo():
        model = CompiledModel(family.make(seed))
        ids, oracle = model.prompt(seed, PROMPT, NEW, prefill_chunk_size=CHUNK)
        cache = model.cache()
        run = generate(model.model, ids, cache, NEW, prefill_chunk_size=CHUNK)
        record_property(PROPERTY, describe(family, model))
        assert_same(run, oracle)
        model.assert_streamed(cache)
        assert_written_once(cache.stats())
