"""Every code block of the documents runs, every link leads somewhere, every listing is the tool's.

``HEADINFER_ACCEPT=1`` writes the listings anew.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from docs_harness import (
    PAGES,
    REASONS,
    ROOT,
    RUNNABLE,
    Block,
    anchors,
    blocks_of,
    check_python,
    lanes,
    relative_links,
    run_command,
    run_python,
    tidy_graph,
    tidy_schedule,
    tokens_of,
)
from harness import clean_dynamo
from headinfer_compile import HeadInferCache, backend, explain
from headinfer_compile.cli_bench import CASES
from headinfer_compile.passes.lower import lower_regions

#: The model that the documents use; a folder of this name stands in for the hub.
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def page_name(page: Path) -> str:
    """The name of a page in test ids."""
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if any(block.lang in RUNNABLE for block in blocks_of(page))]


@pytest.fixture
def reader(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a tiny model under the name of the one in the documents."""
    shutil.copytree(tiny_checkpoint, tmp_path / MODEL)
    config = tmp_path / MODEL / "config.json"
    fewer = {**json.loads(config.read_text(encoding="utf-8")), "num_hidden_layers": 1}
    config.write_text(json.dumps(fewer), encoding="utf-8")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run_page(page: Path) -> None:
    """Run the blocks of a page in order, in one namespace."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        for words in block.commands:
            run_command(block, words)
        if block.lang == "python" and block.listing is None:
            if block.reason is None:
                run_python(block, scope)
            else:
                check_python(block)


@pytest.fixture(scope="module", autouse=True)
def dynamo() -> Iterator[None]:
    """One clean start for all pages: they use one model, so later ones find its graphs made."""
    with clean_dynamo():
        yield


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_the_code_of_a_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Regions run op by op here, to save minutes of Inductor; the slow test runs what is printed.
    lower = functools.partial(_lower_eagerly, lower_regions)
    monkeypatch.setattr(backend, "lower_regions", lower)
    run_page(page)


def _lower_eagerly(lower: Any, *args: Any, **kwargs: Any) -> Any:
    return lower(*args, **{**kwargs, "lowering": "eager"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/getting_started.md"])
def test_the_first_pages_run_with_inductor(name: str, reader: Path) -> None:
    with clean_dynamo():
        run_page(ROOT / name)


def test_fences_have_a_known_language_and_reason() -> None:
    for block in (block for page in PAGES for block in blocks_of(page)):
        known = block.lang in ("", *RUNNABLE) or block.lang.startswith("{")
        assert known or (block.lang == "text" and block.listing), block.name
        assert bool(block.commands) == (block.lang == "console"), block.name
        assert block.reason is None or block.reason in REASONS, block.name
        assert block.listing is None or block.listing in LISTINGS, block.name


def test_no_block_is_given_twice() -> None:
    seen: dict[str, Block] = {}
    for block in (block for page in PAGES for block in blocks_of(page)):
        if block.lang in RUNNABLE and block.listing is None:
            first = seen.setdefault(block.code.strip(), block)
            assert first is block, f"{block.name} is {first.name} again"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in relative_links(page):
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page_name(page)} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page_name(page)}: no heading #{anchor} in {path}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^([\w*[\]]+)$", index, re.M)
    for page in (ROOT / "docs").glob("*.md"):
        found = any(fnmatch.fnmatch(page.stem, entry) for entry in listed)
        assert found == (page.stem != "index"), page.name


def test_every_benchmark_is_in_its_readme() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.split("| case | question |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= {*CASES, "new_user"}


def result(name: str, row: str) -> dict[str, Any]:
    """One row of ``benchmarks/results``."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
    (found,) = (item for item in rows if item["id"] == row)
    assert isinstance(found, dict)
    return found


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    h100, h200 = "decode/nvidia-h100-80gb-hbm3/llama-32", "decode/nvidia-h200"
    prefill = "prefill/{}/llama-32/{}/n131072/c16384"
    streamed = result("decode", f"{h100}/headinfer:0/n131072")
    two_slots = result("decode", f"{h100}/headinfer:0:num_slots=2/n131072")
    small = result("decode", f"{h200}-24GiB/llama-32/headinfer:auto/n131072")
    rates = {
        (gpu, name): result("prefill", prefill.format(gpu, name))["tokens_per_s"]
        for gpu, names in {
            "nvidia-h100-80gb-hbm3": ("headinfer:0", "resident", "hf-offloaded"),
            "nvidia-h200": ("headinfer:0", "paper"),
        }.items()
        for name in names
    }
    shares = {
        share: result("three_way", f"three_way/nvidia-h100-80gb-hbm3/llama-32/n131072/q1/{share}")
        for share in ("auto", "off")
    }
    helped, alone = (shares[share]["step_ms"]["median"] for share in ("auto", "off"))
    step = {
        (name, tokens): result("decode", f"{h100}/{name}/n{tokens}")["step_ms"]["median"]
        for name in ("headinfer:auto", "headinfer:auto:cuda_graphs=true")
        for tokens in (8192, 32768)
    }
    lengths = {"8K": 8192, "128K": 131072, "512K": 524288}
    memory = "memory/nvidia-h100-80gb-hbm3/llama-32/headinfer:0/n{}/c16384"
    (fixed,) = {result("memory", memory.format(n))["allocated_bytes"] for n in lengths.values()}
    static = result("decode", f"{h100}/resident-compiled/n8192")["step_ms"]["median"]
    compiled = result("compile_time", "compile_time/cpu-x86-64-2-cores/smollm2-135m-all")
    bars = {bar: result("bars", bar)["measured"] for bar in ("B1a", "B1b", "B1c", "B3c", "B3d")}
    eager, graphs = "headinfer:auto", "headinfer:auto:cuda_graphs=true"
    h100_rates = {name: rate for (gpu, name), rate in rates.items() if "h100" in gpu}
    ours = h100_rates["headinfer:0"]
    ported = rates["nvidia-h200", "headinfer:0"] / rates["nvidia-h200", "paper"]
    assert min(streamed["of_link"], two_slots["of_link"]) > 0.995
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for figure in (
        f"{streamed['step_ms']['median']:.0f} ms per token: 100 % of the link",
        f"{small['step_ms']['median']:.0f} ms per token: {small['resident_bytes'] / 2**30:.1f} GiB",
        f"at {small['of_link']:.1%} of the link".replace("%", " %"),
        f"{step[graphs, 8192]:.1f} and {step[graphs, 32768]:.1f} ms per token",
        f"({step[eager, 8192]:.1f} and {step[eager, 32768]:.1f} without)",
        f"CUDA graphs at 8K: {static:.1f}",
        f"{fixed / 2**20:.0f} MiB at 8K, 128K and 512K tokens",
        f"{ours:,.0f} tokens/s: {ours / h100_rates['resident']:.2f} x the same model",
        f"{ported:.2f} x our port of HeadInfer's algorithm (H200)",
        f"{ours / h100_rates['hf-offloaded']:.2f} x transformers' offloaded",
        f"{helped:.0f} ms per token against {alone:.0f} over the link alone in the same run: "
        f"{alone / helped:.2f} x",
        f"{compiled['headinfer']['compile_s']:.0f} s against "
        f"{compiled['inductor']['compile_s']:.0f} s for plain",
        f"is missed ({max(bars['B3c'], bars['B3d']):.1f} x)",
        f"is missed too ({bars['B1b']:.2f} x",
    ):
        assert figure in text, f"README.md: the results say {figure!r}"


