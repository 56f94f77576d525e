"""The programs of ``examples/`` run and say what is true; the notebook's cells run in order."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import clean_dynamo

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = "The keeper of the lighthouse counts the ships that pass in the night. " * 4
#: Byte tokens, so TEXT is 280 of them: four pages of 64 and some.
FAST = [
    "--lowering", "eager", "--device", "cpu", "--page-tokens", "64", "--tail-tokens", "16",
    "--chunk", "100",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def dynamo() -> Iterator[None]:
    """One clean start for all: they use one model, so later ones find its graphs made."""
    with clean_dynamo():
        yield


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of ``examples/`` by name, as Python does when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A document."""
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_document_qa_reads_the_document_once(
    example: Any, tiny_checkpoint: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model", str(tiny_checkpoint), *FAST, "--document", str(text_file), "--max-new-tokens",
        "6", "--question", "Who counts?", "--question", "What?", "--question", "Who counts?",
    ]  # fmt: skip
    assert example("document_qa").main(arguments) == 0
    out, err = capfd.readouterr()
    answers = re.findall(r"^Q: (.*)\nA: ((?:(?!Q: ).*\n)*)", out, re.M)
    assert [question for question, _ in answers] == ["Who counts?", "What?", "Who counts?"]
    # The cache is back at the document after each, so the same question has the same answer.
    assert answers[0] == answers[2]
    tokens = int(re.search(r"^read ([\d,]+) tokens", err, re.M)[1].replace(",", ""))  # type: ignore[index]
    held = int(re.search(r"^([\d,]+) tokens of KV", err, re.M)[1].replace(",", ""))  # type: ignore[index]
    assert tokens == held >= len(TEXT)


def test_chat_computes_only_new_tokens(
    example: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = ["Count the ships.", "And now the stars.", "Good night."]
    arguments = ["--model", str(tiny_checkpoint), *FAST, "--max-new-tokens", "5"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*said, ""])))
    assert example("chat").main(arguments) == 0
    typed = capfd.readouterr()
    assert example("chat").main([*arguments, *(w for s in said for w in ("--say", s))]) == 0
    assert capfd.readouterr().out == typed.out
    turns = re.findall(r"\((\d+) of (\d+) tokens were new\)", typed.err)
    assert len(turns) == 3
    for (new, total), text in zip(turns, said, strict=True):
        # The turn, its "User:" and "Assistant:", and the answer's last token, which was not fed.
        assert len(text) < int(new) <= len(text) + len("\nUser: \nAssistant:") + 1
        assert int(total) >= int(new)
    assert int(turns[2][1]) > sum(map(len, said))


def test_score_equals_one_forward(
    example: Any, tiny_checkpoint: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_checkpoint), *FAST, "--text", str(text_file), "--check"]
    assert example("score").main(arguments) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{len(TEXT) - 1} tokens: ")
    assert out.rstrip().endswith("equal")
    nats, whole = (float(n) for n in re.findall(r"([\d.]+) nats,", out))
    assert nats == pytest.approx(whole, rel=1e-5)
    assert int(re.search(r"([\d,]+) read", err)[1].replace(",", "")) > 0  # type: ignore[index]


def test_score_of_a_text_too_short(
    example: Any, tiny_checkpoint: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_checkpoint), *FAST, "--text", str(text_file), "--tokens", "1"]
    with pytest.raises(SystemExit):
        example("score").main(arguments)
    assert "nothing to predict" in capfd.readouterr().err


def test_custom_model_equals_the_resident_run(
    example: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokens", "300", "--chunk", "100", "--lowering", "eager"]
    assert example("custom_model").main([*arguments, "--max-new-tokens", "12"]) == 0
    out = capfd.readouterr().out
    assert "4 of 4 attentions rewritten" in out
    tokens = json.loads(out.splitlines()[0].removeprefix("tokens: "))
    assert len(tokens) == 12
    assert len(set(tokens)) > 1, "the model only repeats itself, so equal tokens show nothing"


def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "inspect_graph.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
    out = capsys.readouterr().out
    assert "mask kv <= q + past" in out
    assert re.search(r"slot 1 is filled by \w+ on h2d, after \w+", out)
    assert "headinfer.attend_merge" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["document_qa", "--document", "README.md", "--question", "What is this?"],
        ["chat", "--say", "Name a colour.", "--say", "Another one."],
        ["score", "--text", "README.md", "--tokens", "1200", "--chunk", "256", "--check"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_on_a_real_model(
    arguments: list[str], example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    name, *rest = arguments
    assert example(name).main([*rest, "--lowering", "eager", "--dtype", "float32"]) == 0
