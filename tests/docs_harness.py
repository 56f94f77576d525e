"""Runs the code of a document: its fences, in order, as a reader would.

Languages of fences: ``python`` runs, and the blocks of a page share a namespace; ``console`` runs
what follows ``$ ``; none is for drawings and shapes, which are not code. A block that cannot run
here has this line above it, in sight of the reader::

    *Not run by the tests: REASON.*

with a REASON from ``REASONS``; its names, arguments and options are then checked against the
program. A line ``<!-- listing: NAME -->`` above a fence says that the tool made what is in it, and
the test of that name compares them.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from headinfer_compile import HeadInferConfig
from headinfer_compile.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
REASONS = {
    "needs a GPU",
    "needs a large model of the hub",
    "needs a GPU and a large model of the hub",
    "takes minutes",
}

#: Languages of blocks that do something.
RUNNABLE = ("python", "console")

_FENCE = re.compile(r"^(?P<tick>```+)(?P<lang>[^\n`]*)\n(?P<code>.*?)^(?P=tick)[ ]*$", re.M | re.S)
_MARK = re.compile(r"\*Not run by the tests: (?P<reason>[^*]+)\.\*\n*\Z")
_LISTING = re.compile(r"<!-- listing: (?P<name>[\w-]+) -->\n*\Z")


@dataclass(frozen=True)
class Block:
    """One fence of a page."""

    page: Path
    line: int
    """Of the first line of code, from 1."""
    lang: str
    code: str
    reason: str | None
    """Why it is not run; None if it is."""
    listing: str | None

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a ``console`` block, comments left out; else none."""
        if self.lang != "console":
            return []
        lines = self.code.replace("\\\n", " ").splitlines()
        return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def blocks_of(page: Path) -> list[Block]:
    """Every fence of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark, listing = _MARK.search(before), _LISTING.search(before)
        found.append(
            Block(
                page=page,
                line=before.count("\n") + 2,
                lang=fence["lang"].strip(),
                code=fence["code"],
                reason=mark["reason"].replace("\n", " ") if mark else None,
                listing=listing["name"] if listing else None,
            )
        )
    return found


def run_python(block: Block, scope: dict[str, Any]) -> None:
    """Run a block in the namespace of its page; a traceback names page and line."""
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(block.page), "exec"), scope)


def run_command(block: Block, words: list[str]) -> None:
    """Run one command of a page, or check it where running would install or take minutes."""
    program, *args = words
    if program == "headinfer" and block.reason is None:
        assert main(args) == 0, f"{block.name}: {' '.join(words)}"
    else:
        check_command(block, words)


def check_command(block: Block, words: list[str]) -> None:
    """Assert that the command names what exists: options, targets, extras, files."""
    program, *args = words
    where = f"{block.name}: {' '.join(words)}"
    if program == "headinfer":
        group: Any = typer.main.get_command(app)
        context = group.make_context(program, [], resilient_parsing=True)
        _, command, rest = group.resolve_command(context, list(args))
        assert command is not None, where
        command.make_context(args[0], rest, parent=context)
    elif program == "make":
        targets = [word for word in args if "=" not in word]
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert targets and set(targets) <= set(known), where
    elif program == "pip" or args[:2] == ["-m", "pip"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        section = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
        known = re.findall(r"^([\w-]+) = ", section, re.M)
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(args)):
            assert set(extras.split(",")) <= set(known), where
    elif program == "python":
        _check_script(where, args)
    else:
        assert program in (".ci/run", "git", "cd"), f"{where}: unknown program"


def _check_script(where: str, args: list[str]) -> None:
    if args[0] == "-m":
        path = ROOT / (args[1].replace(".", "/") + ".py")
        if args[1].split(".")[0] != "benchmarks":
            import_module(args[1])
            return
    else:
        path = ROOT / args[0]
    assert path.is_file(), f"{where}: there is no {path.relative_to(ROOT)}"
    source = path.read_text(encoding="utf-8")
    for shared in ("common.py", "example_model.py"):
        if (path.parent / shared).is_file():
            source += (path.parent / shared).read_text(encoding="utf-8")
    for word in args:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{where}: {path.name} takes no {word}"


def check_python(block: Block) -> None:
    """Compile a block; names it imports exist, and calls of them bind to their signatures."""
    tree = compile(block.code, block.name, "exec", ast.PyCF_ONLY_AST)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = import_module(node.module)
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in names:
            words = {word.arg: None for word in call.keywords if word.arg}
            try:
                inspect.signature(names[call.func.id]).bind(*call.args, **words)
            except TypeError as error:
                raise AssertionError(f"{block.name}: {call.func.id}: {error}") from error
        for word in call.keywords:
            if word.arg == "options" and isinstance(word.value, ast.Dict):
                HeadInferConfig.from_options(ast.literal_eval(word.value))


def relative_links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link and picture of a page that stays in the repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page and of what it includes, as GitHub and the site do."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^```\{include\} (\S+)$", text, re.M):
        text += (page.parent / name).read_text(encoding="utf-8")
    text = _FENCE.sub("", text)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def tokens_of(code: str) -> list[str]:
    """Tokens and comments of ``code``, whatever its line breaks: a formatter changes nothing."""
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type not in layout
    ]
    return [
        text
        for text, after in zip(found, [*found[1:], ""], strict=True)
        if not (text == "," and after == ")")
    ]


def tidy_graph(text: str) -> str:
    """``forward`` of a dumped model graph: no types, comments, aliases, deletions, submodules."""
    function = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    aliases: dict[str, str] = {}
    body: list[ast.stmt] = []
    for statement in function.body:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            statement = ast.Assign([statement.target], statement.value, lineno=0)
        value = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(value, ast.Name):  # Dynamo writes l_x_ = L_x_ for every input
            aliases[ast.unparse(statement).split(" = ")[0]] = value.id
        elif not isinstance(value, ast.Constant):  # x = None follows the last use of x
            body.append(statement)
    function.body = body
    for argument in function.args.args:
        argument.annotation = None
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = aliases.get(node.id, node.id)
    tidy = ast.unparse(function)
    for pattern, short in (
        (r"\b[lL]_(\w+?)_?\b", r"\1"),
        (r"\bself_modules_(\w+?)_parameters_(weight|bias)\b", r"\1_\2"),
        (r"\b(past_key_values|cache)_handle\b", "handle"),
        (r"\b(past_key_values|cache)_length\b", "past"),
        (r"_default\b", ""),
        (r"\btorch\.ops\.headinfer\.(\w+?)(\.default)?\(", r"headinfer.\1("),
        (r"\btorch\._C\._nn\.", "F."),
    ):
        tidy = re.sub(pattern, short, tidy)
    return tidy


def tidy_schedule(text: str) -> str:
    """A dumped schedule without its key, and with ``x[0]`` where it is used."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    tidy = "\n".join(lines).replace("_default", "")
    for name, item in re.findall(r"^ +(getitem\w*) = (\w+\[\d\])$", tidy, re.M):
        tidy = re.sub(rf"^ +{name} = .*\n", "", tidy, flags=re.M)
        tidy = re.sub(rf"\b{name}\b", item, tidy)
    return tidy


def lanes(text: str, width: int = 34) -> str:
    """A dumped schedule as three columns, one a stream: each op in its own, with what it awaits."""
    streams = ("compute", "h2d", "d2h")
    rows = ["".join(name.ljust(width) for name in streams).rstrip()]
    for line in tidy_schedule(text).splitlines():
        op = re.match(r" +(\w+) = headinfer\.\w+\(.*\)  # (\w+)(?:, after (\w+))?$", line)
        if op:
            name, stream, after = op.groups()
            cell = name if after is None else f"{name}  (after {after})"
            rows.append(" " * width * streams.index(stream) + cell)
    return "\n".join(rows)
