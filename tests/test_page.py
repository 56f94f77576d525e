"""The page of ``explain``: what it holds, and what it does in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness import clean_dynamo, tiny_llama
from headinfer_compile import Explanation, explain
from headinfer_compile.html_data import page_data
from headinfer_compile.html_page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LAYERS = 4


@pytest.fixture(scope="module")
def explanation(run_seed: int) -> Explanation:
    """Layers over several KV blocks in two slots, with two transfers a site."""
    config = tiny_llama(run_seed, layers=LAYERS).config
    with clean_dynamo():
        return explain(
            config, context=100, chunk=32, page_tokens=16, tail_tokens=8,
            options={"head_group": 3, "num_slots": 3},
        )  # fmt: skip


@pytest.fixture(scope="module")
def path(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    explanation.save_html(path)
    return path


class _Links(HTMLParser):
    """Collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href", "action")]


def test_the_page_needs_nothing_else(path: Path, explanation: Explanation) -> None:
    text = path.read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert links.found == ["data:,", "#site"]
    parts = re.split(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.S)
    before, embedded, after = parts
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", before + after)
    assert not re.search(r"\{\{\w+\}\}", before + after)
    assert json.loads(embedded) == json.loads(json.dumps(page_data(explanation)))
    assert "<" not in embedded


