"""HeadInfer's published algorithm (arXiv 2502.12574), ported to run eagerly on current releases.

One KV head is one step: its queries, keys and values are projected, the head's whole KV is brought
into one of two device slots while the head before it is attended, and FlashAttention-2 attends it.
Granted beyond the released code: copies are ordered by events with no host synchronisation, only
new rows are written back, host memory is one exact pinned buffer a layer, slots are allocated once,
and the last head of a layer starts the first of the next, across decode steps too.

Legend: B batch (1), G query heads of one KV head, n new tokens, S room of a slot, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.attention import make_attend
from benchmarks.models import twin
from headinfer_compile.runtime import kernels

CHUNK = 10240
"""The paper's prefill chunk."""


class _Queues:
    """Copies down and up on streams of their own, ordered by events; on a CPU all is in order."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._streams = {name: torch.cuda.Stream(device) for name in ("h2d", "d2h")}
            self._streams["compute"] = torch.cuda.current_stream(device)

    def event(self) -> torch.cuda.Event | None:
        """An event that nothing has recorded yet."""
        return torch.cuda.Event() if self.cuda else None

    def on(self, name: str) -> AbstractContextManager[object]:
        """Context that makes a queue current."""
        return torch.cuda.stream(self._streams[name]) if self.cuda else nullcontext()

    def record(self, event: torch.cuda.Event | None, name: str) -> None:
        """Record ``event`` on a queue."""
        if event is not None:
            event.record(self._streams[name])

    def wait(self, event: torch.cuda.Event | None, name: str) -> None:
        """Make a queue wait for ``event``; the host does not wait."""
        if event is not None:
            self._streams[name].wait_event(event)


class PaperCache(Cache):
    """Host KV by head, and two slots that hold one whole head each."""

    def __init__(
        self, config: PretrainedConfig, tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.length = 0
        self.heads, self.num_layers = config.num_key_value_heads, config.num_hidden_layers
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.queues = _Queues(device)
        size = (self.heads, 2, 1, 1, tokens, dim)
        self._host = [torch.empty(size, dtype=dtype).zero_() for _ in range(self.num_layers)]
        if self.queues.cuda:
            # Pinned without the caching allocator, which rounds up to a power of two.
            for layer in self._host:
                status = torch.cuda.cudart().cudaHostRegister(layer.data_ptr(), layer.nbytes, 0)
                if int(status) != 0:
                    raise MemoryError(f"the driver refused to pin {layer.nbytes} bytes ({status})")
        self._slots = torch.empty((2, 2, 1, 1, tokens, dim), dtype=dtype, device=device)
        new_event = self.queues.event
        self._filled, self._freed, self._stored = (
            [new_event() for _ in range(2)] for _ in range(3)
        )
        self._written = [[new_event() for _ in range(self.heads)] for _ in range(self.num_layers)]
        self._turn = 0
        self.h2d_bytes = self.d2h_bytes = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held."""
        return self.length

    def start(self, layer_idx: int, head: int, rows: int) -> None:
        """Start filling the other slot with the first ``rows`` tokens of a head."""
        slot, queues = (self._turn + 1) % 2, self.queues
        if rows == 0:
            return
        queues.wait(self._freed[slot], "h2d")
        queues.wait(self._stored[slot], "h2d")
        queues.wait(self._written[layer_idx][head], "h2d")
        with queues.on("h2d"):
            for part in range(2):
                target = self._slots[slot, part, 0, 0, :rows]
                target.copy_(self._host[layer_idx][head, part, 0, 0, :rows], non_blocking=True)
                self.h2d_bytes += target.nbytes
        queues.record(self._filled[slot], "h2d")

    def append(self, layer_idx: int, head: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new rows ``[1, 1, n, D]`` of a head to its slot and the host; all of its K and V."""
        slot, queues, past = self._turn % 2, self.queues, self.length
        total = past + k.shape[2]
        queues.wait(self._filled[slot], "compute")
        # A slot without past rows was not prefetched, so its last write-back was not waited for.
        queues.wait(self._stored[slot], "compute")
        for part, new in enumerate((k, v)):
            self._slots[slot, part, :, :, past:total] = new
        ready = queues.event()
        queues.record(ready, "compute")
        queues.wait(ready, "d2h")
        with queues.on("d2h"):
            for part in range(2):
                source = self._slots[slot, part, 0, 0, past:total]
                self._host[layer_idx][head, part, 0, 0, past:total].copy_(source, non_blocking=True)
                self.d2h_bytes += source.nbytes
        queues.record(self._stored[slot], "d2h")
        queues.record(self._written[layer_idx][head], "d2h")
        return self._slots[slot, 0, :, :, :total], self._slots[slot, 1, :, :, :total]

    def release(self) -> None:
        """The slot in use has been read: the next head's turn."""
        self.queues.record(self._freed[self._turn % 2], "compute")
        self._turn += 1

    def fill(self, tokens: int) -> None:
        """Hold ``tokens`` random tokens, for decode without a prefill."""
        dim, dtype, device = self._slots.shape[-1], self._slots.dtype, self._slots.device
        rows = torch.randn((tokens, dim), dtype=dtype, device=device)
        for layer in self._host:
            for head in range(self.heads):
                for part in range(2):
                    layer[head, part, 0, 0, :tokens].copy_(rows, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.length = tokens
        self.start_first()

    def start_first(self) -> None:
        """Bring the first head of the first layer into the slot whose turn it is."""
        self._turn -= 1
        self.start(0, 0, self.length)
        self._turn += 1

    def close(self) -> None:
        """Wait for copies and give host memory back."""
        if self.queues.cuda:
            torch.cuda.synchronize(self._slots.device)
            for layer in self._host:
                torch.cuda.cudart().cudaHostUnregister(layer.data_ptr())
        self._host.clear()


class PaperAttention(nn.Module):
    """One layer's attention, head by head, over the projections of an existing layer."""

    def __init__(self, attention: Any, attend: Any, one: kernels.Run) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.group = attention.num_key_value_groups
        self.scaling = attention.scaling
        self._attend, self._one = attend, one

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        cache: PaperCache | None = None, past_key_values: PaperCache | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend ``[B, n, hidden]``; transformers before 5.24 gives ``past_key_values``."""
        cache = past_key_values if cache is None else cache
        assert cache is not None
        layer = self.layer_idx
        past, n = cache.length, hidden_states.shape[1]
        outs = []
        for head in range(cache.heads):
            last = head + 1 == cache.heads
            if not last:
                cache.start(layer, head + 1, past)
            elif layer + 1 < cache.num_layers:
                cache.start(layer + 1, 0, past)
            else:
                cache.start(0, 0, past + n)
            q = self._project(self.q_proj, hidden_states, head, self.group)
            k = self._project(self.k_proj, hidden_states, head, 1)
            v = self._project(self.v_proj, hidden_states, head, 1)
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            keys, values = cache.append(layer, head, k, v)
            if n == 1:
                out = self._one(q, keys, values, scale=self.scaling, causal=False, mask=None)[0]
            else:
                out = self._attend(q, keys, values, self.scaling)
            outs.append(out)
            cache.release()
        if layer + 1 == cache.num_layers:
            cache.length = past + n
        joined = torch.cat(outs, dim=1).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return self.o_proj(joined), None

    def _project(self, linear: nn.Linear, x: Tensor, head: int, heads: int) -> Tensor:
        """``[B, heads, n, D]`` of the rows of one KV head's weights."""
        rows = slice(head * heads * self.head_dim, (head + 1) * heads * self.head_dim)
        bias = None if linear.bias is None else linear.bias[rows]
        out = F.linear(x, linear.weight[rows], bias)
        return out.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)


def paper_model(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model over the same weights whose attention layers run the paper's loop.

    Args:
        model: The model whose weights are used.
        attention: A registered attention function that needs no mask, so that none is built.
    """
    made = twin(model, attention)
    device, dtype = model.device, model.dtype
    cuda_half = device.type == "cuda" and dtype != torch.float32
    run = kernels.flash if cuda_half else kernels.efficient
    if device.type != "cuda":
        run = kernels.cpu_flash
    attend = make_attend(run, device, dtype)
    for layer in made.model.layers:
        layer.self_attn = PaperAttention(layer.self_attn, attend, run)
    return made
