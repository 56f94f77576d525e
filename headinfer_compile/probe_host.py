"""Host time of a compiled decode step: per layer, and per KV block that is streamed.

A model of many layers and no width runs through the backend, so that nothing but calls takes time.
Its pages are made and never written: what they hold does not matter.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from headinfer_compile.backend import headinfer
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.cache_protocol import cache_argument

_PAGE, _TAIL = 64, 64
_STEPS = 24
_FEW, _MANY = 2, 34


def host_seconds(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a layer, and of a streamed KV block of all heads.

    Args:
        device: Where the model runs. Its regions are compiled on CUDA; on a CPU, where compiling
            takes longer than everything else here, they run eagerly.
        dtype: Of the model.
    """
    cuda = device.type == "cuda"
    layers = 8 if cuda else 3  # tracing them is most of the time that a CPU needs
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1 << 16,
    )  # fmt: skip
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.compile(backend=headinfer, options={"lowering": "inductor" if cuda else "eager"})
    few, many = (_step_seconds(model, device, blocks, 0) for blocks in (_FEW, _MANY))
    block = max(0.0, (many - few) / (_MANY - _FEW) / layers)
    if cuda:
        layer = _step_seconds(model, device, _FEW, 1 << 30) / layers
    else:
        layer = max(0.0, few / layers - _FEW * block)
    return layer, block


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
