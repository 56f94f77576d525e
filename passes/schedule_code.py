"""Turn a proved schedule into the function that runs it: the printed statements, nothing else.

FX's own code generation costs 90 us per node, which is most of the time of a new plan key.
"""

from __future__ import annotations

import linecache
import operator
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from headinfer_compile.passes.schedule_text import statement
from headinfer_compile.runtime.ops import NAMESPACE, OPS


def compile_schedule(gm: GraphModule) -> Callable[..., tuple[Any, ...]]:
    """The function over the inputs of ``gm``; each value dies after its last use."""
    ops = getattr(torch.ops, NAMESPACE)
    names = {NAMESPACE: SimpleNamespace(**{name: getattr(ops, name).default for name in OPS})}
    nodes = list(gm.graph.nodes)
    last_use: dict[Node, Node] = {}
    for node in nodes:
        last_use[node] = node
        for argument in node.all_input_nodes:
            last_use[argument] = node
    dying: dict[Node, list[str]] = {}
    for node, user in last_use.items():
        if node.op == "call_function" and user.op != "output":
            dying.setdefault(user, []).append(node.name)
    inputs = ", ".join(node.name for node in nodes if node.op == "placeholder")
    lines = [f"def site({inputs}):"]
    for node in nodes:
        if node.op != "placeholder":
            dead = f"; del {', '.join(dying[node])}" if node in dying else ""
            lines.append(f"    {statement(node)}{dead}")
    scope: dict[str, Any] = dict(names)
    text = "\n".join(lines)
    name = f"<headinfer schedule {zlib.crc32(text.encode()):08x}>"
    # Tracebacks and debuggers show the statement; linecache keeps what has no time of change.
    linecache.cache[name] = (len(text), None, [f"{line}\n" for line in lines], name)
    exec(compile(text, name, "exec"), scope)
    function: Callable[..., tuple[Any, ...]] = scope["site"]
    return function


def remove_unused_items(gm: GraphModule) -> None:
    """Drop results that nobody takes; every op of a schedule stays."""
    gm.graph.eliminate_dead_code(lambda node: node.target is not operator.getitem)
