"""Is every token of a long context still there? Planted pairs recalled from any position.

The model is a two-layer Llama whose weights are constructed, not trained, so that exact recall is
certain if and only if attention is: random text holds pairs (key token, value token), and after
reading a key again the model must say its value.

- Layer 0 copies the token before each position into that position: its queries and keys are one
  constant vector, the queries turned by one position, so that RoPE makes the score a sum of cosines
  that peaks one token back and nowhere else up to 2M tokens (only fast frequencies are used).
- Layer 1 looks for the position whose "token before" is the current token and copies the token
  there to the output. It uses only the frequencies that do not turn within 2M tokens. The first
  token is a sink whose score is nine tenths of a match, and whose value is nothing.

Every token has a random code of 64 signs. Each KV head moves half of a code and each query head
half of that, so what one head loses is missed: in layer 0 the damaged code no longer beats the
sink, in layer 1 the answer's logit is below what a whole code gives. All keys of a length share one
prefill: each question is one decode step, and ``crop(-1)`` takes it back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import (
    Peak,
    Row,
    Setup,
    format_tokens,
    parse_tokens,
    parser,
    prepare,
    provenance,
    say,
    show_bytes,
    synchronize,
    write_rows,
)
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.cache_protocol import cache_argument

CODE = 64
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 128, 256
FILLERS, PAIRS = 512, 256
SINK = FILLERS + 2 * PAIRS
VOCAB = SINK + 1
ROPE_THETA = 1e16
FAST = 24
"""Frequencies 1 to 1e-6 that tell positions apart; those from 32 on turn by 0.02 in 2M tokens."""

# Where the parts of a hidden vector are.
_TOKEN, _BEFORE, _ANSWER, _ONE, _IS_SINK = 0, CODE, 2 * CODE, 3 * CODE, 3 * CODE + 1
_CONSTANT = 8.0
_MATCH, _SINK_SCORE = 300.0, 270.0


def codes(seed: int) -> Tensor:
    """``[VOCAB, 64]`` of signs, no two of which agree by more than 0.7."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 2, (VOCAB, CODE), generator=generator).float() * 2 - 1
    while True:
        alike = (made @ made.T / CODE).fill_diagonal_(0)
        worst = (alike > 0.7).any(dim=1).nonzero().flatten()
        if len(worst) == 0:
            return made
        fresh = torch.randint(0, 2, (len(worst), CODE), generator=generator)
        made[worst] = fresh.float() * 2 - 1


