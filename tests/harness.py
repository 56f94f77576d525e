"""Tiny models, the resident oracle, and a compiled model that can tell what the compiler did.

The oracle of every token test is the same model, uncompiled, with a ``DynamicCache``: fp32, and
only prompts on which it never has to choose between two almost equal logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from headinfer_compile import CacheStats, HeadInferCache, HeadInferConfig, headinfer
from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.executor import CompiledGraph

VOCAB = 97
#: Chunked prefill starts over at position 0 on a non-empty cache before.
CHUNKED_TURNS = Version(transformers.__version__) >= Version("5.21")
#: Two logits of the oracle that are closer than this are a tie.
TIE = 1e-4
MAX_LOGIT_DIFFERENCE = 1e-4
_WITHOUT_KV = ("linear_attention", "conv")


def tiny_llama(
    seed: int, layers: int = 2, heads: int = 6, kv_heads: int = 3, head_dim: int = 8
) -> LlamaForCausalLM:
    """A random model whose attention is sharp enough that a lost token shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def tiny_mistral(seed: int, window: int, layers: int = 2) -> MistralForCausalLM:
    """A random model every layer of which has a sliding window of ``window`` tokens."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        sliding_window=window,
        max_position_embeddings=2048,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: MistralForCausalLM = MistralForCausalLM(config).eval()
    return model


def _attend_by_hand(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Exact attention in words that no pass knows: a softmax written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).double()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif query.shape[2] > 1:
        seen = torch.ones(*scores.shape[2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(query.dtype)
    return (weights @ value).transpose(1, 2), None


def register_unknown_attention() -> str:
    """Register an attention that the passes decline; returns its ``attn_implementation``."""
    AttentionInterface.register("by_hand", _attend_by_hand)
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    return "by_hand"


def random_ids(seed: int, tokens: int, batch: int = 1) -> Tensor:
    """Random token ids ``[batch, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, tokens), generator=generator)


@dataclass(frozen=True)
class Run:
    """Tokens ``[B, prompt + new]`` and logits ``[B, new, vocab]`` of one ``generate``."""

    tokens: Tensor
    logits: Tensor

    @property
    def tied(self) -> bool:
        """Whether rounding may decide a token."""
        best = self.logits.topk(2).values
        return bool((best[..., 0] - best[..., 1]).min() < TIE)


def generate(model: PreTrainedModel, ids: Tensor, cache: Any, new: int, **options: Any) -> Run:
    """``model.generate`` of exactly ``new`` tokens, greedy unless ``options`` say otherwise."""
    out = model.generate(  # type: ignore[operator]
        ids,
        max_new_tokens=new,
        min_new_tokens=new,
        # Not a token: generate would take the ones it finds in a prompt for padding.
        pad_token_id=VOCAB,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, cache_argument(model): cache, **options},
    )
    return Run(out.sequences, torch.stack(out.logits, dim=1))


