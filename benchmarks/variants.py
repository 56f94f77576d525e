"""The ways to hold a KV cache that the benchmarks compare, behind one interface.

| variant | cache | attention | compiled |
|---|---|---|---|
| resident | DynamicCache | best kernel (``attention.py``) | no |
| resident-compiled | StaticCache | transformers' own (sdpa) | decode, as ``generate`` does it |
| resident-inductor | DynamicCache | best kernel | ``model.compile()`` |
| hf-offloaded | DynamicCache(offloading=True) | best kernel | no |
| hf-offloaded-static | StaticCache(offloading=True) | transformers' own | no |
| paper | ``paper.py`` | FlashAttention-2, head by head | no |
| headinfer[:BUDGET][:OPTION=VALUE]... | HeadInferCache | chosen by site | ``backend="headinfer"`` |

``headinfer`` is ``headinfer:0``; ``headinfer:auto:num_slots=2:cuda_graphs=true`` shows the options.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from benchmarks.attention import register_best
from benchmarks.models import Shape, shape_of, twin
from benchmarks.paper import CHUNK, PaperCache, paper_model
from benchmarks.synthetic import fill_headinfer, fill_transformers
from headinfer_compile import HeadInferCache, headinfer
from headinfer_compile.cache_protocol import cache_argument

log = logging.getLogger(__name__)

DEFAULT = (
    "resident",
    "resident-compiled",
    "hf-offloaded",
    "hf-offloaded-static",
    "paper",
    "headinfer:0",
    "headinfer:1GiB",
    "headinfer:auto",
)


class Variant:
    """One way to hold the cache; ``open`` before, ``close`` after each use."""

    keeps_kv_on_gpu = True
    """Whether an open cache holds device memory in proportion to its tokens."""

    def __init__(self, name: str, model: PreTrainedModel, kernel: str) -> None:
        self.name = name
        self.model = model
        self._argument = cache_argument(model)
        self.kernel = kernel
        self.shape: Shape = shape_of(model)
        self.cache: Any = None

    def chunk(self, wanted: int) -> int:
        """The prefill chunk that this variant uses where ``wanted`` was asked for."""
        return wanted

    def open(self, tokens: int) -> None:
        """Make an empty cache with room for ``tokens`` tokens."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[1, 1, vocab]`` of the last of ``ids`` ``[1, n]``."""
        past = int(self.cache.get_seq_length())
        # As `generate` does: without position_ids the lengths are computed inside the graph.
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        out: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            **{self._argument: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return out

    def decode(self, ids: Tensor) -> Tensor:
        """As ``forward``, for one token."""
        return self.forward(ids)

    def prefill(self, ids: Tensor, chunk: int) -> Tensor:
        """Logits after reading ``ids`` ``[1, n]`` in chunks."""
        return [self.forward(part) for part in ids.split(self.chunk(chunk), dim=1)][-1]

    def fill(self, tokens: int, chunk: int) -> None:
        """Hold ``tokens`` synthetic tokens without a prefill."""
        fill_transformers(self.cache, self.shape, tokens, self.model.device, self.model.dtype)

    def streamed_bytes(self, tokens: int) -> int:
        """Bytes that one decode step over ``tokens`` tokens brings from the host."""
        return 0

    def resident_bytes(self, tokens: int) -> int:
        """KV bytes that one decode step reads where they are, on the device."""
        return tokens * self.shape.kv_token_bytes

    def details(self) -> dict[str, Any]:
        """What a row says about this variant beside its times."""
        return {"kernel": self.kernel}

    def restart(self, tokens: int) -> None:
        """An empty cache again, keeping what may be kept for the next prompt."""
        self.close()
        self.open(tokens)

    def close(self) -> None:
        """Give the cache back."""
        self.cache = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Settings of Dynamo under which the variant runs: torch's own, unless it is ours."""
        before = torch.compiler.config.dynamic_sources
        torch.compiler.config.dynamic_sources = ""
        try:
            yield
        finally:
            torch.compiler.config.dynamic_sources = before


class _Transformers(Variant):
    """Any cache class of transformers."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        kernel: str,
        make: Callable[[int], Cache],
        host: bool,
    ) -> None:
        super().__init__(name, model, kernel)
        self._make = make
        self.keeps_kv_on_gpu = not host

    def open(self, tokens: int) -> None:
        self.cache = self._make(tokens)

    def streamed_bytes(self, tokens: int) -> int:
        return 0 if self.keeps_kv_on_gpu else tokens * self.shape.kv_token_bytes

    def resident_bytes(self, tokens: int) -> int:
        return tokens * self.shape.kv_token_bytes if self.keeps_kv_on_gpu else 0


class _Compiled(_Transformers):
    """Decode by the call that ``generate`` compiles for a static cache."""

    def open(self, tokens: int) -> None:
        super().open(tokens)
        self._call = self.model.get_compiled_call(CompileConfig())

    def decode(self, ids: Tensor) -> Tensor:
        out: Tensor = self._call(
            input_ids=ids,
            use_cache=True,
            logits_to_keep=1,
            **{self._argument: self.cache},
        ).logits
        return out


class _Paper(Variant):
    """The paper's algorithm."""

    keeps_kv_on_gpu = False

    def chunk(self, wanted: int) -> int:
        return min(wanted, CHUNK)

    def open(self, tokens: int) -> None:
        self.cache = PaperCache(self.model.config, tokens, self.model.device, self.model.dtype)

    def restart(self, tokens: int) -> None:
        self.cache.length = 0

    def fill(self, tokens: int, chunk: int) -> None:
        self.cache.fill(tokens)

    def streamed_bytes(self, tokens: int) -> int:
        return tokens * self.shape.kv_token_bytes

    def resident_bytes(self, tokens: int) -> int:
        return 0

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()
        super().close()


class _HeadInfer(Variant):
    """This project."""

    def __init__(
        self, name: str, model: PreTrainedModel, budget: int | str, options: dict[str, Any],
        cache_options: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(name, model, "by site")
        self.keeps_kv_on_gpu = budget != 0
        self._budget, self._cache_options = budget, cache_options
        model.compile(backend=headinfer, options=options)

    def open(self, tokens: int) -> None:
        self.cache = HeadInferCache(
            self.model.config, gpu_budget=self._budget, **self._cache_options
        )

    def restart(self, tokens: int) -> None:
        if self.keeps_kv_on_gpu:
            super().restart(tokens)
        else:
            self.cache.reset()

    def fill(self, tokens: int, chunk: int) -> None:
        # The first real chunk fixes the geometry, as in a prefill.
        self.forward(
            torch.zeros((1, min(chunk, tokens)), dtype=torch.long, device=self.model.device)
        )
        fill_headinfer(self.cache, tokens)

    def streamed_bytes(self, tokens: int) -> int:
        blocks = [b for b in self.cache.session.table.blocks if b.tier == "host"]
        stored = tokens - self.cache.session.tail_rows
        rows = sum(max(0, min(b.tokens, stored - b.start)) for b in blocks)
        return int(rows) * self.shape.kv_token_bytes

    def resident_bytes(self, tokens: int) -> int:
        return tokens * self.shape.kv_token_bytes - self.streamed_bytes(tokens)

    def details(self) -> dict[str, Any]:
        stats = self.cache.stats()
        if stats.eager_updates or stats.materialised_layers:
            log.warning("%s: %s ran without a schedule", self.name, stats)
        names = (
            "kv_bytes resident_bytes host_bytes slab_bytes slot_bytes staging_bytes tail_bytes "
            "fixed_bytes workspace_bytes h2d_bytes d2h_bytes sites_rewritten eager_updates "
            "materialised_layers blocks_by_tier"
        )
        return {"kernel": self.kernel, **{name: getattr(stats, name) for name in names.split()}}

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()
        super().close()

    @contextmanager
    def active(self) -> Iterator[None]:
        yield


class Variants:
    """Makes variants over one set of weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.best, self.kernel = register_best(model.device, model.dtype)

    def make(self, name: str, **options: Any) -> Variant:
        """A variant by name; ``options`` are compile options added to a ``headinfer`` one.

        Raises:
            SystemExit: No variant has this name.
        """
        kind, *rest = name.split(":")
        if kind == "headinfer":
            return self._headinfer(name, rest, options)
        if rest or kind not in (*DEFAULT, "resident-inductor"):
            raise SystemExit(f"{name}: no such variant; there are {', '.join(DEFAULT)}")
        if kind == "paper":
            flash = "flash" if self.model.device.type == "cuda" else "cpu_flash"
            return _Paper(kind, paper_model(self.model, self.best), flash)
        config = self.model.config
        static = "static" in kind or kind == "resident-compiled"
        offloading = kind.startswith("hf-")
        model = twin(self.model, "sdpa" if static else self.best)
        kernel = "sdpa" if static else self.kernel

        def make(tokens: int) -> Cache:
            if static:
                return StaticCache(config=config, max_cache_len=tokens, offloading=offloading)
            return DynamicCache(config=config, offloading=offloading)

        if kind == "resident-compiled":
            return _Compiled(kind, model, kernel, make, False)
        if kind == "resident-inductor":
            model.compile()
        return _Transformers(kind, model, kernel, make, offloading)

    def _headinfer(self, name: str, parts: list[str], options: dict[str, Any]) -> Variant:
        budget = "0"
        cache_options: dict[str, Any] = {}
        for part in parts:
            key, sign, text = part.partition("=")
            if not sign:
                budget = part
                continue
            target = cache_options if key in ("page_tokens", "tail_tokens") else options
            # `inductor.coordinate_descent_tuning=true` is an entry of the option `inductor`.
            key, dot, entry = key.partition(".")
            if dot:
                target, key = target.setdefault(key, {}), entry
            target[key] = _value(text)
        limit = int(budget) if budget.isdecimal() else budget
        return _HeadInfer(name, twin(self.model, "sdpa"), limit, options, cache_options)

    def unavailable(self, name: str) -> str | None:
        """Why a variant cannot run here, or None."""
        if name.startswith("hf-") and self.model.device.type != "cuda":
            return "transformers offloads from CUDA only"
        return None


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
