"""An ``Explanation`` as one page that needs no network: template, style, script and data in it."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import TYPE_CHECKING

from headinfer_compile.html_data import page_data

if TYPE_CHECKING:
    from headinfer_compile.explanation import Explanation

#: In the order they run; all of them share one scope.
_SCRIPTS = ("html_timeline.js", "html_page.js", "html_site.js")


def page(explanation: Explanation) -> str:
    """The page as text."""
    # Inside a script element only "</" and "<!--" mean anything.
    data = json.dumps(page_data(explanation), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(explanation.title),
        "css": _read("html_page.css"),
        "js": "\n".join(map(_read, _SCRIPTS)),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("html_page.html"))


def _read(name: str) -> str:
    return resources.files("headinfer_compile").joinpath(name).read_text(encoding="utf-8")
