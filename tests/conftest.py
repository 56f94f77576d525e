"""What all tests share: marks, the versions in the header, ``--report``, a tiny checkpoint."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import time
import zlib
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models_report import ModelsReport

pytest.register_assert_rewrite("harness")


class Report:
    """Collects outcomes and writes them as JSON when the session ends.

    With ``merge``, what the file says of tests that are not run again stays: the whole takes an
    hour, and a failure of one test is mended in a minute. Each row has its date, and those
    versions that are not those of the last run.
    """

    def __init__(self, path: Path, command: str, merge: bool) -> None:
        self.path = path
        self.command = command
        self.start = time.perf_counter()
        self.tests: dict[str, dict[str, Any]] = {}
        self.before: list[dict[str, Any]] = []
        if merge and path.exists():
            record = json.loads(path.read_text(encoding="ascii"))
            for row in record["tests"]:
                held = {**record["versions"], **row.pop("versions", {})}
                other = dict(held.items() - versions().items())
                self.before.append({**row, **({"versions": other} if other else {})})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        new = {"outcome": "passed", "seconds": 0.0, "date": _now()}
        entry = self.tests.setdefault(report.nodeid, new)
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.failed:
            entry["outcome"] = "failed"
        elif report.skipped and entry["outcome"] == "passed":
            entry["outcome"] = "skipped"

    def pytest_sessionfinish(self) -> None:
        rows = [row for row in self.before if row["test"] not in self.tests]
        rows += [{"test": name, **entry} for name, entry in self.tests.items()]
        outcomes = [row["outcome"] for row in rows]
        record = {
            "date": _now(),
            "command": self.command,
            "versions": versions(),
            **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
            "seconds": round(time.perf_counter() - self.start, 1),
            "tests": rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The device and the versions a result holds for."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", metavar="FILE", help="write outcomes and times as JSON to FILE")
    parser.addoption(
        "--report-merge", action="store_true", help="keep the rows of FILE that are not run again"
    )
    parser.addoption(
        "--models-report", metavar="FILE", help="write the table of models (Markdown) to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # the controller of pytest-xdist hears of every test
    path = config.getoption("--report")
    command = shlex.join(["pytest", *config.invocation_params.args])
    if path:
        config.pluginmanager.register(
            Report(config.rootpath / path, command, config.getoption("--report-merge"))
        )
    table = config.getoption("--models-report")
    if table:
        report = ModelsReport(config.rootpath / table, command, versions())
        config.pluginmanager.register(report)


def pytest_report_header() -> str:
    return ", ".join(f"{name} {value}" for name, value in versions().items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


@pytest.fixture(scope="session", autouse=True)
def _not_probed() -> Iterator[None]:
    """Let no test depend on whether somebody has probed the machine it runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headinfer_compile.auto_settings.load_profile", lambda: None)
        yield


@pytest.fixture(scope="session")
def run_seed() -> int:
    """A seed that differs in every run; ``HEADINFER_TEST_SEED`` repeats one."""
    given = os.environ.get("HEADINFER_TEST_SEED")
    return int(given) if given else random.SystemRandom().randrange(2**31)


@pytest.fixture
def seed(run_seed: int, request: pytest.FixtureRequest) -> int:
    """The seed of one test; pytest shows how to repeat it when the test fails."""
    print(f"HEADINFER_TEST_SEED={run_seed}")
    return (run_seed + zlib.crc32(request.node.name.encode())) % 2**31


def make_tiny_checkpoint(folder: Path) -> None:
    """Write a random two-layer model (safetensors) and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``make_tiny_checkpoint`` writes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(folder)
    return folder
