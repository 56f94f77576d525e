"""Ask several questions about one document that is read only once.

The document's KV stays in host pages. After each answer the cache is cropped back to the document,
so a question costs its own tokens and its answer, whatever the length of the document.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from example_model import Loaded, load, parser

from headinfer_compile import HeadInferCache

MARK = "\x00QUESTION\x00"


def split_prompt(loaded: Loaded, document: str) -> tuple[str, str]:
    """What comes before the question, and what comes after it, by the model's chat template."""
    content = f"{document}\n\n{MARK}"
    if loaded.tokenizer.chat_template is None:
        text = f"{content}\nAnswer:"
    else:
        message = {"role": "user", "content": content}
        text = str(
            loaded.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
        )
    before, after = text.split(MARK)
    return before, after


def read(loaded: Loaded, cache: HeadInferCache, ids: torch.Tensor, chunk: int) -> None:
    """Fill the cache with ``ids [1, S]``, chunk by chunk; no logits but the last are made."""
    with torch.no_grad():
        for piece in ids.split(chunk, dim=1):
            loaded.model(piece, cache=cache, use_cache=True, logits_to_keep=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit code."""
    options = parser(__doc__)
    options.add_argument("--document", type=Path, required=True, help="a text file")
    options.add_argument("--question", action="append", required=True, help="may be repeated")
    options.add_argument("--max-new-tokens", type=int, default=48)
    args = options.parse_args(argv)
    loaded = load(args)
    before, after = split_prompt(loaded, args.document.read_text(encoding="utf-8"))
    document = loaded.encode(before)
    length = document.shape[1]
    with loaded.cache() as cache:
        cache.reserve(length + 1024)
        start = time.perf_counter()
        read(loaded, cache, document, args.chunk)
        print(f"read {length:,} tokens in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        for question in args.question:
            start = time.perf_counter()
            prompt = torch.cat([document, loaded.encode(question + after)], dim=1)
            output = loaded.model.generate(  # type: ignore[operator]
                prompt,
                cache=cache,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
            answer = loaded.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            print(f"Q: {question}\nA: {str(answer).strip()}")
            print(f"answered in {time.perf_counter() - start:.1f} s", file=sys.stderr)
            cache.crop(length - cache.get_seq_length())
        stats = cache.stats()
    print(
        f"{stats.tokens:,} tokens of KV, {stats.host_bytes:,} bytes of host pages, "
        f"{stats.h2d_bytes:,} bytes read from them",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
