"""Host time of a compiled decode step: of the call, per layer, and per KV block that is streamed.

Models of some layers and no width run through the backend, so that nothing but calls takes time.
Their pages are made and never written: what they hold does not matter.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from headinfer_compile.backend import headinfer
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.cache_protocol import cache_argument

_PAGE, _TAIL = 64, 64
_STEPS, _ENOUGH = 24, 5
_LONGEST = 2.0
"""Seconds of steps after which ``_ENOUGH`` of them do."""
_FEW, _MANY = 2, 34


@dataclass(frozen=True)
class HostSeconds:
    """Host time of a decode step, by what it grows with."""

    call: float
    """What no layer takes: guards of Dynamo, the caller, embedding and head."""
    layer: float
    stream: float
    """More of it where any KV block is streamed."""
    block: float
    """A streamed KV block of all heads of a layer."""


def host_seconds(device: torch.device, dtype: torch.dtype) -> HostSeconds:
    """Run models of few and of more layers.

    Args:
        device: Where the models run. Their regions are compiled on CUDA; on a CPU, where compiling
            takes longer than everything else here, they run eagerly.
        dtype: Of the models.
    """
    cuda = device.type == "cuda"
    # Tracing the layers is most of the time that a CPU needs.
    counts = (2, 10) if cuda else (1, 3)
    fewest, most = (_model(layers, device, dtype) for layers in counts)
    few, many = (_step_seconds(most, device, blocks, 0) for blocks in (_FEW, _MANY))
    block = max(0.0, (many - few) / (_MANY - _FEW) / counts[1])
    stream = 0.0
    if cuda:
        steps = [_step_seconds(model, device, _FEW, 1 << 30) for model in (fewest, most)]
        stream = max(0.0, (few - steps[1]) / counts[1] - _FEW * block)
    else:
        # A CPU has no resident tier of its own: there every layer streams.
        streamed = (_step_seconds(fewest, device, _FEW, 0), few)
        steps = [t - count * _FEW * block for t, count in zip(streamed, counts, strict=True)]
    layer = (steps[1] - steps[0]) / (counts[1] - counts[0])
    if not 0 < layer * counts[1] < steps[1]:
        # Noise: all of the step passes for that of its layers.
        layer = (steps[1] if steps[1] > 0 else few) / counts[1]
    return HostSeconds(max(0.0, steps[1] - counts[1] * layer), layer, stream, block)


def _model(layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1 << 16,
    )  # fmt: skip
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lowering = "inductor" if device.type == "cuda" else "eager"
    model.compile(backend=headinfer, options={"lowering": lowering})
    return model


def _step_seconds(model: Any, device: torch.device, blocks: int, gpu_budget: int) -> float:
    """Median seconds of a decode step over ``blocks`` pages, resident or not."""
    with HeadInferCache(
        model.config, gpu_budget=gpu_budget, page_tokens=_PAGE, tail_tokens=_TAIL
    ) as cache:
        _hold(cache, model, device, blocks * _PAGE)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        argument, times = cache_argument(model), []
        with torch.no_grad():
            for step in range(4 + _STEPS):
                past = cache.get_seq_length()
                positions = torch.full((1, 1), past, dtype=torch.int64, device=device)
                start = time.perf_counter()
                model(
                    ids, position_ids=positions, use_cache=True, logits_to_keep=1,
                    **{argument: cache},
                )  # fmt: skip
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if step >= 4:
                    times.append(time.perf_counter() - start)
                if len(times) >= _ENOUGH and sum(times) > _LONGEST:
                    break
    return statistics.median(times)


def _hold(cache: HeadInferCache, model: Any, device: torch.device, tokens: int) -> None:
    """Let an empty cache hold ``tokens`` tokens of whatever its pages contain."""
    config = model.config
    size = (1, config.num_key_value_heads, tokens, config.head_dim)
    rows = torch.empty(size, dtype=model.dtype, device=device)
    session = cache.session
    session.start(rows, rows, 0, 0)
    session.commit()
    for block in session.table.blocks:
        for k, v in block.pages.values():
            k.zero_()
            v.zero_()
    cache.length = tokens
