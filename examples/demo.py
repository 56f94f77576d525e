"""The main job on a real model: a long prompt, its KV cache in host pages, the same tokens.

Run by ``make demo``. Exits with 1 if a token differs from the resident run's or if less than 90 %
of the KV is in host pages.
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import DynamicCache, PreTrainedTokenizerBase

from headinfer_compile import HeadInferCache
from headinfer_compile.generation import run_generate
from headinfer_compile.models import demo_source, load_model, load_tokenizer
from headinfer_compile.tables import host_share, stats_table

TOPICS = ("execmodel", "import", "naming", "objects")
NOTE = "Note: the secret code of the lighthouse is 7341."
QUESTION = "What is the secret code of the lighthouse?"
TEXT_TOKENS = 3072
CHUNK = 1024
NEW_TOKENS = 48
TAIL_TOKENS = 64


def build_prompt(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """English text of the standard library with the note half-way: int64 ``[1, S]``."""
    ids = tokenizer("\n".join(topics[name] for name in TOPICS))["input_ids"][:TEXT_TOKENS]
    before, after = (
        tokenizer.decode(part) for part in (ids[: TEXT_TOKENS // 2], ids[TEXT_TOKENS // 2 :])
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{before}\n\n{NOTE}\n\n{after}\n\n{QUESTION}"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert isinstance(prompt, torch.Tensor)
    return prompt


def main() -> int:
    """Run the demo and return its exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = demo_source()
    console.print(f"loading {source.gguf} in float32 on {device}")
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32", device=device)
    prompt = build_prompt(tokenizer).to(device)
    console.print(f"prompt: {prompt.shape[1]:,} tokens of the Python reference, then: {QUESTION}")
    how: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "prefill_chunk_size": CHUNK,
        "do_sample": False,
        "console": console,
    }

    resident = run_generate(
        model,
        tokenizer,
        prompt,
        DynamicCache(config=model.config),
        label="resident run",
        out=None,
        **how,
    )
    console.print(
        f"resident run, not compiled: {resident.first_token_seconds:.1f} s to the first token, "
        f"then {resident.decode_rate:.1f} tok/s"
    )

    model.compile(backend="headinfer")
    with HeadInferCache(
        model.config, gpu_budget=0, tail_tokens=TAIL_TOKENS, device=device
    ) as cache:
        cache.reserve(prompt.shape[1] + NEW_TOKENS)
        console.print("answer, with the KV cache in host pages:")
        result = run_generate(
            model, tokenizer, prompt, cache, label="prefill", out=sys.stdout, **how
        )
        stats = cache.stats()
    console.print(
        f"{result.first_token_seconds:.1f} s to the first token with compilation, "
        f"then {len(result.tokens)} tokens at {result.decode_rate:.1f} tok/s"
    )
    console.print(stats_table(stats))

    same = result.tokens == resident.tokens
    share = host_share(stats)
    console.print(f"tokens equal to the resident run's: {'yes' if same else 'NO'}")
    console.print(f"KV in host pages: {share:.1%} ({'' if share >= 0.9 else 'NOT '}over 90 %)")
    return 0 if same and share >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
