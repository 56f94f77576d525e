"""Shapes of well-known models by name, so that they can be planned for without a network."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_LLAMA_3 = dict(vocab_size=128256, max_position_embeddings=8192, num_key_value_heads=8)
_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-2-7b": (
        LlamaConfig,
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
        ),
    ),
    "llama-3-8b": (
        LlamaConfig,
        dict(
            **_LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32,
        ),
    ),
    "llama-3-70b": (
        LlamaConfig,
        dict(
            **_LLAMA_3, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64,
        ),
    ),
    # Version 0.2, which has no window.
    "mistral-7b": (
        MistralConfig,
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768,
            sliding_window=None,
        ),
    ),
    "qwen2-7b": (
        Qwen2Config,
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
    ),
    "qwen3-8b": (
        Qwen3Config,
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            max_position_embeddings=40960, tie_word_embeddings=False,
        ),
    ),
    "gemma-2-9b": (
        Gemma2Config,
        dict(
            vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256,
            max_position_embeddings=8192, sliding_window=4096,
        ),
    ),
    "gpt-oss-20b": (
        GptOssConfig,
        dict(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
            num_experts_per_tok=4, max_position_embeddings=131072, sliding_window=128,
        ),
    ),
}  # fmt: skip

#: Names that ``known_config`` knows.
KNOWN_MODELS = tuple(_SHAPES)


def known_config(name: str) -> PretrainedConfig | None:
    """The config of a known model in bfloat16, or None; the case of ``name`` does not matter."""
    entry = _SHAPES.get(name.lower())
    if entry is None:
        return None
    made = entry[0](**entry[1])
    made.dtype = "bfloat16"
    return made
