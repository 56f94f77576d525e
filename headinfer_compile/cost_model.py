"""Bytes and seconds of a prefill and of a decode step, as formulas; printed, and evaluated.

A formula is a sympy expression over the symbols of ``SYMBOLS``; ``evaluate`` gives its number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy import Max

#: What each symbol stands for.
SYMBOLS = {
    "B": "sequences",
    "S": "tokens of context",
    "C": "tokens of a prefill chunk",
    "n": "new tokens of this chunk",
    "L": "layers with KV on this device",
    "Hq": "query heads",
    "Hkv": "KV heads",
    "D": "head dim of K",
    "Dv": "head dim of V",
    "R": "elements stored of a token and KV head: D + Dv, or what K and V are computed of",
    "e": "bytes of an element of K and V",
    "g_p": "head group in prefill",
    "g_d": "head group in decode",
    "T_p": "slot tokens in prefill",
    "T_d": "slot tokens in decode",
    "N": "slots; 0 where nothing is streamed",
    "T_s": "tokens of a staging buffer; 0 where all tokens pass through the tail",
    "T_t": "tokens of the tail",
    "Q": "query tokens attended at once",
    "S_gpu": "tokens of resident blocks",
    "S_freed": "of these, those that layers with a window had given up at the fullest, summed",
    "S_host": "tokens of host blocks",
    "S_past": "of these, tokens that layers with a window have given up, summed over layers",
    "weights": "bytes of the model",
    "library": "bytes that cuBLAS keeps",
    "a_region": "activation bytes of a token between attentions, from the graph",
    "a_site": "activation bytes of a token during an attention, from the graph",
    "a_moved": "bytes of a token that elementwise kernels move, all layers",
    "read": "weight bytes of a decode step",
    "M": "matrix elements of all layers that a token is multiplied with",
    "M_head": "elements of the output head",
    "K": "past tokens that are seen, summed over layers",
    "K_gpu": "of these in resident blocks and tail",
    "K_host": "of these in host blocks, counted once for each query chunk that streams them",
    "X": "pairs of new tokens that see each other, summed over layers",
    "J": "KV blocks merged, summed over layers",
    "L_stream": "layers with streamed KV blocks",
    "U": "KV blocks streamed, summed over layers and head groups",
    "s_cpu": "share of the host KV that the CPU attends; 0 where it attends none",
    "F": "matrix operations a second",
    "A": "attention operations a second over a KV block",
    "A_c": "attention operations a second over a causal square",
    "hbm": "device memory, bytes a second",
    "link": "host to device, bytes a second",
    "d2h": "device to host, bytes a second",
    "dram": "host memory beside the link, bytes a second",
    "t_call": "host seconds of a call, its layers left out",
    "t_layer": "host seconds of a layer",
    "t_stream": "more of them where KV blocks are streamed",
    "t_block": "host seconds of a streamed KV block",
}


@functools.cache
def formulas() -> Mapping[str, sympy.Expr]:
    """Every formula by name; bytes end in ``_bytes``, seconds in ``_seconds``."""
    v = {name: sympy.Symbol(name, nonnegative=True) for name in SYMBOLS}
    row = v["B"] * v["R"] * v["e"]
    token = v["L"] * v["Hkv"] * row
    found: dict[str, Any] = {"kv_bytes": token * v["S"]}
    found["resident_bytes"] = token * v["S_gpu"] - v["Hkv"] * row * v["S_freed"]
    found["host_bytes"] = token * v["S_host"] - v["Hkv"] * row * v["S_past"]
    found["slot_bytes"] = v["N"] * Max(v["g_p"] * v["T_p"], v["g_d"] * v["T_d"]) * row
    found["staging_bytes"] = 2 * v["T_s"] * v["Hkv"] * row
    found["tail_bytes"] = v["T_t"] * token
    group = v["g_p"] * v["Hq"] / v["Hkv"]
    found["workspace_bytes"] = v["Q"] * v["B"] * group * (v["Dv"] * (4 + v["e"]) + 8)
    tokens = v["B"] * v["C"]
    found["activation_bytes"] = tokens * Max(v["a_region"], v["a_site"])
    found["gpu_bytes"] = (
        v["weights"]
        + v["library"]
        + found["slot_bytes"]
        + found["staging_bytes"]
        + found["tail_bytes"]
        + found["resident_bytes"]
        + Max(tokens * v["a_region"], tokens * v["a_site"] + found["workspace_bytes"])
    )
    new = v["B"] * v["n"]
    pair = 2 * v["B"] * v["Hq"] * (v["D"] + v["Dv"])
    found["prefill_matrices_seconds"] = 2 * v["B"] * (v["M"] * v["n"] + v["M_head"]) / v["F"]
    found["prefill_attention_seconds"] = pair * (v["n"] * v["K"] / v["A"] + v["X"] / v["A_c"])
    merge = v["Hq"] * (v["Dv"] * (8 + v["e"]) + 8)
    found["prefill_memory_seconds"] = (new * v["a_moved"] + new * merge * v["J"]) / v["hbm"]
    found["prefill_link_seconds"] = Max(
        v["Hkv"] * row * v["K_host"] / v["link"], token * v["n"] / v["d2h"]
    )
    host = v["t_call"] + v["L"] * v["t_layer"] + v["L_stream"] * v["t_stream"]
    host += v["U"] * v["t_block"]
    found["prefill_host_seconds"] = host
    found["chunk_seconds"] = Max(
        found["prefill_matrices_seconds"]
        + found["prefill_attention_seconds"]
        + found["prefill_memory_seconds"],
        found["prefill_link_seconds"],
        found["prefill_host_seconds"],
    )
    streamed = v["Hkv"] * row * v["K_host"]
    found["decode_memory_seconds"] = (v["read"] + v["Hkv"] * row * v["K"]) / v["hbm"]
    found["decode_link_seconds"] = (1 - v["s_cpu"]) * streamed / v["link"]
    found["decode_cpu_seconds"] = v["s_cpu"] * streamed / v["dram"]
    found["decode_host_seconds"] = host
    found["token_seconds"] = Max(
        found["decode_memory_seconds"],
        found["decode_link_seconds"],
        found["decode_cpu_seconds"],
        found["decode_host_seconds"],
    )
    return found


@functools.cache
def _compiled(name: str) -> tuple[tuple[str, ...], Callable[..., float]]:
    expression = formulas()[name]
    names = tuple(sorted(symbol.name for symbol in expression.free_symbols))
    return names, sympy.lambdify(names, expression, modules=["math"])


def evaluate(name: str, values: Mapping[str, float]) -> float:
    """The number of a formula.

    Args:
        name: A key of ``formulas()``.
        values: A number for each of its symbols; others are ignored.
    """
    names, function = _compiled(name)
    return function(*(values[symbol] for symbol in names))


def formula_text(name: str) -> str:
    """A formula as ``name = expression``."""
    return f"{name} = {sympy.sstr(formulas()[name])}"
