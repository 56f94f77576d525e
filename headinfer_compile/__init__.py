"""Exact long-context LLM inference on one GPU: the KV cache in host RAM, as a compiler backend."""

from headinfer_compile.backend import headinfer
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.config import HeadInferConfig
from headinfer_compile.explanation import Explanation
from headinfer_compile.planner import Plan, plan
from headinfer_compile.profiling import profile
from headinfer_compile.report import explain
from headinfer_compile.schedule_file import load_schedule
from headinfer_compile.stats import CacheStats

__all__ = [
    "CacheStats",
    "Explanation",
    "HeadInferCache",
    "HeadInferConfig",
    "Plan",
    "explain",
    "headinfer",
    "load_schedule",
    "plan",
    "profile",
]
