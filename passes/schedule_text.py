"""Site schedules as text that can be read, edited and loaded again.

The text is Python in form, but it is parsed, never executed: assignments of ``headinfer.<op>``
calls and of ``x[0]`` / ``x[1]``, and one return.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from headinfer_compile.errors import ScheduleError
from headinfer_compile.passes.schedule import PieceKind, PlanKey
from headinfer_compile.runtime.ops import NAMESPACE, OPS, STREAMS

_KEY = "# key: "


def _name_of(node: Node) -> str:
    target = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return f"headinfer.{name}" if name in OPS else str(name)


def _argument(value: object) -> str:
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return value.name if isinstance(value, Node) else repr(value)


def _comment(node: Node) -> str:
    opname = getattr(node.target, "_opname", "")
    if opname not in STREAMS:
        return ""
    after = {"wait": 1, "prefetch": 7, "offload": 2, "wait_host": 1}.get(opname)
    note = f"  # {STREAMS[opname]}"
    return note if after is None else f"{note}, after {_argument(node.args[after])}"


def statement(node: Node) -> str:
    """One op or the return of a schedule as code."""
    if node.op == "output":
        return f"return {', '.join(map(_argument, node.args[0]))}"  # type: ignore[arg-type]
    if node.target is operator.getitem:
        return f"{node.name} = {_argument(node.args[0])}[{node.args[1]}]"
    return f"{node.name} = {_name_of(node)}({', '.join(map(_argument, node.args))})"


def schedule_text(gm: GraphModule, key: PlanKey, name: str = "site") -> str:
    """The schedule as code with the stream and the awaited token of each op."""
    nodes = list(gm.graph.nodes)
    inputs = ", ".join(node.name for node in nodes if node.op == "placeholder")
    lines = [f"{_KEY}{json.dumps(dataclasses.asdict(key))}", f"def {name}({inputs}):"]
    for node in nodes:
        if node.op != "placeholder":
            lines.append(f"    {statement(node)}{_comment(node)}")
    return "\n".join(lines) + "\n"


def parse_schedule(text: str, path: str) -> tuple[GraphModule, PlanKey]:
    """Read a schedule that ``schedule_text`` wrote.

    Raises:
        ScheduleError: The text is not of that form; the line is named.
    """
    key = _parse_key(text, path)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ScheduleError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise ScheduleError(f"{path}: {error}") from error
    functions = [item for item in tree.body if isinstance(item, ast.FunctionDef)]
    if len(functions) != 1 or len(tree.body) != 1:
        raise ScheduleError(f"{path}: expected exactly one function, found {len(tree.body)} items")
    graph = Graph()
    names = {argument.arg: graph.placeholder(argument.arg) for argument in functions[0].args.args}
    for statement in functions[0].body:
        _parse_statement(graph, names, statement, path)
    graph.lint()
    return GraphModule(torch.nn.Module(), graph), key


def _parse_key(text: str, path: str) -> PlanKey:
    lines = [line for line in text.splitlines() if line.startswith(_KEY)]
    if len(lines) != 1:
        raise ScheduleError(
            f"{path}: expected one line '{_KEY}...' that says what it was built for"
        )
    try:
        values = json.loads(lines[0].removeprefix(_KEY))
        values["pieces"] = tuple(PieceKind(**piece) for piece in values["pieces"])
        values["next_transfers"] = tuple(tuple(item) for item in values["next_transfers"])
        key = PlanKey(**values)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ScheduleError(f"{path}: the key line is damaged: {error}") from error
    kinds = {"int": int, "bool": bool, "str": str}
    for field in dataclasses.fields(PlanKey):
        value = getattr(key, field.name)
        if type(value) is not kinds.get(str(field.type), tuple):
            raise ScheduleError(f"{path}: the key line is damaged: {field.name} is {value!r}")
    return key


def _parse_statement(graph: Graph, names: dict[str, Node], statement: ast.stmt, path: str) -> None:
    where = f"{path}, line {statement.lineno}"

    def value_of(item: ast.expr) -> Any:
        if isinstance(item, ast.Name):
            if item.id not in names:
                raise ScheduleError(f"{where}: {item.id!r} is used before it is made")
            return names[item.id]
        if isinstance(item, ast.List):
            return [value_of(element) for element in item.elts]
        if isinstance(item, ast.Tuple):
            return tuple(value_of(element) for element in item.elts)
        try:
            return ast.literal_eval(item)
        except ValueError as error:
            raise ScheduleError(f"{where}: {ast.unparse(item)!r} is no name or literal") from error

    if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple):
        graph.output(value_of(statement.value))
        return
    if not (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
    ):
        raise ScheduleError(
            f"{where}: expected 'name = headinfer.op(...)', 'name = x[0]' or a return"
        )
    name, value = statement.targets[0].id, statement.value
    if name == NAMESPACE:
        raise ScheduleError(f"{where}: {NAMESPACE!r} is the name of the operators")
    if isinstance(value, ast.Subscript):
        args = (value_of(value.value), value_of(value.slice))
        names[name] = graph.create_node("call_function", operator.getitem, args, name=name)
        return
    opname = (
        ast.unparse(value.func).removeprefix("headinfer.") if isinstance(value, ast.Call) else ""
    )
    if not isinstance(value, ast.Call) or opname not in OPS or value.keywords:
        raise ScheduleError(
            f"{where}: {ast.unparse(value)!r} is no call of one of {', '.join(OPS)} by position"
        )
    target = getattr(torch.ops.headinfer, opname).default
    arguments = tuple(value_of(argument) for argument in value.args)
    expected = len(target._schema.arguments)
    if len(arguments) != expected:
        raise ScheduleError(f"{where}: {opname} takes {expected} arguments, {len(arguments)} given")
    names[name] = graph.create_node("call_function", target, arguments, name=name)
