"""What the site takes from the code: tables of operators and passes, and a report of the tool."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from headinfer_compile import explain
from headinfer_compile.known_models import known_config
from headinfer_compile.passes import pipeline
from headinfer_compile.runtime import ops

#: The report that ``how_it_works.md`` shows, made while the site is built.
REPORT = "explain_example.html"


def markdown_rows(text: str) -> tuple[list[list[str]], list[str]]:
    """The rows of the first Markdown table of ``text``, header first, and the lines around it."""
    rows, rest = [], []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not set("".join(cells)) <= set("-: "):
                rows.append(cells)
        else:
            rest.append(line)
    return rows, rest


def list_table(rows: Iterable[Sequence[str]], widths: str = "auto") -> list[str]:
    """A reStructuredText table of ``rows``, header first."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in rows:
        for index, cell in enumerate(row):
            lines.append(f"   {'* -' if index == 0 else '  -'} {cell}")
    return [*lines, ""]


def pipe_table(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ``rows``, header first."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body])


class OpsTable(SphinxDirective):
    """Every ``torch.ops.headinfer`` operator: stream, what it waits for, effect, schema."""

    def run(self) -> list[nodes.Node]:
        (header, *rows), _ = markdown_rows(inspect.getdoc(ops) or "")
        described = {row[0]: row for row in rows}
        missing = set(described) ^ set(ops.OPS)
        if missing:
            raise self.error(f"runtime/ops.py: its table and OPS differ in {sorted(missing)}")
        table = [[*header, "schema"]]
        for name, (schema, *_) in ops.OPS.items():
            table.append([f"`{name}`", *described[name][1:], f"`{schema}`"])
        return self.parse_text_to_nodes(pipe_table(table))


class PassesTable(SphinxDirective):
    """The passes in the order they run, with the reason for that order."""

    def run(self) -> list[nodes.Node]:
        table = [["pass", "runs", "what it does", "why here"]]
        groups = (("a Dynamo graph", pipeline.GRAPH_PASSES), ("a plan key", pipeline.PLAN_PASSES))
        for scope, passes in groups:
            for module, reason in passes:
                first = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
                name = module.__name__.rsplit(".", 1)[1]
                table.append([f"`{name}`", f"once for {scope}", first, reason])
        return self.parse_text_to_nodes(pipe_table(table))


class Report(SphinxDirective):
    """The page of ``explain``, in a frame, with a link to it."""

    def run(self) -> list[nodes.Node]:
        html = (
            f'<p><a href="{REPORT}">Open the report on a page of its own</a></p>'
            f'<iframe src="{REPORT}" title="report of explain" width="100%" height="900"></iframe>'
        )
        return [nodes.raw("", html, format="html")]


def _write_report(app: Sphinx, error: Exception | None) -> None:
    """Four layers of the shape of Llama-3-8B, on a machine with a link of 25 GB/s."""
    if error is None and app.builder.name == "html":
        config = known_config("llama-3-8b")
        assert config is not None
        config.num_hidden_layers, config.max_position_embeddings = 4, 1 << 17
        report = explain(config, context="32K", chunk="16K", link="25GB/s", tflops=165)
        report.save_html(Path(app.outdir) / REPORT)


def _tables_of_docstrings(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Markdown tables in docstrings, which read well in a terminal, become tables."""
    rows, _ = markdown_rows("\n".join(lines))
    if rows:
        at = next(index for index, line in enumerate(lines) if line.startswith("|"))
        kept = [line for line in lines if not line.startswith("|")]
        lines[:] = [*kept[:at], "", *list_table(rows), *kept[at:]]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("headinfer-ops", OpsTable)
    app.add_directive("headinfer-passes", PassesTable)
    app.add_directive("headinfer-report", Report)
    app.connect("build-finished", _write_report)
    app.connect("autodoc-process-docstring", _tables_of_docstrings)
    return {"parallel_read_safe": True}
