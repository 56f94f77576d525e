"""What the compiler writes for people: log lines, ``debug_dir`` and tlparse artifacts."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from harness import CompiledModel, clean_dynamo, random_ids, tiny_llama
from headinfer_compile import explain
from headinfer_compile.passes.pipeline import GRAPH_PASSES, PLAN_PASSES

GRAPH_NAMES = ["dynamo", *(module.__name__.rsplit(".", 1)[1] for module, _ in GRAPH_PASSES)]
PLAN_NAMES = [*(module.__name__.rsplit(".", 1)[1] for module, _ in PLAN_PASSES), "schedule"]

#: A prompt in two chunks and two tokens on a model of one layer, in a process of its own.
SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from headinfer_compile import HeadInferCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=None, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
from headinfer_compile import headinfer
model.compile(backend=headinfer, options={"lowering": "eager"})
cache = HeadInferCache(config, page_tokens=16, tail_tokens=8)
ids = torch.randint(97, (1, 40))
out = model.generate(
    ids, past_key_values=cache, max_new_tokens=2, do_sample=False, prefill_chunk_size=20
)
assert cache.stats().sites_rewritten == 1
"""


def start(script: str = SCRIPT, **environment: str) -> subprocess.Popen[str]:
    """Start ``script`` with exactly these of torch's debug variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**kept, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torch_logs_and_torch_trace(tmp_path: Path) -> None:
    loud, quiet = start(TORCH_LOGS="+headinfer_compile", TORCH_TRACE=str(tmp_path)), start()
    (_, stderr), silence = loud.communicate(timeout=300), quiet.communicate(timeout=300)
    assert (loud.returncode, quiet.returncode) == (0, 0), (stderr, silence)
    assert "headinfer" not in "".join(silence)
    ours = [line for line in stderr.splitlines() if "passes/" in line or "headinfer" in line]
    for name in GRAPH_NAMES[1:] + PLAN_NAMES[:-1]:
        pattern = rf"^V\d+ .*pipeline\.py:\d+\].* {name}: \d+ -> \d+ nodes in \d+\.\d ms$"
        assert any(re.search(pattern, line) for line in ours), name
    for pattern in (
        r"site 0: kv <= q \+ past",
        r"^I.*1 sites, 0 declined, 2 regions \(2 unique\) in ",
        r"^I.*schedule: \d+ nodes, \d+ transfers, built in ",
        r"lower: region_0 \(\d+ nodes\)",
    ):
        assert any(re.search(pattern, line) for line in ours), pattern
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.log"))
    names = re.findall(r'"artifact": {"name": "headinfer_\d{3,}_(\w+)"', text)
    assert set(names) == {*GRAPH_NAMES, *PLAN_NAMES}
    # First chunk, later chunk (the same graph before transformers 5.21), decode.
    counts = {names.count(name) for name in GRAPH_NAMES}
    assert counts in ({2}, {3})
    assert names.count("schedule") >= 3
    assert "headinfer.attend_merge(handle" in text
    # Every artifact names the frame that it belongs to, the schedules built while running too.
    entries = [line for line in text.splitlines() if '"name": "headinfer_' in line]
    assert all('"frame_id"' in line for line in entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dumps of two graphs, made under the widest umask."""
    folder = tmp_path_factory.mktemp("parent") / "deep" / "dump"
    before = os.umask(0)
    try:
        with clean_dynamo():
            config = tiny_llama(0, layers=2).config
            explain(
                config,
                context=100,
                page_tokens=16,
                tail_tokens=8,
                options={"debug_dir": str(folder)},
            )
    finally:
        os.umask(before)
    return folder


