"""The command line: what it prints where, its exit codes, and that ``--check`` checks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from headinfer_compile import HeadInferCache
from headinfer_compile.cli import main
from headinfer_compile.errors import DoesNotFitError
from headinfer_compile.generation import run_generate
from headinfer_compile.models import ModelSource, find_source

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The lighthouse keeper counts the ships that pass in the night. " * 3
FAST = ["--lowering", "eager", "--device", "cpu", "--page-tokens", "32", "--tail-tokens", "16"]


def run(model: Path | str, *args: str) -> int:
    """Exit code of ``headinfer generate MODEL ...`` with options that make it quick."""
    return main(["generate", str(model), *FAST, *args])


def spawn(*args: str, **env: str) -> subprocess.Popen[str]:
    """``python -m headinfer_compile ...`` from the checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "headinfer_compile", *args],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def resident_tokens(folder: Path, prompt: str, count: int) -> list[int]:
    """Greedy tokens of transformers alone; the tiny tokenizer's tokens are bytes."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    ids = torch.tensor([[vocab["\u0120" if char == " " else char] for char in prompt]])
    output = model.generate(
        ids, past_key_values=DynamicCache(), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return list(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("chunk", ["16384", "37"])
def test_tokens_and_stats_as_json(
    tiny_checkpoint: Path, chunk: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(
        tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "24", "--chunk", chunk,
        "--gpu-budget", "0", "--json", "--check",
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    record = json.loads(out)
    assert record["tokens"] == resident_tokens(tiny_checkpoint, PROMPT, 24)
    assert record["check"] is True
    assert record["prompt_tokens"] == len(PROMPT)
    stats = record["stats"]
    assert stats["sites_rewritten"] == 2
    assert stats["h2d_bytes"] > 0
    assert stats["eager_updates"] == stats["materialised_layers"] == 0
    assert stats["resident_bytes"] == 0


def test_text_goes_to_stdout_and_the_rest_to_stderr(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "8", "--json") == 0
    text = json.loads(capfd.readouterr().out)["text"]
    assert run(tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "8") == 0
    out, err = capfd.readouterr()
    assert out.strip() == text.strip()
    assert "KV cache" in err
    assert "moved host to device" in err
    assert "\x1b" not in err, "escape codes on a pipe"


def test_prompt_from_a_file_and_from_stdin(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    records = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    for source in (["--prompt", PROMPT], ["--prompt-file", str(file)], []):
        assert run(tiny_checkpoint, *source, "--max-new-tokens", "6", "--json") == 0
        records.append(json.loads(capfd.readouterr().out)["tokens"])
    assert records[0] == records[1] == records[2]


def test_sampling_is_repeatable_by_its_seed(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = []
    for seed in ("1", "1", "2"):
        code = run(
            tiny_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "16", "--json", "--check",
            "--temperature", "5", "--top-k", "200", "--top-p", "0.99", "--seed", seed,
        )  # fmt: skip
        out, err = capfd.readouterr()
        assert code == 0, err
        tokens.append(json.loads(out)["tokens"])
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", " \n "], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "no/such/file"], "no/such/file"),
        (["--prompt", "a", "--gpu-budget", "4XB"], "--gpu-budget='4XB'"),
        (["--prompt", "a", "--gpu-budget", "-1"], "--gpu-budget"),
        (["--prompt", "a", "--host-budget", "much"], "--host-budget"),
        (["--prompt", "a", "--num-slots", "1"], "num_slots=1"),
        (["--prompt", "a", "--head-group", "some"], "--head-group some"),
        (["--prompt", "a", "--page-tokens", "-4"], "--page-tokens"),
        (["--prompt", "a", "--top-k", "5"], "--temperature"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--device", "tpu0"], "--device tpu0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--lowering", "magic"], "--lowering"),
        (["--prompt", "a", "--no-such-flag"], "--no-such-flag"),
        (["--prompt", "a", "--gguf", "x.gguf"], "--gguf x.gguf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(
    tiny_checkpoint: Path, args: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_checkpoint, *args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in " ".join(err.replace("\u2502", " ").split())
    assert "Traceback" not in err


def test_no_prompt_on_a_terminal_is_a_usage_error(
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert run(tiny_checkpoint) == 2
    assert "no prompt" in capfd.readouterr().err


def test_a_folder_that_is_not_there_is_a_usage_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nothing", "--prompt", "a") == 2
    assert "no such folder" in capfd.readouterr().err


def test_pickled_weights_are_not_loaded(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_checkpoint.iterdir():
        if path.suffix == ".safetensors":
            torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run(tmp_path, "--prompt", "a") == 1
    err = capfd.readouterr().err
    assert "safetensors" in err
    assert "Traceback" not in err


def test_broken_weights_are_a_failure_without_a_traceback(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    assert run(tmp_path, "--prompt", "a") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        run(tmp_path, "--prompt", "a", "--debug")


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(
        tiny_checkpoint, "--prompt", PROMPT, "--gpu-budget", "0", "--host-budget", "1KiB",
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 3, err
    assert out == ""
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DoesNotFitError("no room"), 3),
        (torch.OutOfMemoryError("no room"), 3),
        (RuntimeError("no room"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures_have_their_exit_codes(
    tiny_checkpoint: Path,
    error: BaseException,
    code: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Any, tokens: int) -> None:
        assert tokens == len(PROMPT) + 256
        raise error

    monkeypatch.setattr(HeadInferCache, "reserve", fail)
    assert run(tiny_checkpoint, "--prompt", PROMPT) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert code == 130 or "no room" in err


def test_a_wrapped_error_keeps_its_exit_code(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, tokens: int) -> None:
        raise RuntimeError("backend failed") from DoesNotFitError("no room")

    monkeypatch.setattr(HeadInferCache, "reserve", fail)
    assert run(tiny_checkpoint, "--prompt", PROMPT) == 3
    assert capfd.readouterr().err == "error: no room\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_finds_a_difference(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:  # fmt: skip
    runs = 0

    def perturb(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 2:
            with torch.no_grad():
                model.lm_head.weight.neg_()
        return run_generate(model, *args, **kwargs)

    monkeypatch.setattr("headinfer_compile.cli_generate.run_generate", perturb)
    how = ("--max-new-tokens", "8", "--check", "--dtype", dtype)
    assert run(tiny_checkpoint, "--prompt", PROMPT, *how) == 1
    said = capfd.readouterr().err
    assert "DIFFERENT" in said
    assert ("--dtype float32" in said) == (dtype == "bfloat16")


def test_generate_as_a_module_in_a_fresh_process(tiny_checkpoint: Path) -> None:
    process = spawn(
        "generate", str(tiny_checkpoint), *FAST, "--prompt", PROMPT, "--max-new-tokens", "8",
        "--check", NO_COLOR="1",
    )  # fmt: skip
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.strip()
    assert "equal to" in err
    assert "\x1b" not in out + err


@pytest.mark.slow
def test_an_interrupt_ends_a_process_with_130(tiny_checkpoint: Path) -> None:
    process = spawn(
        "generate", str(tiny_checkpoint), *FAST, "--prompt", PROMPT, "--max-new-tokens", "100000",
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_sources_are_told_apart(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_source(str(tmp_path / "a.gguf")) == ModelSource(str(tmp_path), "a.gguf")
    assert find_source(str(tmp_path), "a.gguf") == ModelSource(str(tmp_path), "a.gguf")
    assert find_source(str(tiny_checkpoint)) == ModelSource(str(tiny_checkpoint))
    assert find_source("some-org/some-model") == ModelSource("some-org/some-model")
    assert find_source("some-org/x-GGUF", "x.gguf") == ModelSource("some-org/x-GGUF", "x.gguf")


def test_versions_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert f"torch {torch.__version__}" in capfd.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert "--gpu-budget" in capfd.readouterr().out
    assert main(["no-such-command"]) == 2