class Attention(torch.nn.Module):
    """The attention whose graphs the README shows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 64, bias=False)
        self.out = torch.nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor, past_key_values: HeadInferCache) -> torch.Tensor:
        """From ``x [B, n, 16]``, 4 query heads over 2 KV heads of 8, back to ``[B, n, 16]``."""
        heads = self.qkv(x).view(*x.shape[:2], 8, 8).transpose(1, 2)
        q, k, v = heads.split([4, 2, 2], dim=1)
        k, v = past_key_values.update(k, v, 0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.fixture(scope="module")
def listings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the tool makes of ``Attention`` in a decode step over two KV blocks in host memory."""
    folder = tmp_path_factory.mktemp("dump")
    cache = HeadInferCache.from_shape(
        num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float32,
        page_tokens=16, tail_tokens=8, gpu_budget=0,
    )  # fmt: skip
    with cache, torch.no_grad():
        cache.update(torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8), 0)
        explain(
            Attention(),
            torch.randn(1, 1, 16),
            past_key_values=cache,
            options={"lowering": "eager", "num_slots": 2, "debug_dir": str(folder)},
        )
    dumps = {path.stem[4:]: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return {name: tidy(dumps[dump]) for name, (dump, tidy) in LISTINGS.items()}


#: Name of each listing: the dump it comes from, and how it is shortened.
LISTINGS = {
    "graph-before": ("dynamo", tidy_graph),
    "graph-after": ("partition", tidy_graph),
    "schedule": ("schedule", tidy_schedule),
    "lanes": ("schedule", lanes),
}


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks_of(page) if block.listing],
    ids=lambda block: f"{block.page.stem}-{block.listing}",
)
def test_a_listing_is_what_the_tool_makes(block: Block, listings: dict[str, str]) -> None:
    made = listings[block.listing or ""].strip() + "\n"
    if block.code == made:
        return
    if os.environ.get("HEADINFER_ACCEPT"):
        text = block.page.read_text(encoding="utf-8")
        fence = re.compile(
            rf"(<!-- listing: {block.listing} -->\n+```\w+\n).*?(^```$)", re.M | re.S
        )
        text = fence.sub(lambda match: match[1] + made + match[2], text)
        block.page.write_text(text, encoding="utf-8")
    else:
        same = block.lang == "python" and tokens_of(block.code) == tokens_of(made)
        assert same, f"{block.name}: HEADINFER_ACCEPT=1 writes it anew:\n{made}"


def test_the_check_of_the_site_finds_faults(tmp_path: Path) -> None:
    check = ROOT / "docs" / "check_site.py"
    page = tmp_path / "index.html"
    good = '<h1 id="top">x</h1><a href="index.html#top">y</a><a href="https://example.org">z</a>'
    page.write_text(good, encoding="utf-8")
    command = [sys.executable, str(check), str(tmp_path)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    for fault in (
        '<a href="gone.html">x</a>',
        '<a href="#gone">x</a>',
        '<img src="gone.png">',
        '<script src="https://example.org/x.js"></script>',
    ):
        page.write_text(good + fault, encoding="utf-8")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 1, fault
        assert done.stdout.startswith("index.html: ")
