"""The command line as people meet it: help, progress, silence, time lines, completion."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache

from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.cli import main
from headinfer_compile.generation import run_generate
from headinfer_compile.models import find_source, load_tokenizer
from headinfer_compile.tables import live_bytes

COMMANDS = ("bench", "completion", "explain", "generate", "plan", "probe")
PROMPT = "The lighthouse keeper counts the ships that pass in the night. " * 3
FAST = ["--lowering", "eager", "--device", "cpu", "--page-tokens", "32", "--tail-tokens", "16"]


def run(model: Path, *args: str) -> int:
    """Exit code of ``headinfer generate MODEL ...`` with options that make it quick."""
    return main(["generate", str(model), *FAST, *args])


def test_every_command_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        out, err = capfd.readouterr()
        words = " ".join(out.split())
        assert f"headinfer {command} " in words.partition("Example")[2], command
        assert "\x1b" not in out and not err
        assert command == "completion" or "--json" in out, command


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(tiny_checkpoint: Path, terminal: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokenizer = load_tokenizer(find_source(str(tiny_checkpoint)))
    ids = torch.arange(3, 90)[None]
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=160)
    if terminal:
        model.compile(backend=headinfer, options={"lowering": "eager"})
    with HeadInferCache(model.config, page_tokens=32, tail_tokens=16, gpu_budget=0) as cache:
        result = run_generate(
            model, tokenizer, ids, cache, label="prefill", console=console, out=None,
            max_new_tokens=4, prefill_chunk_size=32, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        where = live_bytes(cache)
    assert len(result.tokens) == 4
    text = shown.getvalue()
    if not terminal:
        assert not text
        return
    for words in ("prefill", "decode", "tok/s", "4/4", "KV: device 0 B, host", "moved"):
        assert words in text, words
    assert where.startswith("KV: device 0 B, host ") and where in text
    assert live_bytes(DynamicCache()) == ""


def test_a_time_line_of_what_was_generated_and_quiet(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    code = run(
        tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "4", "--chunk", "64",
        "--gpu-budget", "0", "--json", "--quiet", "--trace", str(path),
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    stats = json.loads(out)["stats"]
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert 0 < stats["link_utilisation"] == trace["otherData"]["link_utilisation"] < 1
    copies = [e for e in trace["traceEvents"] if e["name"] == "prefetch" and e["tid"] == 2]
    moved = sum(event["args"].get("bytes", 0) for event in copies if event["pid"] == 1)
    assert moved == stats["h2d_bytes"] > 0
    assert not err
    assert run(tiny_checkpoint, "--prompt", "a", "--trace", "/no/such/folder/x") == 2


def test_cases_of_bench_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json"]) == 0
    assert "decode" in json.loads(capfd.readouterr().out)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gen"], {"generate"}),
        ([""], {*COMMANDS, "--help", "--version"}),
        (["generate", "--gpu"], {"--gpu-budget"}),
        (["generate", "x", "--dtype", ""], {"auto", "float32", "bfloat16", "float16"}),
        (["explain", "x", "--ht"], {"--html"}),
        (["plan", "llama-3-8"], {"llama-3-8b"}),
        (["bench", "deco"], {"decode"}),
        (["generate", "x", "--prompt-file", "no/such"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_shell_completes(
    words: list[str], expected: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capfd.readouterr().out, encoding="utf-8")
    line = " ".join(f"'{word}'" for word in ["headinfer", *words])
    show = "printf '%s\\n' \"${COMPREPLY[@]}\""
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _headinfer; {show}"
    done = subprocess.run(
        ["bash", "-c", f"source '{script}'; {ask}"], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == expected
    assert not done.stderr


def test_scripts_for_other_shells(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capfd.readouterr().out.startswith("autoload")
    assert main(["completion", "fish"]) == 0
    assert "-l gpu-budget -r -d " in capfd.readouterr().out
    assert main(["completion", "tcsh"]) == 2
