"""Exact long-context LLM inference on one GPU: the KV cache in host RAM, as a compiler backend."""

from headinfer_compile.backend import headinfer
from headinfer_compile.cache import CacheStats, HeadInferCache
from headinfer_compile.config import HeadInferConfig

__all__ = [
    "CacheStats",
    "HeadInferCache",
    "HeadInferConfig",
    "headinfer",
]
