"""Schemas of every operator, ``torch.ops.headinfer.*``.

| op | stream | waits for | effect |
|---|---|---|---|
| update_kv | compute | - | what Dynamo captures; alone it returns the full exact K and V |
| attention | - | - | a site in the model graph; the passes replace it by a schedule |
| pack | compute | D2H of the staging slot's last use | new K/V into tail, staging, resident pages |
| tail | compute | - | views of the newest tokens |
| offload | d2h | pack | writes page rows |
| resident | compute | - | views of a KV block on the GPU |
| prefetch | h2d | release of the slot; offload of the pages | fills a slot |
| wait | compute | prefetch | makes a slot readable |
| output | compute | - | the site's result, unwritten |
| attend | compute | - | (out, lse) of one query chunk over one KV block |
| attend_merge | compute | - | attend, then LSE merge in place |
| attend_resident | compute | pack | (out, lse) of one query over the tail and all resident blocks |
| attend_host | cpu | offload of the pages; query copied on compute | (out, lse) of host blocks |
| wait_host | compute | attend_host | makes the CPU's result readable |
| merge_host | compute | - | LSE merge of the CPU's result, in place |
| release | compute | - | the slot may be refilled after this point |
| store | compute | - | writes a finished accumulator into the result |

``handle`` is a 0-d int64 CPU tensor whose attribute ``session`` is the ``Session``: a graph input
that no guard specialises on. Tokens (packed, offloaded, transfer, release) are ints: every
dependency is an argument. Declared by ``define`` and ``impl``: ``custom_op`` costs 5 times as much
per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headinfer_compile.errors import CacheError
from headinfer_compile.runtime import block_ops, host_lane, transfer_ops
from headinfer_compile.runtime.session import Session

NAMESPACE = "headinfer"

#: Schema, stream, implementation.
_Op = tuple[str, str, Callable[..., Any]]


def session_of(handle: torch.Tensor) -> Session:
    """The session behind a handle.

    Raises:
        CacheError: The tensor is no handle of a ``HeadInferCache``.
    """
    session = getattr(handle, "session", None)
    if not isinstance(session, Session):
        raise CacheError(
            "a headinfer operator was called with a tensor that is no cache handle: call the model "
            "through torch.compile(..., backend='headinfer') with a HeadInferCache"
        )
    return session


def _update_kv(
    handle: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, past_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    session = session_of(handle)
    session.counters.materialised_layers.add(layer)
    return transfer_ops.update_without_schedule(session, layer, k, v, past_len)


def _attention(*_: Any) -> torch.Tensor:
    raise AssertionError("headinfer.attention reached run time: the lowering pass did not run")


OPS: dict[str, _Op] = {
    "update_kv": (
        "(Tensor handle, Tensor k, Tensor v, int layer, SymInt past_len) -> (Tensor, Tensor)",
        "compute",
        _update_kv,
    ),
    "attention": (
        "(Tensor handle, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] mask_inputs, "
        "int layer, SymInt past_len, float scale, bool is_causal, int? v_head_dim=None) -> Tensor",
        "compute",
        _attention,
    ),
    "pack": (
        "(Tensor handle, int layer, Tensor k, Tensor v, int piece) -> int",
        "compute",
        transfer_ops.pack,
    ),
    "tail": (
        "(Tensor handle, int layer, int packed) -> (Tensor, Tensor)",
        "compute",
        transfer_ops.tail,
    ),
    "offload": ("(Tensor handle, int layer, int packed) -> int", "d2h", transfer_ops.offload),
    "resident": (
        "(Tensor handle, int layer, int spec, int group, int block, int packed) "
        "-> (Tensor, Tensor)",
        "compute",
        transfer_ops.resident,
    ),
    "prefetch": (
        "(Tensor handle, int layer, int spec, int group, int block, int base, int slot, int after)"
        " -> int",
        "h2d",
        transfer_ops.prefetch,
    ),
    "wait": ("(Tensor handle, int transfer) -> (Tensor, Tensor)", "compute", transfer_ops.wait),
    "release": (
        "(Tensor handle, int transfer, Tensor last) -> int",
        "compute",
        transfer_ops.release,
    ),
    "output": ("(Tensor handle, Tensor q, int spec) -> Tensor", "compute", block_ops.output),
    "attend": (
        "(Tensor handle, Tensor q, Tensor k, Tensor v, Tensor[] masks, int spec, int group, "
        "int chunk, int span, bool accumulate) -> (Tensor, Tensor)",
        "compute",
        block_ops.attend,
    ),
    "attend_resident": (
        "(Tensor handle, int layer, Tensor q, int spec, int packed, bool accumulate) "
        "-> (Tensor, Tensor)",
        "compute",
        block_ops.attend_resident,
    ),
    "attend_merge": (
        "(Tensor handle, Tensor(a!) acc, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, "
        "Tensor[] masks, int spec, int group, int chunk, int span) -> (Tensor(a!), Tensor(b!))",
        "compute",
        block_ops.attend_merge,
    ),
    "attend_host": (
        "(Tensor handle, int layer, Tensor q, int spec, int block, int count) -> int",
        "cpu",
        host_lane.attend_host,
    ),
    "wait_host": ("(Tensor handle, int token) -> (Tensor, Tensor)", "compute", host_lane.wait_host),
    "merge_host": (
        "(Tensor handle, Tensor(a!) acc, Tensor(b!) lse, Tensor out, Tensor other_lse, int spec, "
        "int group, int chunk) -> (Tensor(a!), Tensor(b!))",
        "compute",
        block_ops.merge_host,
    ),
    "store": (
        "(Tensor handle, Tensor(a!) out, Tensor acc, int spec, int group, int chunk) -> Tensor(a!)",
        "compute",
        block_ops.store,
    ),
}

#: Stream of each operator, by name.
STREAMS = {name: stream for name, (_, stream, _) in OPS.items()}


def _bound(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(handle: torch.Tensor, *args: Any) -> Any:
        session = session_of(handle)
        session.counters.op_calls[name] += 1
        if session.observer is not None:
            return session.observer.run(name, function, session, args)
        return function(session, *args)

    return call


def _fake_update_kv(
    handle: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, past_len: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    def grown(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], x.shape[1], past_len + x.shape[2], x.shape[3])

    return grown(k), grown(v)


def _fake_attention(
    handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> torch.Tensor:
    v_head_dim = options[6] if len(options) > 6 and options[6] is not None else v.shape[3]
    # The memory order of the flash kernels, so that the model's transpose back costs nothing.
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_head_dim).transpose(1, 2)


def _fake_token(*_: Any) -> int:
    return 0


def _fake_store(handle: torch.Tensor, out: torch.Tensor, *_: Any) -> torch.Tensor:
    return out


def _fake_attend(
    handle: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    heads = k.shape[1] * (q.shape[1] // k.shape[1])
    shape = (q.shape[0], heads, rows)
    dtype = torch.float32 if rest[-1] else q.dtype
    return q.new_empty((*shape, v.shape[3]), dtype=dtype), q.new_empty(shape, dtype=torch.float32)


def _fake_attend_resident(
    handle: torch.Tensor, layer: int, q: torch.Tensor, spec: int, packed: int, accumulate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32 if accumulate else q.dtype
    dim = torch.library.get_ctx().new_dynamic_size()
    lse = q.new_empty((*q.shape[:3],), dtype=torch.float32)
    return q.new_empty((*q.shape[:3], dim), dtype=dtype), lse


def _fake_attend_merge(
    handle: torch.Tensor, acc: torch.Tensor, lse: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return acc, lse


def _fake_wait_host(handle: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    batch, heads, rows, dim = size(), size(), size(), size()
    return torch.empty(batch, heads, rows, dim), torch.empty(batch, heads, rows)


def _fake_output(handle: torch.Tensor, q: torch.Tensor, spec: int) -> torch.Tensor:
    dim = torch.library.get_ctx().new_dynamic_size()
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dim).transpose(1, 2)


def _fake_views(handle: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    batch, heads, rows = size(), size(), size()
    return torch.empty(batch, heads, rows, size()), torch.empty(batch, heads, rows, size())


_FAKES: dict[str, Callable[..., Any]] = {
    "update_kv": _fake_update_kv,
    "attention": _fake_attention,
    "output": _fake_output,
    "attend": _fake_attend,
    "attend_resident": _fake_attend_resident,
    "attend_merge": _fake_attend_merge,
    "merge_host": _fake_attend_merge,
    "wait_host": _fake_wait_host,
    "store": _fake_store,
    "tail": _fake_views,
    "resident": _fake_views,
    "wait": _fake_views,
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, (_schema, _, _function) in OPS.items():
    _library.define(f"{_name}{_schema}")
    _direct = _name in ("update_kv", "attention")
    _library.impl(
        _name,
        _function if _direct else _bound(_name, _function),
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake(
        f"{NAMESPACE}::{_name}", _FAKES.get(_name, _fake_token), lib=_library
    )
