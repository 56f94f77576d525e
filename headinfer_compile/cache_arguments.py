"""What a cache is made from: checks of its arguments, and what a model's config says of its KV."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from headinfer_compile.config import parse_bytes
from headinfer_compile.errors import CacheError, OptionError

_NO_KV_LAYERS = ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp")


def layers_with_kv(config: PretrainedConfig) -> tuple[Any, list[str], list[int]]:
    """The decoder's config, the kinds of its layers, and the indices of those that keep KV.

    Raises:
        CacheError: It is no config, or no layer of a decoder-only model keeps KV.
    """
    name = type(config).__name__
    if not isinstance(config, PretrainedConfig):
        hint = "pass model.config" if hasattr(config, "config") else "pass the model's config"
        raise CacheError(f"HeadInferCache was given a {name}, which is no config: {hint}")
    if getattr(config, "is_encoder_decoder", False):
        raise CacheError(
            f"{name} is an encoder-decoder: HeadInferCache holds the KV of decoder-only models"
        )
    text = config.get_text_config(decoder=True)
    num_layers = getattr(text, "num_hidden_layers", None)
    if not num_layers:
        raise CacheError(f"{name} has no num_hidden_layers: it keeps no KV cache")
    kinds = list(getattr(text, "layer_types", None) or [])
    if not kinds:
        windowed = getattr(text, "sliding_window", None) is not None
        windowed = windowed and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * num_layers
    owned = kinds[: num_layers - (getattr(text, "num_kv_shared_layers", None) or 0)]
    with_kv = [i for i, kind in enumerate(owned) if kind not in _NO_KV_LAYERS]
    if not with_kv:
        raise CacheError(f"{name} has no attention layer: it keeps no KV cache")
    return text, kinds, with_kv


def window_of(config: Any, kind: str) -> int | None:
    """The tokens that a layer of this kind sees, as far as a config tells; None: all."""
    if kind == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    return getattr(config, "sliding_window", None) if kind == "sliding_attention" else None


def token_bytes(config: Any, layers: int) -> int:
    """Bytes of K and V of one token in ``layers`` layers, as far as a config tells."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = getattr(config, "dtype", None) or torch.float32
    return int(2 * layers * heads * dim * dtype.itemsize)


def auto_bytes(value: int | str, name: str) -> int | None:
    """Bytes, or None for ``"auto"``; raises ``OptionError`` as ``parse_bytes``."""
    return None if value == "auto" else parse_bytes(value, name)


def auto_count(value: int | str, name: str) -> int | None:
    """A count of at least 1, or None for ``"auto"``.

    Raises:
        OptionError: It is neither.
    """
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r}: expected 'auto' or a count of at least 1")
    return value


def check_count(value: object, name: str, low: int = 1) -> None:
    """Check that a value is a count of at least ``low``.

    Raises:
        OptionError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(f"{name}={value!r}: expected an int of at least {low}")


def find_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        OptionError: torch knows none of that name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r}: {error}") from error
