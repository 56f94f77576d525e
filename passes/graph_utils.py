"""Questions that several passes ask of a graph."""

from __future__ import annotations

import collections
import operator
from typing import Any

import torch
import torch._functorch.predispatch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import Argument

_AUGMENTED = (
    *("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv"),
    "xor",
)
_IN_PLACE = (operator.setitem, *(getattr(operator, f"i{name}") for name in _AUGMENTED))
_NAMESPACES = (operator, torch, torch.nn.functional, torch._functorch.predispatch)


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


def operation(node: Node) -> str:
    """The name of a torch or operator function or of a Tensor method; "" for anything else."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    known = node.op == "call_function" and any(
        node.target is getattr(space, name, None) for space in _NAMESPACES
    )
    return name if known else ""


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two fake tensors have the same sizes, without a guard where that is not known."""
    return left.dim() == right.dim() and all(
        statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True)
    )


def written(node: Node) -> list[Argument]:
    """The arguments that ``node`` may write in place: a Dynamo graph is not functional."""
    found: list[Argument] = [node.kwargs["out"]] if "out" in node.kwargs else []
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        found += node.all_input_nodes
    elif node.target in _IN_PLACE or (
        isinstance(name, str)
        and name.endswith("_")
        and not name.endswith("__")
        and not hasattr(operator, name)
    ):
        found += node.args[:1]
    return found


def in_vmap_machinery(node: Node) -> bool:
    """Whether ``node`` belongs to the trace of a ``torch.vmap`` itself.

    Those that enter and leave one have no result at all.
    """
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def has_effect(node: Node) -> bool:
    """Whether ``node`` must stay although nothing uses its result."""
    return node.is_impure() or in_vmap_machinery(node) or bool(written(node))


def writes_inputs(gm: GraphModule) -> bool:
    """Whether ``gm`` may write a tensor that is there before the call: an input or a buffer."""
    given: set[Node] = set()
    for node in gm.graph.nodes:
        # Any first argument may be what the result is a view of.
        source = node.args[0] if node.args else None
        if node.op in ("placeholder", "get_attr") or source in given:
            given.add(node)
        if any(argument in given for argument in written(node) if isinstance(argument, Node)):
            return True
    return False
