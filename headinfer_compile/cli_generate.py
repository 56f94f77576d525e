"""``headinfer generate``: answer a prompt with the KV cache in host RAM."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from headinfer_compile.backend import headinfer
from headinfer_compile.cache import HeadInferCache
from headinfer_compile.config import HeadInferConfig, parse_bytes
from headinfer_compile.errors import OptionError
from headinfer_compile.generation import Generation, run_generate
from headinfer_compile.model_facts import shape_facts
from headinfer_compile.models import find_source, load_model, load_tokenizer
from headinfer_compile.plan_memory import Request
from headinfer_compile.planner import make_plan
from headinfer_compile.probe import this_machine
from headinfer_compile.profiling import profile
from headinfer_compile.tables import stats_table


class DType(str, Enum):
    """Data type of weights and KV."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Lowering(str, Enum):
    """What compiles the regions between attentions."""

    inductor = "inductor"
    eager = "eager"


def _count_or_auto(value: str, name: str) -> Any:
    if value == "auto":
        return value
    if not value.isdecimal():
        raise OptionError(f"{name} {value}: expected a number of tokens or heads, or 'auto'")
    return int(value)


def _budget(value: str, name: str) -> int | str:
    return value if value == "auto" else parse_bytes(value, name)


def _read_prompt(text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise OptionError("give --prompt or --prompt-file, not both")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--prompt-file {file}: cannot be read as text: {error}") from error
    elif text is None:
        if sys.stdin.isatty():
            raise OptionError("no prompt: give --prompt or --prompt-file, or pipe text in")
        text = sys.stdin.read()
    if not text.strip():
        raise OptionError("the prompt is empty: there is nothing to continue")
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> torch.Tensor:
    if chat and not tokenizer.chat_template:
        raise OptionError("--chat: this model has no chat template; use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert isinstance(ids, torch.Tensor)
    if ids.shape[1] == 0:
        raise OptionError("the prompt is empty: its text gives no tokens")
    return ids


def _sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    if temperature == 0:
        if top_p is not None or top_k is not None:
            raise OptionError("--top-p and --top-k need sampling: give a --temperature above 0")
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0 if top_k is None else top_k,
    }


def _report(
    console: Console, result: Generation, cache: HeadInferCache, same: bool | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    console.print(
        f"prompt {result.prompt_tokens:,} tokens, first token after "
        f"{result.first_token_seconds:.1f} s with compilation; then {len(result.tokens)} tokens at "
        f"{result.decode_rate:.1f} tok/s"
    )
    console.print(stats_table(cache.stats()))
    if same is not None:
        verdict = "equal to" if same else "DIFFERENT from"
        console.print(f"check: the tokens are {verdict} those of the resident run")
        if not same and dtype != torch.float32:
            console.print(
                f"       in {str(dtype).removeprefix('torch.')} sums in another order can tip "
                "a near-tie, as between any two kernels: --dtype float32 compares without"
            )


def generate(
    model: Annotated[str, typer.Argument(help="Hub name, local folder or .gguf file.")],
    gguf: Annotated[
        str | None, typer.Option(help="GGUF file in the folder or repository MODEL.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt; else --prompt-file.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the prompt; else standard input.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template; default: if there is one."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Likeliest tokens kept.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    gpu_budget: Annotated[
        str, typer.Option(help="KV bytes allowed on the device, such as 0 or 4GiB, or auto.")
    ] = "auto",
    host_budget: Annotated[
        str, typer.Option(help="KV bytes allowed in host RAM, such as 64GiB, or auto.")
    ] = "auto",
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens per forward; default: the plan's.")
    ] = None,
    page_tokens: Annotated[str, typer.Option(help="Tokens of a host page, or auto.")] = "auto",
    tail_tokens: Annotated[
        str, typer.Option(help="Newest tokens kept on the device, or auto.")
    ] = "auto",
    head_group: Annotated[
        str, typer.Option(help="KV heads moved and attended together, or auto.")
    ] = "auto",
    num_slots: Annotated[
        str, typer.Option(help="Device buffers that transfers fill in turn, or auto.")
    ] = "auto",
    lowering: Annotated[
        Lowering, typer.Option(help="What compiles the regions between attentions.")
    ] = Lowering.inductor,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where an attention cannot be rewritten.")
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Type of weights and KV.")] = DType.auto,
    device: Annotated[
        str | None, typer.Option(help="Default: cuda where there is one, else cpu.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the run whose KV stays resident.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a time line of the first steps, for Perfetto.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Neither progress nor table; errors only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log, and show tracebacks.")] = False,
) -> None:
    """Answer a prompt with the KV cache in host RAM; text to stdout, progress to stderr.

    Example: headinfer generate MODEL --prompt-file book.txt --gpu-budget 1GiB --max-new-tokens 256

    Example: headinfer generate model.gguf --prompt "Once" --check --json --trace trace.json
    """
    if trace is not None and not trace.parent.is_dir():
        raise OptionError(f"--trace {trace}: there is no such folder")
    options: dict[str, Any] = {
        "head_group": _count_or_auto(head_group, "--head-group"),
        "num_slots": _count_or_auto(num_slots, "--num-slots"),
        "lowering": lowering.value,
        "strict": strict,
    }
    HeadInferConfig.from_options(options)
    cache_options: dict[str, Any] = {
        "gpu_budget": _budget(gpu_budget, "--gpu-budget"),
        "host_budget": _budget(host_budget, "--host-budget"),
        "page_tokens": _count_or_auto(page_tokens, "--page-tokens"),
        "tail_tokens": _count_or_auto(tail_tokens, "--tail-tokens"),
    }
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **_sampling(temperature, top_p, top_k),
    }
    source = find_source(model, gguf)
    text = _read_prompt(prompt, prompt_file)
    place = _find_device(device)
    console = Console(stderr=True, highlight=False, quiet=quiet)

    tokenizer = load_tokenizer(source)
    input_ids = _encode(tokenizer, text, chat).to(place)
    network = load_model(source, dtype=dtype.value, device=place)
    _warn_if_too_long(console, network, input_ids.shape[1] + max_new_tokens)
    if network.generation_config.pad_token_id is None:
        how["pad_token_id"] = tokenizer.eos_token_id
    with HeadInferCache(network.config, strict=strict, device=place, **cache_options) as cache:
        total = input_ids.shape[1] + max_new_tokens
        cache.reserve(total)
        how["prefill_chunk_size"] = chunk or _planned_chunk(network, total, options, cache_options)
        resident = None
        if check:
            kept = DynamicCache(config=network.config)
            resident = run_generate(
                network,
                tokenizer,
                input_ids,
                kept,
                label="resident",
                console=console,
                out=None,
                **how,
            )
        network.compile(backend=headinfer, options=options)
        with nullcontext() if trace is None else profile(cache) as found:
            result = run_generate(
                network,
                tokenizer,
                input_ids,
                cache,
                label="prefill",
                console=console,
                out=None if as_json else sys.stdout,
                **how,
            )
        if trace is not None and found is not None:
            found.save(trace)
            console.print(f"time line of {len(found.steps)} steps: {trace}", soft_wrap=True)
        same = None if resident is None else resident.tokens == result.tokens
        _report(console, result, cache, same, network.dtype)
        if as_json:
            record = {
                "model": model,
                **dataclasses.asdict(result),
                "decode_tokens_per_second": result.decode_rate,
                "check": same,
                "stats": dataclasses.asdict(cache.stats()),
            }
            print(json.dumps(record))
    if same is False:
        raise typer.Exit(1)


def _find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: torch sees no CUDA device")
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name}: only cpu and cuda are supported")
    return device


def _planned_chunk(
    network: PreTrainedModel, tokens: int, options: dict[str, Any], sizes: dict[str, Any]
) -> int:
    """The prefill chunk that the planner advises on this machine.

    Raises:
        DoesNotFitError: No chunk fits.
    """
    cuda = network.device.type == "cuda"
    machine = this_machine(measure=False, model=network if cuda else None)
    if not cuda:
        machine = dataclasses.replace(machine, gpu_memory=0)
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size != "auto"}
    config = HeadInferConfig.from_options(options)
    request = Request(tokens, config=config, **given)
    return make_plan(shape_facts(network, type(network).__name__), machine, request).chunk


def _warn_if_too_long(console: Console, network: PreTrainedModel, tokens: int) -> None:
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        console.print(
            f"warning: {tokens:,} tokens, but the model was made for {limit:,}; expect nonsense"
        )
