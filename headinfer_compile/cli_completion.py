"""``headinfer completion``: a script for the shell that completes without starting Python."""

from __future__ import annotations

import inspect
import shlex
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from headinfer_compile.cli_bench import CASES
from headinfer_compile.known_models import KNOWN_MODELS


class Shell(str, Enum):
    """Shells that a script is made for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


#: What may stand first after a command, besides files.
_FIRST_WORDS: dict[str, Sequence[str]] = {
    "bench": tuple(CASES),
    "completion": tuple(shell.value for shell in Shell),
    "explain": KNOWN_MODELS,
    "plan": KNOWN_MODELS,
}


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="The shell that reads the script.")],
) -> None:
    """Print a script that completes commands, options, choices and files.

    Example, in ~/.bashrc or ~/.zshrc: source <(headinfer completion bash)

    Example, for fish: headinfer completion fish > ~/.config/fish/completions/headinfer.fish
    """
    root = context.find_root().command
    assert isinstance(root, TyperGroup)
    print("\n".join(fish_lines(root) if shell is Shell.fish else bash_lines(root, shell)))


def _commands(root: TyperGroup) -> list[tuple[str, Any]]:
    return sorted(root.commands.items())


def _options(command: Any) -> Iterator[TyperOption]:
    for parameter in command.params:
        if isinstance(parameter, TyperOption) and not parameter.hidden:
            yield parameter


def _names(command: Any) -> list[str]:
    """Options of a command, with ``--help``, which belongs to all."""
    found = ["--help"]
    for option in _options(command):
        found += [*option.opts, *option.secondary_opts]
    return found


def _choices(command: Any, option: TyperOption) -> list[str]:
    """The words that an option may take, where the function says so by an ``Enum``."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    kind = hints.get(option.name or "")
    if not isinstance(kind, type) or not issubclass(kind, Enum):
        return []
    return [str(member.value) for member in kind]


def bash_lines(root: TyperGroup, shell: Shell) -> Iterator[str]:
    """The script for bash; zsh reads the same after a preamble."""
    if shell is Shell.zsh:
        yield "autoload -U +X compinit && compinit"
        yield "autoload -U +X bashcompinit && bashcompinit"
    commands = _commands(root)
    yield "_headinfer() {"
    yield '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words'
    yield "  COMPREPLY=()"
    yield '  if [ "$COMP_CWORD" -eq 1 ]; then'
    first = shlex.quote(" ".join([*(name for name, _ in commands), *_names(root)]))
    yield f'    COMPREPLY=($(compgen -W {first} -- "$word")); return'
    yield "  fi"
    yield '  case "${COMP_WORDS[1]} $COMP_CWORD" in'
    for name, found in _FIRST_WORDS.items():
        quoted = shlex.quote(" ".join(found))
        yield f'    "{name} 2") COMPREPLY=($(compgen -W {quoted} -- "$word"));;'
    yield "  esac"
    yield '  case "${COMP_WORDS[1]} $before" in'
    for name, command in commands:
        for option in _options(command):
            if words := _choices(command, option):
                patterns = "|".join(f'"{name} {text}"' for text in option.opts)
                quoted = shlex.quote(" ".join(words))
                yield f'    {patterns}) COMPREPLY=($(compgen -W {quoted} -- "$word")); return;;'
    yield "  esac"
    yield '  case "${COMP_WORDS[1]}" in'
    for name, command in commands:
        yield f"    {name}) words={shlex.quote(' '.join(_names(command)))};;"
    yield "  esac"
    yield '  case "$word" in -*) COMPREPLY=($(compgen -W "$words" -- "$word"));; esac'
    yield "}"
    # Where nothing fits, the shell completes file names.
    yield "complete -o default -F _headinfer headinfer"


def fish_lines(root: TyperGroup) -> Iterator[str]:
    """The script for fish."""
    for name, command in _commands(root):
        about = shlex.quote(command.get_short_help_str(80))
        yield f"complete -c headinfer -n __fish_use_subcommand -f -a {name} -d {about}"
        for word in _FIRST_WORDS.get(name, ()):
            yield f"complete -c headinfer -n '__fish_seen_subcommand_from {name}' -a {word}"
        where = f"-n '__fish_seen_subcommand_from {name}'"
        for option in _options(command):
            for text in (*option.opts, *option.secondary_opts):
                flag = f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}"
                parts = [f"complete -c headinfer {where} {flag}"]
                if words := _choices(command, option):
                    parts.append(f"-x -a {shlex.quote(' '.join(words))}")
                elif not option.is_flag:
                    parts.append("-r")
                yield " ".join([*parts, f"-d {shlex.quote(option.help or '')}"])