def test_text_of_a_model_cannot_break_the_page(
    explanation: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = "</script><b>{{js}}"
    data = {"title": title, "graphs": []}
    monkeypatch.setattr("headinfer_compile.html_page.page_data", lambda _: data)
    text = page(type("Stub", (), {"title": title})())
    assert "<b>" not in text.replace("<b>page", "")
    assert "&lt;/script&gt;&lt;b&gt;{{js}}" in text
    assert "\\u003c/script>" in text


def removed(entry: Any) -> list[str]:
    """The lines that a pass has taken out."""
    return [line for hunk in entry["hunks"] for tag, line in hunk["lines"] if tag == "-"]


def test_every_pass_has_its_diff(explanation: Explanation) -> None:
    graph = page_data(explanation)["graphs"][1]
    passes = {entry["name"]: entry for entry in graph["passes"]}
    found = passes["find_attention"]["hunks"]
    sites = [h for h in found if any("headinfer.attention" in line for _, line in h["lines"])]
    assert sum(hunk["times"] for hunk in sites) == LAYERS
    for hunk in sites:
        tags = {tag for tag, line in hunk["lines"] if " = torch._C._nn.scaled" in line}
        assert tags == {"-"}
    masks = [
        line for h in passes["recover_mask"]["hunks"] for tag, line in h["lines"] if tag == "-"
    ]
    assert any("kv_indices <= q_indices" in line for line in masks)
    # What partition only moves is no change.
    moved = removed(passes["partition"])
    assert not [line for line in moved if "torch.nn.functional.linear" in line]
    schedule = graph["step"]["schedules"][0]
    for entry in schedule["passes"]:
        assert entry["hunks"], entry["name"]
    hoisted = schedule["passes"][-1]["hunks"]
    assert {"+", "-"} <= {tag for h in hoisted for tag, line in h["lines"] if "prefetch" in line}
    assert all(graph["code"].values()) and len(graph["code"]) == graph["unique"]


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def desktop(browser: Any, path: Path) -> Iterator[Any]:
    yield from opened(browser, path, width=1280, height=900, scheme="light")


@pytest.fixture
def phone(browser: Any, path: Path) -> Iterator[Any]:
    yield from opened(browser, path, width=390, height=844, scheme="dark")


def opened(browser: Any, path: Path, width: int, height: int, scheme: str) -> Iterator[Any]:
    """The page, without a network; at the end it has logged no error."""
    errors: list[str] = []
    add: Callable[[str], Any] = errors.append
    view = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    view.context.set_offline(True)
    view.set_default_timeout(5000)
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("console", lambda message: errors.append(message.text))
    view.on("request", lambda asked: asked.url.startswith("file:") or add(asked.url))
    view.goto(path.as_uri())
    yield view
    view.close()
    assert not errors


def texts(view: Any, selector: str) -> list[str]:
    return [text.strip() for text in view.locator(selector).all_inner_texts()]


def test_the_questions_of_someone_who_knows_fx(desktop: Any, explanation: Explanation) -> None:
    """Streams and events of slot 1 in layer 3, bytes of the step, and another head group."""
    step = explanation.graphs[2].step
    assert step is not None
    desktop.get_by_role("tab", name="decode").click()
    cards = " ".join(texts(desktop, "#summary .card"))
    assert f"to the device: {step.h2d_bytes:,} bytes" in cards
    assert f"to the host: {step.d2h_bytes:,} bytes" in cards
    desktop.locator("#graph summary").first.evaluate("node => node.parentElement.open = true")
    desktop.locator('#graph button[data-call="site_3"]').click()
    assert texts(desktop, "#site h2") == ["Layer 3"]
    desktop.get_by_role("button", name="slot 1").click()
    assert texts(desktop, "#slot h3") == ["Slot 1 in layer 3: touched by compute and h2d"]
    rows = texts(desktop, "#slot tbody tr")
    (site,) = (site for site in step.sites if site.layer == 3)
    ops = step.schedules[site.schedule].ops
    touching = [op for op in ops if op.slot is not None and (site.base + op.slot) % 3 == 1]
    assert touching
    for op in touching:
        (row,) = [row for row in rows if re.search(rf"\t{op.name}\t", row)]
        assert op.stream in row
        for edge in op.after:
            assert edge.event in row
            assert edge.op in row
    options = texts(desktop, "#choices tbody tr")
    (other,) = [row for row in options if row.startswith("head_group=2")]
    choice = next(choice for choice in step.choices if choice.head_group == 2)
    assert f"\t{choice.transfers:,}\t" in other
    assert "this plan" in next(row for row in options if row.startswith("head_group=3"))
    assert step.reasons["head_group.decode"] in texts(desktop, "#choices .note")[0]


def test_an_op_shows_what_it_touches(desktop: Any, explanation: Explanation) -> None:
    step = explanation.graphs[2].step
    assert step is not None
    ops = step.schedules[0].ops
    index, op = next((i, op) for i, op in enumerate(ops) if op.op == "prefetch")
    desktop.locator(f'#code [data-op="{index}"]').hover()
    detail = texts(desktop, "#detail")[0]
    for words in (
        op.name,
        op.what,
        f"{op.link_bytes:,} bytes",
        "ring slot",
        "token block",
        "slot.freed",
    ):
        assert words in detail, words
    assert desktop.locator("#lanes .edge.out").count() == len(
        [other for other in ops if any(edge.op == op.name for edge in other.after)]
    )
    bar = desktop.locator(f'#lanes [data-op="{index}"]')
    assert "on" in bar.get_attribute("class").split()
    # Leaving it shows nothing again, a click keeps it.
    desktop.mouse.move(1, 1)
    assert "Point at an op" in texts(desktop, "#detail")[0]
    desktop.locator(f'#code [data-op="{index}"]').click()
    desktop.mouse.move(1, 1)
    assert op.name in texts(desktop, "#detail")[0]


def test_bars_are_to_scale(desktop: Any, explanation: Explanation) -> None:
    step = explanation.graphs[1].step
    assert step is not None
    desktop.get_by_role("tab", name="later chunk").click()
    times = step.prediction.sites[0].ops[-len(step.schedules[0].ops) :]
    widths = {
        int(bar.get_attribute("data-op")): float(bar.get_attribute("width"))
        for bar in desktop.locator("#lanes [data-op]").all()
    }
    wide = {i: width for i, width in widths.items() if width > 4}
    assert len(wide) > 3
    scales = [wide[i] / (times[i].end - times[i].start) for i in wide]
    assert max(scales) == pytest.approx(min(scales), rel=0.02)


def test_keys_alone_are_enough(desktop: Any) -> None:
    def key(name: str) -> None:
        desktop.keyboard.press(name)

    key("Tab")
    assert desktop.evaluate("document.activeElement.className") == "skip"
    key("Tab")
    key("Tab")
    assert desktop.evaluate("document.activeElement.id") == "tab-2"
    key("ArrowLeft")
    assert desktop.evaluate("document.activeElement.id") == "tab-1"
    assert desktop.get_by_role("tab", name="later chunk").get_attribute("aria-selected") == "true"
    key("Tab")
    key("ArrowRight")
    assert texts(desktop, "#site h2") == ["Layer 1"]
    desktop.locator("#graph button").first.focus()
    key("Enter")
    assert texts(desktop, "#site h2") == ["region_0"]
    assert "def forward" in texts(desktop, "#site .code")[0]
    key("ArrowDown")
    assert desktop.evaluate("document.activeElement.tagName") == "SUMMARY"
    key("ArrowDown")
    key("Enter")
    assert texts(desktop, "#site h2") == ["Layer 0"]
    desktop.locator("#lanes").focus()
    for _ in range(3):
        key("ArrowRight")
    assert desktop.locator('#code [aria-selected="true"]').get_attribute("data-op") == "2"
    key("End")
    selected = desktop.locator('#code [aria-selected="true"]')
    box, line = desktop.locator("#code").bounding_box(), selected.bounding_box()
    assert box["y"] <= line["y"] and line["y"] + line["height"] <= box["y"] + box["height"] + 1
    key("Escape")
    assert desktop.locator('#code [aria-selected="true"]').count() == 0


@pytest.mark.parametrize("view", ["desktop", "phone"])
def test_light_and_dark_at_any_width(view: str, request: pytest.FixtureRequest) -> None:
    shown = request.getfixturevalue(view)

    def back() -> str:
        return str(shown.evaluate("getComputedStyle(document.body).backgroundColor"))

    first = back()
    assert first == ("rgb(255, 255, 255)" if view == "desktop" else "rgb(18, 21, 28)")
    shown.locator("#theme").click()
    assert back() != first
    for details in shown.locator("#passes details").all():
        details.evaluate("node => node.open = true")
    width = shown.viewport_size["width"]
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