def build_model(device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The constructed model."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 21,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval()
    code = codes(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        embedding = model.model.embed_tokens.weight
        embedding[:, _TOKEN : _TOKEN + CODE] = code
        embedding[SINK] = 0.0
        embedding[SINK, _IS_SINK] = _CONSTANT
        embedding[:, _ONE] = _CONSTANT
        first, second = (layer.self_attn for layer in model.model.layers)
        _look_one_back(first)
        _look_for_token(second)
        _copy_token(first, _BEFORE, _rms(1))
        _copy_token(second, _ANSWER, _rms(2))
        model.lm_head.weight[:, _ANSWER : _ANSWER + CODE] = code
    made: PreTrainedModel = model.to(device=device, dtype=dtype)
    return made


def _rms(parts: int) -> float:
    """RMS of a hidden vector that holds ``parts`` codes."""
    return float(((CODE * parts + _CONSTANT**2) / HIDDEN) ** 0.5)


def _look_one_back(attention: Any) -> None:
    """A score of 600 one token back, at least 40 less anywhere else."""
    turns = torch.arange(FAST)
    angle = ROPE_THETA ** (-turns.double() / (HEAD_DIM / 2))
    weight = torch.exp(-0.1 * turns.double())
    size = (600 * HEAD_DIM**0.5 * weight / weight.sum()).sqrt() * _rms(1) / _CONSTANT
    q, k = attention.q_proj.weight, attention.k_proj.weight
    for head in range(HEADS):
        q[head * HEAD_DIM + turns, _ONE] = (size * angle.cos()).float()
        q[head * HEAD_DIM + HEAD_DIM // 2 + turns, _ONE] = (-size * angle.sin()).float()
    for head in range(KV_HEADS):
        k[head * HEAD_DIM + turns, _ONE] = size.float()


def _look_for_token(attention: Any) -> None:
    """The highest score where the token before is the current one; the next is the sink's."""
    slow = torch.arange(HEAD_DIM // 4, HEAD_DIM // 2)
    dims = torch.cat([slow, slow + HEAD_DIM // 2])
    size = (_MATCH * HEAD_DIM**0.5 / CODE) ** 0.5 * _rms(2)
    index = torch.arange(CODE)
    for head in range(HEADS):
        attention.q_proj.weight[head * HEAD_DIM + dims, _TOKEN + index] = size
    for head in range(KV_HEADS):
        attention.k_proj.weight[head * HEAD_DIM + dims, _BEFORE + index] = size

    # The fastest frequency that still turns too little to matter, and that no code uses.
    dim, strength = HEAD_DIM // 4 - 1, (_SINK_SCORE * HEAD_DIM**0.5) ** 0.5 / _CONSTANT
    for head in range(HEADS):
        attention.q_proj.weight[head * HEAD_DIM + dim, _ONE] = strength * _rms(2)
    for head in range(KV_HEADS):
        attention.k_proj.weight[head * HEAD_DIM + dim, _IS_SINK] = strength * _rms(1)


def _copy_token(attention: Any, target: int, rms: float) -> None:
    """Write the code of the token that is attended into ``target``; each head a part of it."""
    part, group = CODE // KV_HEADS, HEADS // KV_HEADS
    for head in range(KV_HEADS):
        index = torch.arange(part)
        attention.v_proj.weight[head * HEAD_DIM + index, _TOKEN + head * part + index] = rms
    share = part // group
    for head in range(HEADS):
        inside = torch.arange(share) + head % group * share
        code = head // group * part + inside
        attention.o_proj.weight[target + code, head * HEAD_DIM + inside] = 1.0


@dataclass(frozen=True)
class Haystack:
    """Random text with pairs in it."""

    ids: Tensor
    """``[1, n]``."""
    depths: list[float]
    """Share of the text before each pair."""
    pairs: list[tuple[int, int]]
    """Key and value of each."""


def plant(tokens: int, depths: int, seed: int, each: int = 1) -> Haystack:
    """``each`` pairs side by side at each of ``depths`` depths, from the second token to the last.

    The first token is the sink.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, FILLERS, (tokens,), generator=generator)
    ids[0] = SINK
    order = torch.randperm(PAIRS, generator=generator).tolist()
    answers = torch.randperm(PAIRS, generator=generator).tolist()
    shares, pairs = [], []
    for depth in range(depths):
        share = depth / max(1, depths - 1)
        start = 1 + round(share * (tokens - 1 - 2 * each))
        for turn in range(each):
            number = depth * each + turn
            pair = (FILLERS + order[number], FILLERS + PAIRS + answers[number])
            ids[start + 2 * turn], ids[start + 2 * turn + 1] = pair
            shares.append(share)
            pairs.append(pair)
    return Haystack(ids[None], shares, pairs)


def ask(
    model: PreTrainedModel, cache: HeadInferCache, haystack: Haystack, chunk: int
) -> tuple[float, list[bool]]:
    """Read the haystack once, then ask for every key; seconds of reading, and what was right.

    An answer is right if the value has the highest logit, and the logit of a whole code.
    """
    device = model.device
    with torch.no_grad():
        synchronize(device)
        start = time.perf_counter()
        for part in haystack.ids.to(device).split(chunk, dim=1):
            model(input_ids=part, logits_to_keep=1, **{cache_argument(model): cache})
        synchronize(device)
        seconds = time.perf_counter() - start
        right = []
        for key, value in haystack.pairs:
            question = torch.tensor([[key]], device=device)
            held = {cache_argument(model): cache}
            logits = model(input_ids=question, logits_to_keep=1, **held).logits
            best = logits[0, -1].float().max(dim=-1)
            whole = CODE / _rms(3)
            right.append(int(best.indices) == value and float(best.values) > 0.95 * whole)
            cache.crop(-1)
    return seconds, right


def run(
    model: PreTrainedModel,
    setup: Setup,
    context: int,
    chunk: int,
    depths: int,
    each: int,
    seed: int,
) -> Row:
    """One length: all depths of one prefill."""
    haystack = plant(context, depths, seed, each)
    peak = Peak(setup.device)
    sizes: dict[str, Any] = {"page_tokens": 32, "tail_tokens": 8}
    if setup.device.type == "cuda":
        sizes = {}
    with HeadInferCache(model.config, gpu_budget=0, **sizes) as cache:
        peak.start()
        seconds, right = ask(model, cache, haystack, chunk)
        stats = cache.stats()
        found = peak.read()
    by_depth = [
        {
            "depth": round(depth, 4),
            "asked": sum(share == depth for share in haystack.depths),
            "right": sum(
                ok for ok, share in zip(right, haystack.depths, strict=True) if share == depth
            ),
        }
        for depth in sorted(set(haystack.depths))
    ]
    return {
        "id": f"needle/{setup.tag}/n{context}", "case": "needle", "context": context,
        "chunk": chunk, "depths": by_depth, "asked": len(right), "right": sum(right),
        "prefill_s": round(seconds, 3), "h2d_bytes": stats.h2d_bytes,
        "host_kv_bytes": stats.host_bytes, "resident_bytes": stats.resident_bytes,
        "sites_rewritten": stats.sites_rewritten, "eager_updates": stats.eager_updates, **found,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the rows that were written."""
    cli = parser("needle", "Recall of planted pairs over depth and length, all KV in host RAM.")
    cuda = torch.cuda.is_available()
    full = [(8 << 10) << turn for turn in range(8)]
    cli.add_argument("--context", type=parse_tokens, nargs="+", default=full if cuda else [512])
    cli.add_argument("--chunk", type=parse_tokens, default=16384 if cuda else 128)
    cli.add_argument("--depths", type=int, default=11)
    cli.add_argument("--each", type=int, default=4, help="pairs at each depth")
    cli.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    dtype = torch.bfloat16 if setup.device.type == "cuda" else torch.float32
    model = build_model(setup.device, dtype, args.seed)
    model.compile(backend=headinfer, options={"lowering": args.lowering})
    rows = []
    for context in args.context:
        row = run(model, setup, context, args.chunk, args.depths, args.each, args.seed)
        rows.append(row | provenance(setup.device, args.note))
        write_rows(args.out, rows)
        say(
            "%6s: %d of %d right, prefill %.2f s, host pages %s, resident %s",
            format_tokens(context), row["right"], row["asked"], row["prefill_s"],
            show_bytes(row["host_kv_bytes"]), show_bytes(row["resident_bytes"]),
        )  # fmt: skip
        wrong = [cell for cell in row["depths"] if cell["right"] < cell["asked"]]
        if wrong:
            say("       wrong at %s", wrong)
    return rows


if __name__ == "__main__":
    main()
