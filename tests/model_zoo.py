"""Tiny random models of the families that people run, as data.

Every family keeps what sets its attention apart (head counts, windows, soft cap, sinks, biases,
head sizes, layers without rope or without KV); everything else is as small as it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
WINDOW = 40
_HIDDEN = {"hidden_size": 48, "intermediate_size": 64}
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 6}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_COMMON = {**_TOKENS, "initializer_range": 0.25, "max_position_embeddings": 2048}
_BASE = {**_COMMON, **_HIDDEN, **_HEADS}
_GQA = {**_BASE, "num_key_value_heads": 3, "head_dim": 8}
_LOCAL, _FULL = "sliding_attention", "full_attention"
_MLA = {
    **_BASE, "num_key_value_heads": 6, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers and the options of a tiny config."""

    name: str
    """As people write it; the row of the table."""
    config: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
    """Part of the default tests; the others are slow."""
    oldest: bool = False
    """Also run on the oldest transformers."""
    attention: str | None = None
    """Attention implementation, where the family's own default is not wanted."""

    @property
    def id(self) -> str:
        """Its name in test ids."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    def missing(self) -> str | None:
        """Why this transformers cannot make the family, or None."""
        for name in (self.config, self.model):
            if not hasattr(transformers, name):
                return f"transformers {transformers.__version__} has no {name}"
        return None

    def make(self, seed: int, **options: Any) -> PreTrainedModel:
        """A random model of the family, sharp enough that a lost token shows."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        if self.attention is not None:
            config._attn_implementation = self.attention
        model: PreTrainedModel = getattr(transformers, self.model)(config).eval()
        return model


FAMILIES = (
    Family("Llama 2", "LlamaConfig", "LlamaForCausalLM", {**_GQA, "num_key_value_heads": 6}),
    Family("Llama 3", "LlamaConfig", "LlamaForCausalLM", _GQA, default=True, oldest=True),
    Family(
        "Mistral", "MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": WINDOW},
        default=True,
    ),
    Family("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", {**_BASE, "num_key_value_heads": 3}),
    Family(
        "Qwen2.5 (windows above layer 1)", "Qwen2Config", "Qwen2ForCausalLM",
        {
            **_BASE, "num_key_value_heads": 3, "use_sliding_window": True,
            "sliding_window": WINDOW, "max_window_layers": 1,
        },
        default=True,
    ),
    Family("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", _GQA, default=True),
    Family("Phi-3", "Phi3Config", "Phi3ForCausalLM", {**_BASE, "num_key_value_heads": 6}),
    Family(
        "Phi-4", "Phi3Config", "Phi3ForCausalLM",
        {
            **_BASE, "num_key_value_heads": 3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
        },
        default=True,
    ),
    Family(
        "Gemma 2", "Gemma2Config", "Gemma2ForCausalLM",
        {
            **_GQA, "sliding_window": WINDOW, "layer_types": [_LOCAL, _FULL],
            "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
        },
        default=True, oldest=True,
    ),
    Family(
        "Gemma 3", "Gemma3TextConfig", "Gemma3ForCausalLM",
        {
            **_GQA, "num_hidden_layers": 6, "sliding_window": WINDOW,
            "layer_types": [*[_LOCAL] * 5, _FULL], "query_pre_attn_scalar": 12,
        },
        default=True,
    ),
    Family(
        "gpt-oss", "GptOssConfig", "GptOssForCausalLM",
        {
            **_GQA, "sliding_window": WINDOW, "layer_types": [_LOCAL, _FULL],
            "num_local_experts": 4, "num_experts_per_tok": 2,
        },
        default=True, oldest=True,
    ),
    Family(
        "Mixtral", "MixtralConfig", "MixtralForCausalLM",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "Qwen3-MoE", "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    Family("OLMo 2", "Olmo2Config", "Olmo2ForCausalLM", {**_BASE, "num_key_value_heads": 3}),
    Family(
        "Granite", "GraniteConfig", "GraniteForCausalLM",
        {**_BASE, "num_key_value_heads": 3, "attention_multiplier": 0.2},
    ),
    Family(
        "SmolLM3", "SmolLM3Config", "SmolLM3ForCausalLM",
        {**_BASE, "num_key_value_heads": 3, "no_rope_layers": [1, 0]},
    ),
    Family(
        "GPT-2", "GPT2Config", "GPT2LMHeadModel",
        {
            **_TOKENS, "n_positions": 2048, "n_embd": 48, "n_layer": 2, "n_head": 6,
            "initializer_range": 0.25,
        },
        default=True,
    ),
    Family("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", _BASE),
    Family(
        "Falcon (MQA)", "FalconConfig", "FalconForCausalLM",
        {**_COMMON, **_HEADS, "hidden_size": 48},
    ),
    Family(
        "Falcon (grouped)", "FalconConfig", "FalconForCausalLM",
        {
            **_COMMON, **_HEADS, "hidden_size": 48, "num_kv_heads": 3,
            "new_decoder_architecture": True,
        },
    ),
    Family(
        "Falcon (ALiBi)", "FalconConfig", "FalconForCausalLM",
        {**_COMMON, **_HEADS, "hidden_size": 48, "alibi": True, "multi_query": False},
    ),
    Family(
        "StableLM", "StableLmConfig", "StableLmForCausalLM", {**_BASE, "num_key_value_heads": 3}
    ),
    Family(
        "Cohere", "CohereConfig", "CohereForCausalLM",
        {**_BASE, "num_key_value_heads": 3, "use_qk_norm": True},
    ),
    Family("GLM-4", "Glm4Config", "Glm4ForCausalLM", _GQA),
    Family("DeepSeek-V2", "DeepseekV2Config", "DeepseekV2ForCausalLM", _MLA),
    Family("DeepSeek-V3", "DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA, default=True),
    Family(
        "Llama 4 (text)", "Llama4TextConfig", "Llama4ForCausalLM",
        {
            **_GQA, "intermediate_size_mlp": 64, "num_local_experts": 2, "moe_layers": [],
            "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0],
        },
    ),
    Family(
        "Qwen3-Next", "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {
            **_GQA, "num_hidden_layers": 3,
            "layer_types": ["linear_attention", _FULL, "linear_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        },
    ),
    Family(
        "LFM2", "Lfm2Config", "Lfm2ForCausalLM",
        {
            **_BASE, "num_hidden_layers": 3, "num_key_value_heads": 3,
            "layer_types": ["conv", _FULL, "conv"], "block_auto_adjust_ff_dim": False,
        },
    ),
    Family(
        "Qwen2.5-VL (text)", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **_BASE, "num_key_value_heads": 3,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                "out_hidden_size": 48,
            },
            "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
)  # fmt: skip
