"""Block masks of ``attn_implementation="flex_attention"`` that Dynamo can trace.

The function that transformers registers asks for the sum of the padding mask, which is data, and
calls ``create_block_mask(_compile=True)``, which warns: two graph breaks, after which every layer
is a graph of its own and no length a symbol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    causal_mask_function,
    flex_attention_mask,
    padding_mask_function,
    prepare_padding_mask,
)

_NAME = "flex_attention"


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> BlockMask:
    """Make the mask of transformers' ``flex_attention_mask``, without a graph break if traced.

    Args:
        batch_size: Rows.
        q_length: New tokens n.
        kv_length: Tokens of the cache and new ones.
        q_offset: Position of the first new token.
        kv_offset: Position of the first key.
        mask_function: Of (row, head, query position, key position).
        attention_mask: ``[B, past + n]``, or None; in a trace it counts even if it is all ones.
        device: Where the mask is made.
        **kwargs: What newer versions pass besides.

    Returns:
        The mask.
    """
    if not torch.compiler.is_compiling():
        return flex_attention_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            device, **kwargs,
        )  # fmt: skip
    if attention_mask is not None:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    shifted = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(shifted, batch_size, None, q_length, kv_length, device)


def register_block_masks() -> Callable[[], None]:
    """Let transformers make block masks with ``block_mask``, in the whole process.

    Returns:
        A function that restores what was registered before.
    """
    before = AttentionMaskInterface()[_NAME]
    AttentionMaskInterface.register(_NAME, block_mask)

    def restore() -> None:
        AttentionMaskInterface.register(_NAME, before)

    return restore
