"""Models of published shapes with random weights, made on the device without a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

_POSITIONS = 1 << 21


def _llama_3_8b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def _qwen2_5_7b() -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _smollm2_135m() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def _tiny() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=_POSITIONS,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3-8b": _llama_3_8b,
    "qwen2.5-7b": _qwen2_5_7b,
    "smollm2-135m": _smollm2_135m,
    "tiny": _tiny,
}


@dataclass(frozen=True)
class Shape:
    """The sizes that byte and operation counts are made of."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    """Bytes of all weights that a token reads: all but the embedding table."""
    matmul_elements: int
    """Elements of the matrices of all layers, without embedding and output head."""
    head_elements: int
    """Elements of the output head."""
    kv_token_bytes: int
    """KV bytes of one token, all layers."""

    def prefill_flops(self, tokens: int, chunk: int) -> tuple[int, int]:
        """Matrix and attention operations of a causal prefill; the head runs once a chunk."""
        chunks = -(-tokens // chunk)
        matrices = 2 * self.matmul_elements * tokens + 2 * self.head_elements * chunks
        attention = 2 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1)
        return matrices, attention


def shape_of(model: PreTrainedModel) -> Shape:
    """Sizes of a model."""
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    read = [p for p in model.parameters() if p is not embedding or p is output]
    item = model.dtype.itemsize
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        weight_bytes=sum(p.nbytes for p in read),
        matmul_elements=sum(p.numel() for p in read if p.dim() == 2 and p is not output),
        head_elements=output.numel(),
        kv_token_bytes=2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * item,
    )


def build(
    name: str, device: torch.device, *, layers: int | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of a named shape; weights are normal with a variance of one over the fan-in.

    Args:
        name: A key of ``SHAPES``.
        device: Where the weights are drawn; nothing passes through the host.
        layers: Fewer layers than the shape has.
        dtype: bfloat16 on CUDA and float32 elsewhere, unless given.
    """
    if name not in SHAPES:
        raise SystemExit(f"--model {name}: expected one of {', '.join(SHAPES)}")
    config = SHAPES[name]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        for layer in model.model.layers:
            for projection in ("q_proj", "k_proj", "v_proj"):
                bias = getattr(layer.self_attn, projection).bias
                if bias is not None:
                    bias.normal_(0.0, 0.1)
    _renew_rotary(model, device)
    made: PreTrainedModel = model.eval()
    return made


def _renew_rotary(model: Any, device: torch.device) -> None:
    # Its buffers are computed, not loaded, and are empty after the meta device.
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def twin(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model over the same weights with another attention function and nothing else shared."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=attention
        )
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    _renew_rotary(made, model.device)
    made.eval()
    return made