class CompiledModel:
    """An oracle and its compiled twin.

    ``graphs`` holds what the backend made of each Dynamo graph. ``use`` changes the backend options
    of graphs made already too, so that many options are tried on one compilation. ``attention`` is
    the twin's ``attn_implementation`` where it is not the oracle's.
    """

    def __init__(
        self, resident: PreTrainedModel, attention: str | None = None, **options: Any
    ) -> None:
        self.resident = resident
        self.options: dict[str, Any] = {"lowering": "eager", **options}
        self.graphs: list[CompiledGraph] = []
        self.model = type(resident)(copy.deepcopy(resident.config)).eval()
        if attention is not None:
            self.model.set_attn_implementation(attention)
        self.model.load_state_dict(resident.state_dict())
        self.model.compile(backend=self._backend)

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = headinfer(gm, example_inputs, options=self.options)
        if isinstance(compiled, CompiledGraph):
            self.graphs.append(compiled)
        return compiled

    def use(self, **options: Any) -> None:
        """Run with these options from now on."""
        self.options = {"lowering": "eager", **options}
        for graph in self.graphs:
            graph.config = HeadInferConfig.from_options(self.options)

    @property
    def layers(self) -> int:
        """Layers of the model that keep K and V."""
        config = self.resident.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full"] * config.num_hidden_layers
        return sum(kind not in _WITHOUT_KV for kind in kinds)

    def cache(self, **options: Any) -> HeadInferCache:
        """A cache of small pages and a small tail, so that little fits on the device."""
        sizes = {"page_tokens": 16, "tail_tokens": 8, "gpu_budget": 0}
        return HeadInferCache(self.resident.config, **{**sizes, **options})

    def prompt(
        self, seed: int, tokens: int, new: int, batch: int = 1, after: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Run]:  # fmt: skip
        """Random tokens (after ``after``) on which the oracle has no tie, and its run on them."""
        for attempt in range(20):
            ids = random_ids(seed + 7919 * attempt, tokens, batch)
            ids = ids if after is None else torch.cat([after, ids], dim=1)
            run = generate(self.resident, ids, self.resident_cache(), new, **options)
            if not run.tied:
                return ids, run
        raise AssertionError(f"20 prompts of seed {seed} with ties: the model is degenerate")

    def resident_cache(self) -> DynamicCache:
        """What the oracle runs on: every token of every attention layer on the device."""
        config = self.resident.config.get_text_config(decoder=True)
        if not set(_WITHOUT_KV).isdisjoint(getattr(config, "layer_types", None) or ()):
            return DynamicCache(config=config)
        return DynamicCache()

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token, all layers, fp32."""
        config = self.resident.config
        return int(2 * self.layers * config.num_key_value_heads * config.head_dim * 4)

    def forward(self, ids: Tensor, cache: Any, chunk: int, **inputs: Any) -> Tensor:
        """Logits ``[B, S, vocab]`` of direct calls on chunks of ``ids``; ``inputs`` go to each."""
        model = self.model if isinstance(cache, HeadInferCache) else self.resident
        inputs[cache_argument(model)] = cache
        with torch.no_grad():
            logits = [
                model(part, use_cache=True, **inputs).logits for part in ids.split(chunk, dim=1)
            ]
        return torch.cat(logits, dim=1)

    def assert_streamed(self, cache: HeadInferCache, resident: bool = False) -> CacheStats:
        """Assert that ``cache`` was served by schedules and by no fallback, from host pages.

        With ``resident`` all of it was on the device, and nothing may have moved.
        """
        stats = cache.stats()
        assert stats.sites_rewritten == self.layers
        if resident:
            assert stats.h2d_bytes == stats.d2h_bytes == stats.host_bytes == 0
            assert stats.resident_bytes > 0
        else:
            assert stats.h2d_bytes > 0
        assert stats.eager_updates == 0
        assert stats.materialised_layers == 0
        return stats


def assert_written_once(stats: CacheStats) -> None:
    """Assert the bounds of D2H traffic and host memory of a cache that was never cropped."""
    assert stats.d2h_bytes <= 1.02 * stats.kv_bytes
    assert stats.host_bytes <= 1.02 * stats.kv_bytes + stats.slab_bytes


def assert_same(run: Run, oracle: Run, limit: float = MAX_LOGIT_DIFFERENCE) -> None:
    """Assert equal tokens, and logits that differ by at most ``limit``."""
    if not torch.equal(run.tokens, oracle.tokens):
        same = (run.tokens == oracle.tokens).all(0).tolist()
        raise AssertionError(f"tokens differ from position {same.index(False)} of {len(same)}")
    difference = float((run.logits - oracle.logits).abs().max())
    assert difference <= limit, f"logits differ by {difference:.2e}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors as small as those of the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def clean_dynamo() -> Iterator[None]:
    """Start with no compiled code, as a new process would, and leave none."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()


def dynamo_graphs() -> int:
    """Graphs that Dynamo has captured since ``clean_dynamo`` began."""
    return int(counters["stats"]["unique_graphs"])


@dataclass
class Expected:
    """Bytes that must move: the rule of the tail and of the pages, replayed on lengths alone.

    All pages are of ``page_tokens`` tokens; the first ``resident`` of them stay on the device.
    """

    token_bytes: int
    page_tokens: int
    tail_tokens: int
    resident: int = 0
    distance: int = 0
    stored: int = 0
    tail: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    carried_bytes: int = 0

    def _host_rows(self, tokens: int) -> int:
        return max(0, tokens - self.resident * self.page_tokens)

    def step(self, new: int, layers: int) -> None:
        """One forward pass of ``new`` tokens over all layers, queries not split."""
        self.h2d_bytes += self._host_rows(self.stored) * self.token_bytes
        self.carried_bytes = 0
        before = self.stored
        if self.tail + new > self.tail_tokens:
            self.stored, self.tail = self.stored + self.tail + new, 0
        elif self.tail + new == self.tail_tokens:
            self.stored, self.tail = self.stored + self.tail_tokens, 0
        else:
            self.tail += new
            if new == 1:
                # The next step's first transfers are under way: one page of one layer each.
                rows = min(self._host_rows(before), self.distance * self.page_tokens)
                self.carried_bytes = rows * self.token_bytes // layers
        moved = self._host_rows(self.stored) - self._host_rows(before)
        self.d2h_bytes += moved * self.token_bytes

    def run(self, prompt: int, chunk: int, new: int, layers: int) -> Expected:
        """``generate`` of ``new`` tokens after a prompt in chunks."""
        lengths: Mapping[bool, Sequence[int]] = {
            True: [min(chunk, prompt - at) for at in range(0, prompt, chunk)],
            False: [1] * (new - 1),
        }
        for length in (*lengths[True], *lengths[False]):
            self.step(length, layers)
        self.h2d_bytes += self.carried_bytes
        return self
