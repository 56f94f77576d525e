"""``--models-report FILE``: the table of ``docs/models.md``, from what the tests found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROPERTY = "model_row"
_COLUMNS = ("family", "class", "attention", "heads", "dims", "sites", "masks", "tests")
_HEADER = (
    "Family", "Class", "Attention", "Hq / Hkv", "D / Dv", "What a site has", "Masks", "Tests",
)  # fmt: skip
_INTRODUCTION = """# Models

Written by `{command}`; do not edit.

Every row is a tiny random model (fp32, CPU) that passed this test: a prompt in chunks with an
uneven last one and 24 greedy tokens are equal to those of a resident `DynamicCache`, logits are
within 1e-4, every attention layer is a rewritten site, KV was streamed from host pages, no update
ran eagerly and no layer was materialised. Linear-attention layers keep their states as in
transformers. No code of this project knows any of these models: what sets an attention apart is a
property of its site.

{versions}.

"""


class ModelsReport:
    """Collects the rows of passed tests and the reasons of the others."""

    def __init__(self, path: Path, command: str, versions: dict[str, str]) -> None:
        self.path, self.command, self.versions = path, command, versions
        self.rows: dict[str, dict[str, Any]] = {}
        self.others: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, row in report.user_properties:
            if name == PROPERTY and isinstance(row, dict):
                if report.passed and report.when == "call":
                    self.rows[report.nodeid] = row
                elif not report.passed:
                    self.rows.pop(report.nodeid, None)
                    self.others[row["family"]] = f"{report.outcome} in {report.when}"

    def pytest_sessionfinish(self) -> None:
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        text = _INTRODUCTION.format(command=self.command, versions=versions)
        lines = [_line(_HEADER), _line(["---"] * len(_HEADER))]
        lines += [_line([str(row[name]) for name in _COLUMNS]) for row in self.rows.values()]
        text += "\n".join(lines) + "\n"
        if self.others:
            text += "\nNot covered:\n\n" + "".join(
                f"- {family}: {reason}\n" for family, reason in self.others.items()
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="ascii")


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
