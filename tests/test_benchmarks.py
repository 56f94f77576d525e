"""The benchmarks run, on shapes for seconds of CPU, and what they compare computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bars,
    compile_time,
    decode,
    memory,
    needle,
    prefill,
    proof,
    roofline,
    startup,
    timeline,
)
from benchmarks.attention import is_bottom_right, split_attend
from benchmarks.common import format_tokens, in_turns, parse_tokens, read_rows, summary, write_rows
from benchmarks.models import build, shape_of
from benchmarks.synthetic import fill_headinfer
from benchmarks.variants import Variants
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.cli import main
from headinfer_compile.runtime import kernels

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"gpu_budget": 0, "page_tokens": 64, "tail_tokens": 16}
pytestmark = pytest.mark.usefixtures("one_thread")
EAGER = ["--lowering", "eager", "--device", "cpu", "--model", "tiny"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Kernels of microseconds take longer on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tokens_are_parsed_and_printed() -> None:
    for text, count in (("96", 96), ("32K", 32768), ("1m", 1 << 20)):
        assert parse_tokens(text) == count
    assert [format_tokens(n) for n in (96, 32768, 1 << 20, 1 << 21)] == ["96", "32K", "1M", "2M"]
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": 1.0, "p90": 3.0, "count": 3}


def test_every_other_round_goes_backwards() -> None:
    found = [(turn, item) for turn, item in in_turns("abc", 3)]
    assert found == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a"), (2, "a"),
                     (2, "b"), (2, "c")]  # fmt: skip


def test_rows_are_merged_by_id(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [{"id": "b", "x": 1}, {"id": "a", "x": 2}])
    write_rows(path, [{"id": "b", "x": 3}])
    assert read_rows(path) == [{"id": "a", "x": 2}, {"id": "b", "x": 3}]


def test_split_attention_is_causal_at_the_bottom_right(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, 5), (2, 12), (2, 12)))
    visible = torch.ones(5, 12, dtype=torch.bool).tril(7)
    right = kernels.math(q, k, v, scale=0.25, causal=False, mask=visible)[0]
    torch.testing.assert_close(split_attend(kernels.cpu_flash, q, k, v, 0.25), right)
    assert not is_bottom_right(kernels.cpu_flash, CPU, torch.float32)


def test_prefill_of_all_variants_agrees(tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    ours = "headinfer:0:page_tokens=32:tail_tokens=8"
    names = ["resident", "resident-compiled", "hf-offloaded", "paper", ours, "headinfer:1GiB"]
    # Past and new tokens, and an uneven last chunk.
    args = ["--context", "200", "--chunk", "96", "--rounds", "1", "--out", str(out)]
    rows = {row["variant"]: row for row in prefill.main([*EAGER, *args, "--variants", *names])}
    assert set(names) - set(rows) == {"hf-offloaded"}, "which needs CUDA"
    for name, row in rows.items():
        assert row["logits_error"] < 1e-4, name
        assert row["tokens_per_s"] > 0 and not row["cold"]
    assert rows[ours]["details"]["host_bytes"] > 0
    assert rows[ours]["details"]["eager_updates"] == 0
    assert rows["headinfer:1GiB"]["details"]["host_bytes"] == 0
    assert {row["id"] for row in json.loads(out.read_text())} == {
        row["id"] for row in rows.values()
    }


@pytest.mark.parametrize("synthetic", [True, False])
def test_decode_counts_what_is_streamed(tmp_path: Path, synthetic: bool) -> None:
    ours = "headinfer:0:page_tokens=32:tail_tokens=8"
    args = ["--context", "160", "--chunk", "80", "--steps", "3", "--rounds", "2"]
    args += ["--variants", "resident", "paper", ours, "--out", str(tmp_path / "decode.json")]
    rows = decode.main([*EAGER, *args, *(["--synthetic"] if synthetic else [])])
    by_name = {row["variant"]: row for row in rows}
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert by_name["resident"]["streamed_bytes"] == 0
    for name in ("paper", ours):
        assert by_name[name]["step_ms"]["count"] == 6
        # At most the tail is not in host pages, and what was counted is what was planned.
        streamed = by_name[name]["streamed_bytes"]
        assert 160 * token_bytes <= streamed <= 190 * token_bytes
        assert by_name[name]["moved_bytes"] == pytest.approx(streamed, rel=0.1)


def test_synthetic_pages_are_attended(seed: int) -> None:
    torch.manual_seed(seed)
    variant = Variants(build("tiny", CPU)).make("headinfer:0:page_tokens=64", lowering="eager")
    token = torch.ones((1, 1), dtype=torch.long)
    with torch.no_grad(), variant.active():
        variant.open(500)
        variant.fill(300, 100)
        assert variant.cache.get_seq_length() == 300
        first = variant.decode(token)
        variant.cache.crop(-1)
        fill_headinfer(variant.cache, 301)
        variant.cache.crop(-1)
        second = variant.decode(token)
    # Other random pages give other logits: the pages are what was read.
    assert torch.isfinite(first).all() and not torch.allclose(first, second, atol=1e-3)
    variant.close()


def test_shape_counts(seed: int) -> None:
    model = build("tiny", CPU)
    shape = shape_of(model)
    assert shape.kv_token_bytes == 2 * 2 * 2 * 16 * 4
    total = sum(p.nbytes for p in model.parameters())
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert shape.weight_bytes == total - embedding.nbytes
    matrices, attention = shape.prefill_flops(100, 50)
    assert attention == 2 * sum(2 * 4 * 16 * (row + 1) for row in range(100)) * shape.layers
    assert matrices == 2 * shape.matmul_elements * 100 + 2 * 2 * shape.head_elements


def test_fixed_bytes_do_not_grow(tmp_path: Path) -> None:
    args = ["--context", "256", "512", "1024", "--out", str(tmp_path / "memory.json")]
    rows = memory.main([*EAGER, *args])
    assert [row["synthetic"] for row in rows] == [False, True, True]
    assert len({row["fixed_bytes"] for row in rows}) == 1 and rows[0]["fixed_bytes"] > 0


def test_startup_timeline_and_roofline(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "rows.json")]
    launch, prompt = startup.main([*EAGER, *out, "--rounds", "1"])
    assert launch["longest_gap_ms"] > 0 and prompt["new_pages_s"]["count"] == 1
    (row,) = timeline.main([*EAGER, *out])
    assert any(span["name"].startswith("headinfer::") for span in row["spans"])
    roofline.main(["--device", "cpu", "--model", "tiny", *out])
    assert len(read_rows(tmp_path / "rows.json")) == 4


@pytest.fixture(scope="module")
def needle_model() -> Any:
    model = needle.build_model(CPU, torch.float32, 0)
    model.compile(backend=headinfer, options={"lowering": "eager"})
    return model


def test_needle_recalls_every_pair(needle_model: Any, seed: int) -> None:
    haystack = needle.plant(600, 9, seed, each=3)
    with HeadInferCache(needle_model.config, **SMALL) as cache:
        right = needle.ask(needle_model, cache, haystack, 200)[1]
        stats = cache.stats()
    assert right == [True] * 27
    assert stats.h2d_bytes > 0 and stats.resident_bytes == 0 and stats.eager_updates == 0


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["k", "v"])
def test_needle_notices_lost_rows(needle_model: Any, seed: int, layer: int, part: str) -> None:
    haystack = needle.plant(600, 9, seed, each=3)
    with torch.no_grad(), HeadInferCache(needle_model.config, **SMALL) as cache:
        # One KV head of one page is lost before the second half of the text is read.
        needle_model(haystack.ids[:, :300], past_key_values=cache)
        page = cache.session.table.blocks[1].pages[layer][part == "v"]
        lost = range(64, 128)
        page[1].zero_()
        rest = needle.Haystack(haystack.ids[:, 300:], haystack.depths, haystack.pairs)
        right = needle.ask(needle_model, cache, rest, 300)[1]
    planted = [int((haystack.ids[0] == key).nonzero()[0]) for key, _ in haystack.pairs]
    hit = [at + 1 in lost for at in planted]
    assert any(hit)
    # Layer 0 has read these rows before they were lost, and is asked only for the newest.
    expected = [not (miss and layer == 1) for miss in hit]
    assert right == expected


def _decode_row(variant: str, ms: float, device: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"{variant}/{ms}", "case": "decode", "variant": variant, "context": 131072,
        "model": "llama", "layers": 32, "gpu_memory": None, "device": device, "of_link": 0.98,
        "link_gb_s": 54.0, "queued_of_link": 0.99, "synthetic": True, "versions": {},
        "date": "2026-01-01", "command": "c", "step_ms": {"median": ms},
        "roofline": {"h2d_gb_s": 55.0}, **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "holds"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", False)]
)
def test_bars_hold_on_their_device_only(tmp_path: Path, device: str, holds: bool) -> None:
    rows = [_decode_row("headinfer:0", 300.0, device), _decode_row("hf-offloaded", 1500.0, device)]
    write_rows(tmp_path / "decode.json", rows)
    made = bars.main(["--results", str(tmp_path), "--out", str(tmp_path / "bars.json")])
    by_id = {row["id"]: row for row in made}
    wanted = {"id", "question", "measured", "bar", "op", "unit", "holds", "device", "versions",
              "date", "command", "note"}  # fmt: skip
    assert all(set(row) == wanted for row in made) and len(by_id) == len(bars.BARS)
    assert by_id["B2a"]["holds"] is holds and by_id["B2a"]["measured"] == 0.98
    assert by_id["B2c"]["holds"] is holds and by_id["B2c"]["measured"] == 5.0
    assert ("measured on" in by_id["B2a"]["note"]) is not holds
    assert by_id["B2b"]["holds"] is None and by_id["B2b"]["note"].startswith("not run")


def test_a_missed_bar_does_not_hold(tmp_path: Path) -> None:
    write_rows(tmp_path / "decode.json", [_decode_row("headinfer:0", 300.0, "H100", of_link=0.9)])
    causes = tmp_path / "causes.json"
    causes.write_text('{"B2a": "a slow link"}')
    command = ["--results", str(tmp_path), "--out", str(tmp_path / "bars.json")]
    row = next(row for row in bars.main(command) if row["id"] == "B2a")
    assert row["holds"] is False and row["note"].endswith(". a slow link")
    causes.write_text('{"B77": "a slow link"}')
    with pytest.raises(SystemExit, match="no bar is called B77"):
        bars.main(command)


def test_pictures(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    rows = [
        _decode_row("headinfer:0", 300.0, "x", roofline_ms=290.0, id="a"),
        _decode_row("headinfer:0", 600.0, "x", roofline_ms=580.0, id="b", context=262144),
    ]
    for row in rows:
        row["step_ms"] |= {"p10": 290.0, "p90": 620.0}
    write_rows(tmp_path / "decode.json", rows)
    made = plots.main(["--results", str(tmp_path), "--out", str(tmp_path)])
    assert [path.name for path in made] == ["decode.png"] and made[0].stat().st_size > 1000


def test_the_command_runs_a_case(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert main(["bench", "roofline", "--device", "cpu", "--model", "tiny", "--out", str(out)]) == 0
    assert read_rows(out)[0]["roofline"]["dram_gb_s"] > 0
    assert main(["bench"]) == 0 and "needle" in capfd.readouterr().out
    assert main(["bench", "no-such-case"]) == 2
    assert "prefill, decode" in capfd.readouterr().err


def test_proof_is_a_share_of_the_measured_prefill(tmp_path: Path) -> None:
    measured = {
        "id": "gpu", "variant": "headinfer:0", "device": "NVIDIA", "gpu_memory": None,
        "model": "llama", "layers": 2, "context": 40_000, "chunk": 9_000,
        "seconds": {"median": 10.0},
    }  # fmt: skip
    write_rows(tmp_path / "prefill.json", [measured, measured | {"id": "other", "chunk": 1}])
    args = ["--model", "tiny", "--context", "40000", "--chunk", "9000", "--rounds", "2"]
    args += ["--prefill", str(tmp_path / "prefill.json"), "--out", str(tmp_path / "proof.json")]
    (row,) = proof.main(args)
    assert row["prefill"] == "gpu"
    assert row["share"] == pytest.approx(row["proof_s"] / 10, abs=1e-6) and row["share"] <= 0.02
    # The first chunk has no past, and a last layer starts no transfer for another.
    assert row["keys"] >= 3 and row["prologues"] >= 1
    assert row["nodes"] >= row["most_nodes"] + 10 * (row["keys"] - 1)
    assert 0 < row["us_per_node"] <= 20


@pytest.mark.slow
def test_compile_time_counts_all_graphs(tmp_path: Path) -> None:
    args = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "rows.json")]
    (row,) = compile_time.main([*args, "--prompts", "300", "350", "--chunk", "128"])
    for compiler in compile_time.COMPILERS:
        assert row[compiler]["compile_s"] > 0 and row[compiler]["graphs"] >= 3
        assert row[compiler]["graphs_again"] == 0
