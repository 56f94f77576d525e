"""Nothing is unpickled, no code of a checkpoint runs, files are private and inside their folder."""

from __future__ import annotations

import ast
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from harness import clean_dynamo
from headinfer_compile import explain
from headinfer_compile.cli import main
from headinfer_compile.errors import OptionError
from headinfer_compile.models import find_source
from headinfer_compile.runtime import host_build

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for name in ("headinfer_compile", "passes", "runtime")
           for path in sorted((ROOT / name).glob("*.py"))]  # fmt: skip
UNPICKLERS = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
#: Runs text: the statements of a schedule that was proved, made from its graph.
MAY_EXEC = {"passes/schedule_code.py"}


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    """The source of a keyword argument."""
    found = [ast.unparse(item.value) for item in call.keywords if item.arg == name]
    return found[0] if found else None


def test_no_module_unpickles_or_runs_text() -> None:
    wrong = []
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong += [f"{place}: import {n}" for n in names
                      if n.split(".")[0] in UNPICKLERS]  # fmt: skip
        for name, call in calls_in(path):
            if name in ("eval", "exec") and place not in MAY_EXEC:
                wrong.append(f"{place}:{call.lineno}: {name}")
            if name in ("torch.load", "os.system", "torch.hub.load"):
                wrong.append(f"{place}:{call.lineno}: {name}")
            if keyword(call, "shell") not in (None, "False"):
                wrong.append(f"{place}:{call.lineno}: shell=True")
            if name.endswith(".from_pretrained"):
                if keyword(call, "trust_remote_code") != "False":
                    wrong.append(f"{place}:{call.lineno}: {name} without trust_remote_code=False")
            if name.endswith((".mkdir", "os.makedirs")) and keyword(call, "mode") != "448":
                wrong.append(f"{place}:{call.lineno}: {name} without mode=0o700")
    assert not wrong, "\n".join(wrong)


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_among_the_model_files_is_not_opened(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "was_run"
    folder.mkdir()
    names = ("pytorch_model.bin", "model.bin", "training_args.bin", "tokenizer.pkl")
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for name in names:
        (folder / name).write_bytes(pickle.dumps(_Bomb(mark)))
    assert main(["generate", str(folder), "--prompt", "a", "--lowering", "eager"]) == 1
    assert "safetensors" in capfd.readouterr().err
    assert not mark.exists()
    pickle.loads((folder / names[0]).read_bytes())
    assert mark.exists(), "the bomb is none"


@pytest.mark.parametrize("name", ["../outside.gguf", "a/../../outside.gguf", "/etc/hostname"])
def test_a_gguf_outside_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    (folder / "a" / "inside.gguf").write_bytes(b"GGUF")
    with pytest.raises(OptionError, match=r"inside .*, not a way out of it"):
        find_source(str(folder), name)
    assert find_source(str(folder), "a/inside.gguf").gguf == "a/inside.gguf"


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip


def test_dumps_follow_no_link(tmp_path: Path) -> None:
    """Names that a dump could take are links to a file elsewhere, which stays what it is."""
    folder, victim = tmp_path / "dump", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("kept", encoding="ascii")
    planted = [folder / f"{number:03d}_{name}.py" for number in range(3)
               for name in ("dynamo", "find_attention", "partition", "schedule")]  # fmt: skip
    for path in planted:
        path.symlink_to(victim)
    with clean_dynamo():
        explain(tiny(), context=20, page_tokens=16, options={"debug_dir": str(folder)})
    assert victim.read_text(encoding="ascii") == "kept"
    assert all(path.is_symlink() for path in planted)
    made = [path for path in folder.iterdir() if path not in planted]
    assert len(made) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


def test_a_library_that_others_can_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor at; do last=$at; done\n: > "$last"\n', encoding="ascii")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    host_build.library.cache_clear()
    try:
        assert host_build.library() is None
        (made,) = (tmp_path / "built").glob("*/*.so")
        assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
        assert "is not this user's alone" not in caplog.text
        os.chmod(made, 0o666)
        host_build.library.cache_clear()
        assert host_build.library() is None
        assert "is not this user's alone and is not loaded" in caplog.text
    finally:
        host_build.library.cache_clear()
