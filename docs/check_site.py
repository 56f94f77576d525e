"""Checks the built site: every link inside it leads somewhere, and nothing is loaded from outside.

``python docs/check_site.py FOLDER`` exits with 1 and names each fault.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Elements that a browser fetches by itself, with the attribute that says from where.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The anchors and references of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the element is called and what it points to."""
        found = {name: value or "" for name, value in attrs}
        self.ids.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if LOADED.get(tag) in found:
            self.loads.append(found[LOADED[tag]])


def faults(root: Path) -> list[str]:
    """Every fault of the site in ``root``, as ``page: what``."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(root.resolve())
        for target in page.loads:
            if urlsplit(target).netloc:
                wrong.append(f"{name}: loads {target}")
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not goal.exists():
                wrong.append(f"{name}: {target}: there is no {goal.name}")
            elif (
                parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].ids
            ):
                wrong.append(f"{name}: {target}: there is no such anchor")
    if not pages:
        wrong.append(f"{root}: holds no page")
    return wrong


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]))
    print("\n".join(found) or "links: all lead somewhere, nothing is loaded from outside")
    sys.exit(bool(found))
