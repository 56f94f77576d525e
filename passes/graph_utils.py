"""Questions that several passes ask of a graph."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def calls(node: Node, op: OpOverload) -> bool:
    """Whether ``node`` calls ``op``; Dynamo keeps the packet where the model named no overload."""
    return node.op == "call_function" and node.target in (op, op.overloadpacket)


def node_value(node: Node) -> Any:
    """The fake value of ``node``: from ``meta["val"]``, else Dynamo's ``meta["example_value"]``.

    Returns:
        A fake tensor, a SymInt, a tuple of such, or None where the node has no recorded value.
    """
    return node.meta.get("val", node.meta.get("example_value"))


def readable(gm: GraphModule) -> str:
    """Return ``gm`` and its submodules as Python text with dtype, shape, stride and device."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def count_ops(gm: GraphModule) -> dict[str, int]:
    """Return how often each operation occurs in ``gm`` itself, by name, in alphabetical order.

    Functions and operators go by qualified name, methods as ``.name``, submodules as ``self.name``.
    """
    counts: collections.Counter[str] = collections.Counter()
    for node in gm.graph.nodes:
        if node.op == "call_method":
            counts[f".{node.target}"] += 1
        elif node.op == "call_module":
            counts[f"self.{node.target}"] += 1
        elif node.op == "call_function":
            target = node.target
            is_op = isinstance(target, (OpOverload, torch._ops.OpOverloadPacket))
            name = str(target) if is_op else f"{target.__module__}.{target.__name__}"
            counts[name] += 1
    return dict(sorted(counts.items()))
