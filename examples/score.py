"""Log-likelihood of a long text, exact, while only one chunk of logits exists at a time.

A forward over S tokens makes S x vocabulary logits: 128K tokens of a vocabulary of 128K are 32 GiB
in bf16. Here the text goes through in chunks, each attends all tokens before it from the cache, and
of its logits only the likelihood of the next tokens is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from example_model import Loaded, load, parser

from headinfer_compile import HeadInferCache


def next_token_nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed negative log-likelihood of ``targets [1, n]`` under ``logits [1, n, vocab]``."""
    loss = torch.nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="sum")
    return float(loss)


def score(loaded: Loaded, cache: HeadInferCache, ids: torch.Tensor, chunk: int) -> float:
    """Nats of ``ids [1, S]``, the first token aside.

    Each position predicts the token after it, so the targets are the ids, moved by one. The last
    position of the text predicts nothing.
    """
    nats = 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            piece = ids[:, start : start + chunk]
            logits = loaded.model(piece, cache=cache, use_cache=True).logits
            targets = ids[:, start + 1 : start + chunk + 1]
            nats += next_token_nats(logits[:, : targets.shape[1]], targets)
    return nats


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit code."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, required=True, help="a text file")
    options.add_argument("--tokens", type=int, help="score only so many of its tokens")
    options.add_argument("--check", action="store_true", help="compare with one resident forward")
    args = options.parse_args(argv)
    loaded = load(args)
    ids = loaded.encode(args.text.read_text(encoding="utf-8"))[:, : args.tokens]
    count = ids.shape[1] - 1
    if count < 1:
        options.error(f"{args.text} has {count + 1} tokens: nothing to predict")
    with loaded.cache() as cache:
        cache.reserve(ids.shape[1])
        nats = score(loaded, cache, ids, args.chunk)
        stats = cache.stats()
    print(f"{count:,} tokens: {nats:.3f} nats, {nats / count:.4f} per token")
    print(f"perplexity {math.exp(nats / count):.3f}")
    print(f"{stats.host_bytes:,} bytes of host pages, {stats.h2d_bytes:,} read", file=sys.stderr)
    if not args.check:
        return 0
    # The module itself, past the compiled call.
    with torch.no_grad():
        logits = loaded.model.forward(ids, use_cache=False).logits
    whole = next_token_nats(logits[:, :-1], ids[:, 1:])
    same = math.isclose(nats, whole, rel_tol=1e-4 if logits.dtype == torch.float32 else 1e-2)
    print(f"one forward without a cache: {whole:.3f} nats, {'equal' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
