"""What the planner knows of a model: shapes, weights, work and activations of a token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from headinfer_compile.activations import Activations, activation_model, sizes_of
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.cache_arguments import layers_with_kv, window_of
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.errors import OptionError
from headinfer_compile.known_models import KNOWN_MODELS, known_config
from headinfer_compile.models import find_source, load_config
from headinfer_compile.passes.cached_kv import updates_of
from headinfer_compile.passes.context import AttentionSite, PassContext
from headinfer_compile.passes.graph_utils import node_value
from headinfer_compile.passes.pipeline import Dump, run_graph_passes

_TRACED_TOKENS = 4096
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Footprint:
    """Activation bytes of one token of a prefill chunk."""

    region: float
    """The most that is held between two attentions."""
    site: float
    """Held while an attention runs, besides its workspace."""
    elementwise: float
    """Read and written by elementwise kernels, all layers."""
    traced: bool
    """Read from the model's graph; else computed from its shape."""


@dataclass(frozen=True)
class ModelFacts:
    """One model in one dtype. Legend: Hq query heads, Hkv KV heads, D and Dv their dims."""

    name: str
    windows: tuple[int | None, ...]
    """Of each layer with KV: tokens that it sees, None for all."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    row_elements: int
    """Elements stored of a token and KV head: D + Dv, or what K and V are computed of."""
    hidden: int
    vocab: int
    itemsize: int
    """Bytes of an element of K and V."""
    weight_bytes: int
    layer_weight_bytes: int
    """Of all layers; the rest are embedding, head and last norm."""
    end_weight_bytes: int
    """The larger of embedding and head: what a card with the first or last layers holds besides."""
    read_bytes: int
    """Weights that one decode step reads."""
    matrix_elements: int
    """Matrix elements of all layers that one token is multiplied with."""
    head_elements: int
    footprint: Footprint
    max_positions: int | None
    declined: tuple[str, ...] = ()
    """Why attentions of this model are not rewritten."""

    @property
    def num_layers(self) -> int:
        """Layers with KV."""
        return len(self.windows)

    @property
    def head_token_bytes(self) -> int:
        """KV bytes of one head of one layer for one token, batch 1."""
        return self.row_elements * self.itemsize

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token in all layers, batch 1."""
        return self.num_layers * self.num_kv_heads * self.head_token_bytes


def facts_of(
    model: str | PretrainedConfig | PreTrainedModel, *, dtype: torch.dtype | None = None
) -> ModelFacts:
    """Collect the facts of a model; no weights are read.

    A known name is answered from its shape. Any other model is traced on the meta device, a few
    layers of it, for its activations.

    Args:
        model: A known name, a hub name, a folder, a GGUF file, a config, or a live model.
        dtype: Of weights and KV; None: the model's own.

    Raises:
        OptionError: ``model`` is nothing of these.
        OSError: There is no such model.
    """
    name, live, traced = "", None, True
    kind: type[PreTrainedModel] | None = None
    if isinstance(model, str):
        name = model
        known = known_config(model)
        if known is None and "/" not in model and not model.endswith(".gguf"):
            if not Path(model).is_dir():
                raise OptionError(
                    f"{name}: no known model and no folder; known by name are "
                    f"{', '.join(KNOWN_MODELS)}; others by hub name (owner/name), folder or "
                    ".gguf file"
                )
        config = load_config(find_source(model)) if known is None else known
        traced = known is None
    elif isinstance(model, PreTrainedModel):
        live, kind, config = model, type(model), model.config
        dtype = dtype or model.dtype
    elif isinstance(model, PretrainedConfig):
        config = model
    else:
        raise OptionError(
            f"plan needs a transformers model, a config or a name, not {type(model).__name__}"
        )
    own = getattr(config, "dtype", None)
    dtype = dtype or (getattr(torch, own) if isinstance(own, str) else own) or torch.bfloat16
    meta = _meta_model(config, dtype, kind)
    facts = shape_facts(meta, name or type(meta).__name__)
    if live is not None:
        held = sum(p.nbytes for p in {id(p): p for p in live.parameters()}.values())
        facts = replace(facts, weight_bytes=held)
    return _traced(facts, config, dtype, type(meta)) if traced else facts


def _meta_model(
    config: PretrainedConfig, dtype: torch.dtype, kind: type[PreTrainedModel] | None
) -> PreTrainedModel:
    make: Callable[..., Any] = (
        AutoModelForCausalLM.from_config if kind is None else kind._from_config
    )
    with torch.device("meta"):
        made: PreTrainedModel = make(copy.deepcopy(config), dtype=dtype)
    made.eval()
    return made


