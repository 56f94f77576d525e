"""The table of bad input: what was given, which error comes, what it says.

``python tests/error_cases.py`` writes ``docs/errors.md`` from it, by running every case.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MambaConfig, T5Config

from error_harness import (
    PAGE,
    ErrorCase,
    Outcome,
    World,
    cut,
    page,
    pickled,
    run_case,
    with_code,
    without_tokenizer,
)  # fmt: skip
from harness import clean_dynamo, generate, random_ids
from headinfer_compile import HeadInferCache, HeadInferConfig, headinfer, load_schedule
from headinfer_compile.cli import main
from headinfer_compile.errors import (
    CacheError,
    ClosedError,
    DeclinedError,
    DoesNotFitError,
    HeadInferError,
    OptionError,
    ScheduleError,
)


def option(given: dict[str, Any] | Any, says: str) -> ErrorCase:
    return ErrorCase(
        "Options", f"`options={given!r}`", lambda w: HeadInferConfig.from_options(given),
        OptionError, says,
    )  # fmt: skip


def size(says: str, **given: Any) -> ErrorCase:
    text = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return ErrorCase(
        "Making a cache", f"`HeadInferCache(config, {text})`",
        lambda w: HeadInferCache(LlamaConfig(num_hidden_layers=1), **given), OptionError, says,
    )  # fmt: skip


def command(says: str, *args: str, code: int = 2, group: str = "Commands") -> ErrorCase:
    """A command line; MODEL and DIR stand for folders."""

    def run(world: World) -> int:
        names = {"MODEL": str(world.checkpoint), "DIR": str(world.folder)}
        filled = [re.sub("MODEL|DIR", lambda m: names[m[0]], arg) for arg in args]
        return main([*filled, "--lowering", "eager"] if filled[0] == "generate" else filled)

    shown = " ".join(arg if re.fullmatch(r"[\w./=-]+", arg) else repr(arg) for arg in args)
    return ErrorCase(group, f"`headinfer {shown}`", run, code, says)


def load(says: str, given: str, change: Callable[[Path, Path], None], code: int = 1) -> ErrorCase:
    """``headinfer generate`` on a changed checkpoint."""

    def run(world: World) -> int:
        folder = world.copied(re.sub(r"\W+", "-", given), change)
        return main(["generate", folder, "--prompt", "a", "--lowering", "eager"])

    return ErrorCase("Model files", given, run, code, says)


def _call(world: World, ids: Any, cache: HeadInferCache | None = None) -> object:
    """One generated token."""
    cache = world.model.cache() if cache is None else cache
    return generate(world.model.model, ids, cache, 1)


def _in_another_thread(world: World) -> None:
    """Call in this thread while another one is in a call."""
    cache, entered, leave = world.used(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        entered.set()
        leave.wait(60)
        yield

    cache.session.around_call = slow
    first = threading.Thread(
        target=lambda: world.model.forward(random_ids(1, 1), cache, 1), name="first", daemon=True
    )
    first.start()
    assert entered.wait(60)
    try:
        threading.current_thread().name = "second"
        world.model.forward(random_ids(1, 1), cache, 1)
    finally:
        threading.current_thread().name = "MainThread"
        leave.set()
        first.join(60)


def _in_a_fork(world: World) -> None:
    """The error that the child has, carried over as text."""
    cache = world.used()
    k = torch.zeros(1, 3, 1, 8)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cache.update(k, k, 0)
            text = "no error"
        except CacheError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    raise CacheError(text)


def _two_caches(world: World) -> object:
    caches = [world.model.cache(), world.model.cache()]
    attend = torch.nn.functional.scaled_dot_product_attention

    @torch.compile(backend=headinfer, options={"lowering": "eager"})
    def call(q: Tensor) -> Tensor:
        for cache in caches:
            k, v = cache.update(q, q, 1)
            q = attend(q, k, v, is_causal=True)
        return q

    with torch.no_grad():
        return call(torch.randn(1, 3, 5, 8))


def _unknown_attention(world: World) -> object:
    @torch.compile(backend=headinfer, options={"lowering": "eager", "strict": True})
    def call(cache: HeadInferCache, q: Tensor) -> Tensor:
        k, v = cache.update(q, q, 1)
        return (q @ k.transpose(2, 3)).sin() @ v

    with torch.no_grad():
        return call(world.model.cache(), torch.randn(1, 3, 5, 8))


def _update(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    k, v = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    return lambda w: w.model.cache().update(k, v, 0)


_ONE = (1, 3, 1, 8)


def _update_in_bfloat16(world: World) -> object:
    k = torch.zeros(_ONE, dtype=torch.bfloat16)
    return world.used().update(k, k, 0)


def _cache_of_a_model(world: World) -> object:
    model: Any = world.model.resident
    return HeadInferCache(model)


CASES: list[ErrorCase] = [
    # -- options ------------------------------------------------------------------------------
    option({"num_slot": 3}, "did you mean 'num_slots'"),
    option({"num_slots": 1}, "num_slots=1: expected an int of at least 2"),
    option({"num_slots": "3"}, "num_slots='3'"),
    option({"num_slots": True}, "num_slots=True"),
    option({"prefetch_distance": 0}, "prefetch_distance=0"),
    option({"num_slots": 2, "prefetch_distance": 2}, "the largest is 1"),
    option({"head_group": 0}, "head_group=0"),
    option({"head_group": "all"}, "head_group='all'"),
    option({"head_group": {"prefill": 1}}, "expected the keys 'prefill' and 'decode'"),
    option({"slot_tokens": {"prefill": "auto", "decode": 1}}, "slot_tokens['prefill']='auto'"),
    option({"workspace_bytes": -1}, "cannot be negative"),
    option({"workspace_bytes": "lots"}, "workspace_bytes='lots': not a byte count"),
    option({"workspace_bytes": 1.5}, "expected bytes as an int or a string"),
    option({"strict": 1}, "strict=1: expected True or False"),
    option({"cuda_graphs": "yes"}, "cuda_graphs='yes'"),
    option({"lowering": "aot"}, "expected 'inductor' or 'eager'"),
    option({"disable_passes": ["verify"]}, "only hoist_prefetch may be disabled"),
    option({"disable_passes": "hoist_prefetch"}, "expected a list of names"),
    option({"debug_dir": 3}, "expected the path of a folder"),
    option({"inductor": "max_autotune"}, "expected a dict of Inductor's options"),
    option(["num_slots"], "expected a dict of option names and values"),
    ErrorCase("Options", "`model.compile(backend='headinfer', options={'num_slots': 1})`, at the "
              "first call", lambda w: _generate(w, options={"num_slots": 1}), OptionError,
              "num_slots=1"),
    ErrorCase("Options", "`model.compile(backend='headinfer', mode='fastest')`",
              lambda w: _generate(w, mode="fastest"), OptionError, "expected 'default'"),
    ErrorCase("Options", "`options={'inductor': {'no_such': 1}}`",
              lambda w: _generate(w, options={"inductor": {"no_such": 1}}), OptionError,
              "no option 'no_such'"),
    ErrorCase("Options", "`options={'debug_dir': FILE}`",
              lambda w: _generate(w, options={"debug_dir": __file__}), OptionError,
              "no folder can be made there"),
    # -- making a cache -----------------------------------------------------------------------
    size("not a byte count", gpu_budget="4 parsecs"),
    size("cannot be negative", gpu_budget=-1),
    size("expected bytes", host_budget=1.5),
    size("a count of at least 1", page_tokens=0),
    size("a count of at least 1", tail_tokens="many"),
    size("device='tpu0'", device="tpu0"),
    ErrorCase("Making a cache", "`HeadInferCache(model)`",
              _cache_of_a_model, CacheError, "pass model.config"),
    ErrorCase("Making a cache", "`HeadInferCache(T5Config())`",
              lambda w: HeadInferCache(T5Config()), CacheError, "is an encoder-decoder"),
    ErrorCase("Making a cache", "`HeadInferCache(MambaConfig())`",
              lambda w: HeadInferCache(MambaConfig()), CacheError, "no attention layer"),
    ErrorCase("Making a cache", "`HeadInferCache.from_shape(num_layers=0, ...)`",
              lambda w: HeadInferCache.from_shape(num_layers=0, num_kv_heads=1, head_dim=8),
              OptionError, "num_layers=0"),
    # -- using a cache ------------------------------------------------------------------------
    ErrorCase("Using a cache", "`cache.crop(1)`", lambda w: w.used().crop(1), CacheError,
              "pass minus the number of tokens to drop"),
    ErrorCase("Using a cache", "`cache.crop(-13)` on 12 tokens", lambda w: w.used().crop(-13),
              CacheError, "on 12 tokens"),
    ErrorCase("Using a cache", "`cache.reserve(-1)`", lambda w: w.used().reserve(-1), OptionError,
              "tokens=-1"),
    ErrorCase("Using a cache", "`cache.reserve(97)`, room for 96",
              lambda w: w.model.cache(host_budget=96 * w.model.token_bytes).reserve(97),
              DoesNotFitError, "96 tokens"),
    ErrorCase("Using a cache", "a prompt of 97 tokens, room for 96",
              lambda w: _call(w, random_ids(0, 97),
                              w.model.cache(host_budget=96 * w.model.token_bytes)),
              DoesNotFitError, "a context of at most 96 tokens"),
    ErrorCase("Using a cache", "a call after `cache.close()`",
              lambda w: _call(w, random_ids(0, 5), _closed(w)), ClosedError, "make a new one"),
    ErrorCase("Using a cache", "`cache.reserve(1)` after `cache.close()`",
              lambda w: _closed(w).reserve(1), ClosedError, "make a new one"),
    ErrorCase("Using a cache", "`copy.deepcopy(cache)`", lambda w: copy.deepcopy(w.used()),
              CacheError, "cannot be copied or pickled"),
    ErrorCase("Using a cache", "`pickle.dumps(cache)`", lambda w: pickle.dumps(w.used()),
              CacheError, "cannot be copied or pickled"),
    ErrorCase("Using a cache", "`cache.use_schedule('schedule.py')`",
              lambda w: w.used().use_schedule("schedule.py"),  # type: ignore[arg-type]
              CacheError, "what load_schedule(path) returns"),
    ErrorCase("Using a cache", "`cache.update(k, v, 0)`, k of two dims", _update((3, 4), (3, 4)),
              CacheError, "expected floating point [batch"),
    ErrorCase("Using a cache", "`cache.update(k, v, 0)`, v with more tokens than k",
              _update(_ONE, (1, 3, 2, 8)), CacheError, "alike but for the last"),
    ErrorCase("Using a cache", "`cache.update(k, v, 0)` with integers",
              _update(_ONE, _ONE, dtype=torch.int64), CacheError, "torch.int64"),
    ErrorCase("Using a cache", "`cache.update(k, v, 2)` on two layers",
              lambda w: w.model.cache().update(torch.zeros(_ONE), torch.zeros(_ONE), 2),
              CacheError, "layer 2 updates a cache whose last layer is 1"),
    ErrorCase("Using a cache", "`cache.crop(-1400)` on 1,600 tokens under a window of 20",
              lambda w: w.past_window().crop(-1400), CacheError, "can go back to"),
    ErrorCase("Using a cache", "a mask without the window, after that",
              lambda w: w.windowed.forward(random_ids(0, 1), w.past_window(), 1,
                                           attention_mask=torch.ones(1, 1, 1, 1601).bool()),
              CacheError, "keeps the newest tokens alone"),
    ErrorCase("Using a cache", "bfloat16 K and V after float32",
              _update_in_bfloat16,
              CacheError, "the dtype of K and V changed"),
    ErrorCase("Using a cache", "batch 2 after batch 1",
              lambda w: w.model.forward(random_ids(0, 3, batch=2), w.used(), 3), CacheError,
              "batch size changed"),
    ErrorCase("Using a cache", "K and V from the CPU, `device='cuda:1'`",
              lambda w: w.model.forward(random_ids(0, 3), w.model.cache(device="cuda:1"), 3),
              CacheError, "came on cpu"),
    ErrorCase("Using a cache", "an uncompiled model, `strict=True`",
              lambda w: w.model.resident(random_ids(0, 3), past_key_values=w.model.cache(
                  strict=True)), CacheError, "all model.compile(backend='headinfer')"),
    ErrorCase("Using a cache", "an uncompiled model",
              lambda w: generate(w.model.resident, random_ids(0, 3), w.model.cache(), 1), None,
              "all model.compile(backend='headinfer')"),
    ErrorCase("Using a cache", "the cache of a model with fewer layers",
              lambda w: w.other.forward(random_ids(0, 3), w.model.cache(), 3), CacheError,
              "made for another model's config"),
    ErrorCase("Using a cache", "a call with gradients",
              lambda w: w.model.model(random_ids(0, 3), past_key_values=w.model.cache()),
              HeadInferError, "for inference only"),
    ErrorCase("Using a cache", "two caches in one call", _two_caches, HeadInferError,
              "one cache at a time"),
    ErrorCase("Using a cache", "two threads at once", _in_another_thread, CacheError,
              "use one cache per thread"),
    ErrorCase("Using a cache", "a fork of the process", _in_a_fork, CacheError,
              "Make a cache in each process"),
    ErrorCase("Using a cache", "an attention that is none, `strict=True`", _unknown_attention,
              DeclinedError, "is left alone"),
    # -- prompts ------------------------------------------------------------------------------
    ErrorCase("Prompts", "no tokens: `torch.zeros(1, 0)`",
              lambda w: _call(w, torch.zeros(1, 0, dtype=torch.int64)), RuntimeError,
              foreign=True),
    ErrorCase("Prompts", "one token", lambda w: _call(w, random_ids(0, 1)), None),
    ErrorCase("Prompts", "2,060 tokens on a model made for 2,048",
              lambda w: w.model.forward(random_ids(0, 2060), w.model.cache(), 2060), None,
              "the model was made for 2048"),
    ErrorCase("Prompts", "a list", lambda w: _call(w, [1, 2, 3]), AttributeError, foreign=True),
    ErrorCase("Prompts", "one dimension", lambda w: _call(w, random_ids(0, 3)[0]), IndexError,
              foreign=True),
    ErrorCase("Prompts", "a token that the vocabulary lacks",
              lambda w: _call(w, torch.full((1, 3), 1000)), IndexError, foreign=True),
    command("the prompt is empty", "generate", "MODEL", "--prompt", "", group="Prompts"),
    command("not both", "generate", "MODEL", "--prompt", "a", "--prompt-file", "b",
            group="Prompts"),
    command("no/such/file", "generate", "MODEL", "--prompt-file", "no/such/file",
            group="Prompts"),
    command("no chat template", "generate", "MODEL", "--prompt", "a", "--chat", group="Prompts"),
    # -- schedules ----------------------------------------------------------------------------
    ErrorCase("Schedules", "`load_schedule('nothing.py')`",
              lambda w: load_schedule(w.folder / "nothing.py"), FileNotFoundError, "nothing.py"),
    ErrorCase("Schedules", "a file that is no schedule", lambda w: load_schedule(__file__),
              ScheduleError, "expected one line '# key: "),
    ErrorCase("Schedules", "a key line that was edited badly",
              lambda w: load_schedule(w.edited('"num_slots": 3', '"num_slots": "3"')),
              ScheduleError, "the key line is damaged"),
    ErrorCase("Schedules", "an op that there is not",
              lambda w: load_schedule(w.edited("headinfer.store(", "headinfer.shop(")),
              ScheduleError, "is no call of one of"),
    ErrorCase("Schedules", "an op that is no operator of ours",
              lambda w: load_schedule(w.edited("headinfer.store(", "os.remove(")),
              ScheduleError, "is no call of one of"),
    ErrorCase("Schedules", "a transfer that nobody waits for",
              lambda w: load_schedule(w.edited("headinfer.wait(handle, r0)",
                                               "headinfer.wait(handle, r1)")),
              ScheduleError, "the schedule is not proved and was not run"),
    # -- model files --------------------------------------------------------------------------
    load("safetensors", "weights in a pickle only", pickled),
    load("", "weights cut short", cut),
    load("no tokenizer could be loaded", "a folder without a tokenizer", without_tokenizer),
    load("trust_remote_code", "a config that brings its own code", with_code),
    command("no such folder", "generate", "DIR/nothing", "--prompt", "a", group="Model files"),
    command("there is no such file", "generate", "DIR/nothing.gguf", "--prompt", "a",
            group="Model files"),
    command("no such file in MODEL", "generate", "MODEL", "--gguf", "x.gguf", "--prompt", "a",
            group="Model files"),
    command("not a way out of it", "generate", "MODEL", "--gguf", "../x.gguf", "--prompt", "a",
            group="Model files"),
    # -- commands -----------------------------------------------------------------------------
    command("--gpu-budget='4XB'", "generate", "MODEL", "--prompt", "a", "--gpu-budget", "4XB"),
    command("num_slots=1", "generate", "MODEL", "--prompt", "a", "--num-slots", "1"),
    command("--head-group some", "generate", "MODEL", "--prompt", "a", "--head-group", "some"),
    command("--temperature", "generate", "MODEL", "--prompt", "a", "--top-k", "5"),
    command("--device tpu0", "generate", "MODEL", "--prompt", "a", "--device", "tpu0"),
    command("--max-new-tokens", "generate", "MODEL", "--prompt", "a", "--max-new-tokens", "0"),
    command("No such option", "generate", "MODEL", "--prompt", "a", "--no-such-flag"),
    command("What would work: a context", "generate", "MODEL", "--prompt", "a", "--gpu-budget", "0",
            "--host-budget", "1KiB", code=3),
    command("context='many'", "explain", "MODEL", "--context", "many"),
    command("expected name=value", "explain", "MODEL", "--context", "64", "--option", "x"),
    command("there is no such folder", "explain", "MODEL", "--context", "64", "--output",
            "DIR/no/x.txt"),
    command("no such case", "bench", "nothing"),
    command("No such command", "no-such-command"),
]  # fmt: skip


def _closed(world: World) -> HeadInferCache:
    cache = world.model.cache()
    cache.close()
    return cache


def _generate(world: World, **how: Any) -> object:
    return generate(world.compiled(**how), random_ids(0, 3), world.model.cache(), 1)


def run_all(world: World) -> list[tuple[ErrorCase, Outcome]]:
    """Every case in order."""
    with clean_dynamo():
        return [(case, run_case(case, world)) for case in CASES]


if __name__ == "__main__":
    from conftest import make_tiny_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "model"
        checkpoint.mkdir()
        make_tiny_checkpoint(checkpoint)
        PAGE.write_text(page(run_all(World(Path(scratch), checkpoint))), encoding="ascii")
    sys.stdout.write(f"wrote {PAGE}\n")
