"""What a pass changed, as hunks of a diff for people: short names, and like hunks told once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from headinfer_compile.passes.pipeline import PassReport

_CONTEXT = 2
_MAX_LINE = 400
_MAX_HUNKS = 30
_MAX_HUNK_LINES = 240


@dataclass
class Hunk:
    """Changed lines with their surroundings."""

    lines: list[tuple[str, str]]
    """``+``, ``-`` or a blank, and the line."""
    times: int = 1
    """How many hunks are alike but for numbers; the others are left out."""

    @property
    def pattern(self) -> str:
        """The hunk with every number blotted out."""
        return re.sub(r"\d+", "#", "\n".join(tag + line for tag, line in self.lines))


@dataclass(frozen=True)
class PassDiff:
    """The change that a pass made to the text of its graph."""

    hunks: tuple[Hunk, ...]
    left_out: int
    """Hunks that are not among them and like none of them."""


def short_code(text: str) -> list[str]:
    """The lines of a printed graph with parameters by their path and files by their package."""
    lines = []
    for line in text.splitlines():
        line = re.sub(
            r"\b[lL]_self_modules_(\w+?)_(?:parameters|buffers)_(\w+?)_\b",
            lambda match: f"{match[1].replace('_modules_', '.')}.{match[2]}",
            line,
        )
        line = re.sub(r"# File: \S*site-packages/", "# File: ", line)
        name, equals, value = line.strip().partition(" = ")
        if (equals and name.lower() == value.lower()) or "No stacktrace found" in line:
            continue  # an input under its second name
        if len(line) > _MAX_LINE:
            line = f"{line[:_MAX_LINE]} ... ({len(line) - _MAX_LINE} more characters)"
        lines.append(line)
    return lines


def pass_diff(report: PassReport) -> PassDiff:
    """The hunks of one pass; lines that only moved into a submodule count as unchanged."""
    before, after = (
        [line for line in short_code(text) if line.strip() and not line.startswith("# ")]
        for text in (report.before, report.text)
    )
    alike: dict[str, Hunk] = {}
    for hunk in _hunks(before, after):
        first = alike.setdefault(hunk.pattern, hunk)
        first.times += first is not hunk
    hunks = list(alike.values())
    return PassDiff(tuple(hunks[:_MAX_HUNKS]), max(0, len(hunks) - _MAX_HUNKS))


def _hunks(before: list[str], after: list[str]) -> Iterator[Hunk]:
    matcher = difflib.SequenceMatcher(
        None, [line.strip() for line in before], [line.strip() for line in after], autojunk=False
    )
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        lines: list[tuple[str, str]] = []
        for tag, low, high, start, stop in group:
            if tag == "equal":
                lines += [(" ", line) for line in after[start:stop]]
                continue
            lines += [("-", line) for line in before[low:high]]
            lines += [("+", line) for line in after[start:stop]]
        if len(lines) > _MAX_HUNK_LINES:
            left = len(lines) - _MAX_HUNK_LINES
            lines = [*lines[:_MAX_HUNK_LINES], (" ", f"... {left} more lines")]
        yield Hunk(lines)


def region_code(report: PassReport) -> dict[str, str]:
    """The code of every region, by name, from the report of ``partition``."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in short_code(report.text):
        match = re.match(r"    class (region_\d+)\(", line)
        if match:
            current = found.setdefault(match[1], [])
        elif current is not None:
            current.append(line.removeprefix("        "))
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}