def shape_facts(model: PreTrainedModel, name: str) -> ModelFacts:
    """The facts that the shape of a model shows; nothing is traced and no weight is read.

    Args:
        model: On any device.
        name: What to call it.
    """
    dtype = model.dtype
    config: Any = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _, kinds, with_kv = layers_with_kv(model.config)
    windows = tuple(window_of(config, kinds[layer]) for layer in with_kv)
    owner: Any = model
    embedding: torch.Tensor = owner.get_input_embeddings().weight
    output: torch.Tensor = owner.get_output_embeddings().weight
    ends = {id(p): p for p in (embedding, output)}
    others = [p for p in model.parameters() if id(p) not in ends]
    item = dtype.itemsize
    share = _active_share(config)
    matrices = sum(p.numel() for p in others if p.dim() == 2)
    experts = round(sum(p.numel() for p in others if p.dim() > 2) * share)
    small = sum(p.numel() for p in others if p.dim() < 2)
    inner = _inner_width(config)
    footprint = Footprint(
        region=(4 * config.hidden_size + 2 * inner + 2 * dim) * item,
        site=(config.hidden_size + 2 * heads * dim + 2 * kv_heads * dim + 2 * dim) * item,
        elementwise=len(windows)
        * (7 * config.hidden_size + 2 * (heads + kv_heads) * dim + 3 * inner)
        * item,
        traced=False,
    )
    return ModelFacts(
        name=name,
        windows=windows,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=dim,
        row_elements=2 * dim,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        itemsize=item,
        weight_bytes=(sum(p.numel() for p in others) + sum(p.numel() for p in ends.values()))
        * item,
        layer_weight_bytes=sum(p.numel() for p in others) * item,
        end_weight_bytes=max(p.numel() for p in ends.values()) * item,
        read_bytes=(matrices + experts + small + output.numel()) * item,
        matrix_elements=matrices + experts,
        head_elements=output.numel(),
        footprint=footprint,
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _active_share(config: Any) -> float:
    """The share of its experts that a token passes through."""
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / count if count and chosen else 1.0


def _inner_width(config: Any) -> int:
    """Width of the MLP that a token passes through, of all its experts."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    chosen = getattr(config, "num_experts_per_tok", None)
    return int(width * chosen) if chosen else int(width)


class _Stop(BaseException):
    """Ends the traced call once its graph is there."""


@dataclass
class _Trace:
    """A Dynamo backend that analyses the graph of a call and does not run it."""

    sites: list[AttentionSite] = field(default_factory=list)
    row_elements: int = 0
    """Of K and V of the first cache update."""
    reasons: list[str] = field(default_factory=list)
    activations: Activations | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        context = PassContext(HeadInferConfig(), example_inputs)
        for update in updates_of(gm.graph):
            rows = [node_value(kv).shape[3] for kv in update.args[1:3] if isinstance(kv, Node)]
            self.row_elements = self.row_elements or int(sum(rows))
        split, _ = run_graph_passes(gm, context, Dump(None), False)
        model = activation_model(split)
        self.sites += context.sites
        self.reasons += [decline.reason for decline in context.declines]

        def stop(*args: Any) -> Any:
            self.activations = model.evaluate(sizes_of(split, args))
            raise _Stop

        return stop


def _traced(
    facts: ModelFacts, config: PretrainedConfig, dtype: torch.dtype, kind: type[PreTrainedModel]
) -> ModelFacts:
    """``facts`` with the footprint and the KV shape that a few layers show in their graph."""
    short = copy.deepcopy(config)
    text: Any = short.get_text_config(decoder=True)
    kinds = list(getattr(text, "layer_types", None) or [])
    count = min(text.num_hidden_layers, max(2, len(set(kinds)) * 2))
    if kinds and len(set(kinds[:count])) < len(set(kinds)):
        count = text.num_hidden_layers
    text.num_hidden_layers = count
    if kinds:
        text.layer_types = kinds[:count]
    model = _meta_model(short, dtype, kind)
    trace = _Trace()
    model.compile(backend=trace)
    ids = torch.empty(1, _TRACED_TOKENS, dtype=torch.int64, device="meta")
    with HeadInferCache(model.config, gpu_budget=0, host_budget=_UNLIMITED_BYTES) as cache:
        try:
            with torch.no_grad():
                model(ids, logits_to_keep=1, **{cache_argument(model): cache})
        except _Stop:
            pass
    found = trace.activations
    if found is None or trace.reasons or not trace.sites:
        return replace(facts, declined=tuple(trace.reasons) or ("no attention was found",))
    site = trace.sites[0]
    return replace(
        facts,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        row_elements=trace.row_elements,
        footprint=Footprint(
            region=found.region_bytes / _TRACED_TOKENS,
            site=found.site_bytes / _TRACED_TOKENS,
            elementwise=found.elementwise_bytes / _TRACED_TOKENS * facts.num_layers / count,
            traced=True,
        ),
    )
