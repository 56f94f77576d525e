"""Are the logits those of a resident cache? The difference, beside that of two resident kernels.

In bf16 no two kernels agree bit for bit. The model is run with KV resident once for each kernel
that is there, and once with all KV in host RAM; every run reads the same prompt in the same chunks
and then the same tokens one by one. ``ours`` is the smallest relative difference of our logits from
those of a resident run, ``spread`` the largest between two resident runs, both over all forwards.

Inductor's regions round less often than the resident runs' eager layers, which moves the logits as
much as another kernel does; ``--lowering eager`` compares attention alone.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.attention import register_kernel, resident_kernels
from benchmarks.common import Row, parse_tokens, parser, prepare, provenance, say, write_rows
from benchmarks.models import build, twin
from benchmarks.prefill import make_variant
from benchmarks.variants import Variant, Variants


def run(variant: Variant, ids: Tensor, following: Tensor, chunk: int) -> Tensor:
    """fp32 logits ``[forwards, vocab]`` of the last token of every chunk and decode step."""
    parts = [*ids.split(chunk, dim=1), *following.split(1, dim=1)]
    with torch.no_grad(), variant.active():
        variant.open(ids.shape[1] + following.shape[1])
        found = [variant.forward(part)[0, -1].float().clone() for part in parts]
    return torch.stack(found)


def difference(a: Tensor, b: Tensor) -> float:
    """Relative difference of two runs' logits."""
    return float((a - b).norm() / b.norm())


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the benchmark; returns the row that was written."""
    cli = parser("logits", "Our logits against those of resident kernels.")
    cuda = torch.cuda.is_available()
    add = cli.add_argument
    add("--context", type=parse_tokens, default=32 << 10 if cuda else 512)
    add("--chunk", type=parse_tokens, default=16384 if cuda else 200)
    add("--steps", type=int, default=8, help="decode steps after the prompt")
    add("--variant", default="headinfer:0")
    add("--lowering", choices=("inductor", "eager"), default="inductor")
    args = cli.parse_args(argv)
    setup = prepare(args)
    model = build(args.model, setup.device, layers=args.layers)
    variants = Variants(model)
    vocab = model.config.vocab_size
    ids, following = (
        torch.randint(0, vocab, (1, count), device=setup.device)
        for count in (args.context, args.steps)
    )
    logits: dict[str, Tensor] = {}
    for name, kernel in resident_kernels(setup.device, model.dtype).items():
        # transformers takes a name with "flash" in it for a package of its own.
        # One query token takes the kernel too: two runs would else agree there bit for bit.
        register_kernel(f"resident_{len(logits)}", kernel, setup.device, model.dtype, kernel)
        variant = variants.make("resident")
        variant.model = twin(model, f"resident_{len(logits)}")
        logits[name] = run(variant, ids, following, args.chunk)
        variant.close()
        say("%s done", name)
    ours = make_variant(variants, args.variant, args.lowering)
    found = run(ours, ids, following, args.chunk)
    details = ours.details()
    ours.close()
    apart = {
        f"{a}-{b}": difference(logits[a], logits[b]) for a, b in itertools.combinations(logits, 2)
    }
    from_ours = {name: difference(found, other) for name, other in logits.items()}
    nearest, spread = min(from_ours.values()), max(apart.values())
    by_forward = {
        f"{a}-{b}": [difference(x, y) for x, y in zip(runs[a], runs[b], strict=True)]
        for runs in ({**logits, "ours": found},)
        for a, b in itertools.combinations(runs, 2)
    }
    agree = {
        name: int((found.argmax(-1) == other.argmax(-1)).sum()) for name, other in logits.items()
    }
    row: Row = {
        "id": f"logits/{setup.tag}/{args.model}/{args.variant}/{args.lowering}/n{args.context}",
        "case": "logits",
        "context": args.context, "chunk": args.chunk, "variant": args.variant,
        "forwards": found.shape[0], "ours": nearest, "spread": spread, "from_ours": from_ours,
        "between_resident": apart, "by_forward": by_forward, "same_argmax": agree,
        "details": details,
    }  # fmt: skip
    row |= provenance(setup.device, args.note)
    write_rows(args.out, [row])
    say("ours %.3e (nearest of %s), resident kernels differ by up to %.3e; same argmax %s of %d",
        nearest, from_ours, spread, agree, found.shape[0])  # fmt: skip
    return [row]


if __name__ == "__main__":
    main()
