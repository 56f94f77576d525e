"""Attention calls by name: ``scaled_dot_product_attention`` and the flash operators' schemas.

Each reader gives a call as an ``Attention``: the terms in which ``find_attention`` writes a site.

Legend: B batch, Hq query heads, n new tokens, D head dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.fx.node import Argument

from headinfer_compile.passes.cached_kv import CachedKV, UnsupportedError, static_int
from headinfer_compile.passes.token_function import read_kv

_SDPA = (
    torch._C._nn.scaled_dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


_FLASH = ("flash_attn._flash_attn_forward", "flash_attn_3._flash_attn_forward")
_FLASH_READ = (
    "q", "k", "v", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap",
)  # fmt: skip
_FLASH_SPEED = (
    "return_softmax", "rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa",
    "sm_margin", "deterministic",
)  # fmt: skip
"""Arguments that change no value of the output. Of all others only zero, False and None are
known: rotary embeddings, pages, lengths, chunks, scales of fp8, ..."""


@dataclass
class Attention:
    """One attention over the K and V of one cache update."""

    node: Node
    """The call; for an attention written out, its last operation."""
    query: Node
    kv: CachedKV
    mask: Node | None = None
    is_causal: bool = False
    bottom_right: bool = False
    """``is_causal`` means ``kv <= q + past``."""
    scale: Argument = None
    """Factor of the scores; None for ``D ** -0.5``."""
    soft_cap: float | None = None
    """Scores s become ``soft_cap * tanh(s / soft_cap)`` before the mask."""
    sinks: Node | None = None
    """``[..., Hq, 1, 1]`` or ``[Hq]``: one more score a head, whose value is zero."""
    window: int | None = None
    """``kv > q + past - window`` besides the mask."""
    transposed: bool = False
    """The call takes and gives ``[B, n, H, D]``."""
    outputs: tuple[Node, ...] = ()
    """What the site's result replaces."""
    inner: set[Node] = field(default_factory=set)
    """Nodes that only serve this attention."""


def reader(node: Node) -> Callable[[Node], Attention] | None:
    """The function that reads ``node``, if it is an attention called by name."""
    if node.op != "call_function":
        return None
    if node.target in _SDPA:
        return read_sdpa
    name = getattr(node.target, "_qualified_op_name", None) or str(node.target)
    if name.replace("::", ".").removesuffix(".default") in _FLASH:
        return read_flash
    return None


def read_sdpa(node: Node) -> Attention:
    """Read ``scaled_dot_product_attention``.

    Raises:
        UnsupportedError: It is no attention over one cache update, or has dropout.
    """
    named: dict[str, Argument] = dict(zip(_SDPA_ARGS, node.args, strict=False))
    named.update(node.kwargs)
    if named.get("dropout_p", 0.0) != 0.0:
        raise UnsupportedError(f"dropout_p={named['dropout_p']} is not zero")
    query, mask = named["query"], named.get("attn_mask")
    assert isinstance(query, Node) and (mask is None or isinstance(mask, Node))
    return Attention(
        node,
        query,
        read_kv(named["key"], named["value"]),
        mask,
        is_causal=bool(named.get("is_causal", False)),
        scale=named.get("scale"),
        outputs=(node,),
    )


def read_flash(node: Node) -> Attention:
    """Read FlashAttention-2's or 3's operator: ``[B, n, H, D]`` in, ``(out, lse, ...)`` out.

    Raises:
        UnsupportedError: It is no attention over one cache update, or is given what a site has not,
            such as dropout, ALiBi slopes or lengths.
    """
    schema = node.target.default._schema if hasattr(node.target, "default") else node.target._schema  # type: ignore[union-attr]
    named: dict[str, Argument] = {a.name: a.default_value for a in schema.arguments}
    named.update(zip(named, node.args, strict=False))
    named.update(node.kwargs)
    for name, value in named.items():
        if name not in (*_FLASH_READ, *_FLASH_SPEED) and (isinstance(value, Node) or value):
            raise UnsupportedError(f"its argument {name} is {value}")
    left = static_int(named["window_size_left"], "the window")
    right = static_int(named["window_size_right"], "the window")
    causal = bool(named["causal"])
    if right > 0 and not causal:
        raise UnsupportedError(f"its window reaches {right} tokens ahead")
    users = tuple(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
        raise UnsupportedError("more than its output is used")
    query, cap = named["q"], named["softcap"]
    assert isinstance(query, Node) and isinstance(cap, (int, float))
    return Attention(
        node,
        query,
        read_kv(named["k"], named["v"], heads_dim=2),
        # The package aligns the causal mask bottom right: over the cache that is kv <= q + past.
        is_causal=causal or right == 0,
        bottom_right=True,
        scale=named["softmax_scale"],
        soft_cap=float(cap) if cap > 0 else None,
        window=left + 1 if left >= 0 else None,
        transposed=True,
        outputs=users,
    )