def test_dumps_are_private(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_dumps_are_numbered_in_the_order_they_were_made(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split("_")[0] for name in names] == [
        f"{number:03d}" for number in range(len(names))
    ]
    kinds = [name[4:].removesuffix(".py") for name in names]
    # Prefill in one piece and decode, each with one schedule.
    assert kinds == [*GRAPH_NAMES, *PLAN_NAMES] * 2


def test_dumps_show_the_graph_before_and_after_each_pass(folder: Path) -> None:
    texts = {path.name[4:-3]: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}
    for name, text in texts.items():
        ast.parse(text)
        provenance = "# ready for load_schedule" if name == "schedule" else f"# after {name}: "
        assert name == "dynamo" or text.startswith(provenance)
    assert "update_kv" in texts["dynamo"] and "headinfer.attention" not in texts["dynamo"]
    found = texts["find_attention"]
    assert "headinfer.attention" in found and "update_kv" not in found
    assert "_nn.scaled_dot_product_attention(" in texts["dynamo"]
    assert "_nn.scaled_dot_product_attention(" not in found
    assert "self.region_0" in texts["partition"] and "self.region_0" not in found
    assert "whole_site" in texts["place"] and "group_site" in texts["split_heads"]
    assert (
        "span_kv" in texts["chunk_sequence"] and "headinfer.prefetch" not in texts["chunk_sequence"]
    )
    assert texts["insert_transfers"].count("headinfer.prefetch") == 7
    hoisted = texts["hoist_prefetch"]
    assert "next_layer, 0, 0, 0, base, 7" in hoisted
    assert hoisted.splitlines()[1:] == texts["schedule"].splitlines()[1:]


def test_a_later_run_adds_to_the_folder(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / "target"
    target.write_text("kept", encoding="ascii")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with clean_dynamo():
        config = tiny_llama(0, layers=1).config
        explain(
            config, context=1, page_tokens=16, tail_tokens=8, options={"debug_dir": str(tmp_path)}
        )
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)


def test_a_failing_op_shows_its_line_of_the_schedule(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel")

    with clean_dynamo():
        compiled = CompiledModel(tiny_llama(seed, layers=1))
        with compiled.cache() as cache:
            compiled.forward(random_ids(seed, 40), cache, 20)
            monkeypatch.setattr("headinfer_compile.runtime.block_ops.merge_", fail)
            with pytest.raises(RuntimeError, match="no kernel") as caught:
                compiled.forward(random_ids(seed, 1), cache, 1)
    shown = "".join(traceback.format_exception(caught.value))
    assert re.search(r'File "<headinfer schedule [0-9a-f]{8}>", line \d+, in site\n', shown)
    assert re.search(r"\n +attend_merge_default\w* = headinfer\.attend_merge\(handle, ", shown)


@pytest.mark.slow
def test_depyf_reads_what_was_compiled(tmp_path: Path) -> None:
    pytest.importorskip("depyf", reason="pip install depyf")
    # Not generate: depyf 0.20 runs its own decompilation of the call, which loses keyword inputs.
    made, _, _ = SCRIPT.partition("out = model")
    watched = f"with torch.no_grad(), depyf.prepare_debug({str(tmp_path)!r}):"
    # Nor the older name of the argument: the decompiled translation reads what it has taken out.
    calls = "\n    ".join([watched, *["model(ids, **{cache_argument(model): cache})"] * 2])
    imports = "import depyf\nfrom headinfer_compile.cache_protocol import cache_argument\n"
    process = start(f"{imports}{made}{calls}\nassert cache.stats().sites_rewritten == 1")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")]
    assert any("headinfer.update_kv" in text for text in texts)
    assert any("__transformed_code_0_for_wrap" in path.name for path in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tlparse") is None, reason="pip install tlparse")
def test_tlparse_lists_every_graph_of_every_pass(tmp_path: Path) -> None:
    process = start(TORCH_TRACE=str(tmp_path / "trace"))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (log,) = (tmp_path / "trace").glob("*.log")
    command = ["tlparse", str(log), "-o", str(tmp_path / "out"), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for name in (*GRAPH_NAMES, *PLAN_NAMES):
        assert re.search(rf"headinfer_\d+_{name}", index), name
