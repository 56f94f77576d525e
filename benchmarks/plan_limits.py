"""How long a context fits on the paper's machine? The plan beside Table 3 and 4 of the paper.

Nothing is run: the machine (24 GiB GPU, 512 GiB of host memory for KV, PCIe 4) is described.
HeadInfer is arXiv 2502.12574; its limits are in units of 1,024 tokens.
"""

from __future__ import annotations

import torch

from benchmarks.common import Row, parser, prepare, provenance, say, show_bytes, write_rows
from headinfer_compile import plan

PAPER = {
    "llama-3-8b": (4096, "host memory", 1),
    "llama-2-7b": (1024, "host memory", 1),
    "mistral-7b": (4096, "host memory", 1),
    "qwen2-7b": (4200, "GPU memory", 1),
    "gemma-2-9b": (1300, "GPU memory", 1),
    "llama-3-70b": (1000, "GPU memory", 8),
}
"""The paper's limit, what bounds it there, and the number of cards."""


def main(argv: list[str] | None = None) -> list[Row]:
    """Plan every model of the paper; returns the rows that were written."""
    cli = parser("plan_limits", "The largest context on the paper's machine.")
    args = cli.parse_args(argv)
    prepare(args)
    rows: list[Row] = []
    for name, (limit, reason, gpus) in PAPER.items():
        made = plan(
            name, context="128K", gpus=gpus, gpu_memory="24GiB", host_memory="512GiB",
            link="25GB/s", tflops=165,
        )  # fmt: skip
        longest = plan(
            name, context=made.max_context, gpus=gpus, gpu_memory="24GiB", host_memory="512GiB",
            link="25GB/s", tflops=165,
        )  # fmt: skip
        row: Row = {
            "id": f"plan_limits/{name}", "case": "plan_limits", "model": name, "gpus": gpus,
            "max_context": made.max_context, "bound": made.limits["context"].split(":")[0],
            "gpu_bytes": longest.gpu_bytes, "host_bytes": longest.host_bytes,
            "paper_context": limit * 1024, "paper_bound": reason,
            "ratio": round(made.max_context / (limit * 1024), 4), "planned": True,
        }  # fmt: skip
        rows.append(row | provenance(torch.device("cpu"), args.note))
        say(
            "%-12s %11s tokens, bound by %s (GPU %s, host %s); paper %s, bound by %s",
            name, f"{made.max_context:,}", row["bound"], show_bytes(longest.gpu_bytes),
            show_bytes(longest.host_bytes), f"{limit * 1024:,}", reason,
        )  # fmt: skip
    write_rows(args.out, rows)
    return rows


if __name__ == "__main__":
    main()
