"""Why a cache was updated eagerly, for the warning or error that says so."""

from __future__ import annotations

import types

import torch


def why_eager(frame: types.FrameType | None) -> str:
    """The reason for an eager update, from the frame of the attention that made it."""
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and module._compiled_call_impl is not None:
            return (
                "the model is compiled, and HeadInferCache.update still ran eagerly: Dynamo gave "
                "up on this call and attention runs on materialised K and V. Run with "
                "TORCH_LOGS=recompiles,graph_breaks to see why"
            )
        frame = frame.f_back
    return (
        "HeadInferCache is used by a model that is not compiled: every layer gets materialised K "
        "and V, which is exact and slow. Call model.compile(backend='headinfer') before generate "
        "(torch.compile(model).generate reaches the uncompiled module)"
    )
