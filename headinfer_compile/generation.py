"""One streamed, timed run of ``model.generate``, with progress bars on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TextIO, cast

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from headinfer_compile.cache_protocol import cache_argument
from headinfer_compile.tables import live_bytes


@dataclass(frozen=True)
class Generation:
    """What one run gave and how long it took; the times include compilation."""

    tokens: list[int]
    text: str
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 where there was only one."""
        seconds = self.seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / seconds if len(self.tokens) > 1 and seconds > 0 else 0.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed and task.elapsed:
            speed = task.completed / task.elapsed  # one step so far, which tells no rate of its own
        return Text(f"{speed:,.0f} tok/s" if speed else "starting")


class GenerationProgress(Progress):
    """Bars that read the cached length each time they are drawn, and where the KV is.

    A forward hook would be compiled into the model's graphs; reading the cache disturbs nothing.
    """

    def __init__(self, label: str, cache: Cache, prompt_tokens: int, console: Console) -> None:
        self._cache, self._prompt_tokens = cache, prompt_tokens
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[where]}"),
            console=console,
            transient=True,
            # The default window of 30 s can hold less than one chunk.
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self._task = self.add_task(label, total=prompt_tokens, where="")
        self._before = 0

    def start_decode(self, max_new_tokens: int) -> None:
        """The prompt is read: count new tokens from here on."""
        self._before = self._prompt_tokens - 1  # the newest token is not in the cache yet
        self.reset(self._task, total=max_new_tokens, description="decode")

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.tasks:
            done = max(0, self._cache.get_seq_length() - self._before)
            self.update(self._task, completed=done, where=live_bytes(self._cache))
        yield from super().get_renderables()


class _TokenStream(TextStreamer):
    """Writes text as it becomes whole words and notes when the first token came."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        out: TextIO | None,
        first_token: Callable[[], None],
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self._first_token = first_token
        self.first_token_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
            self._first_token()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._out is not None:
            print(text, end="\n" if stream_end else "", file=self._out, flush=True)


def run_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    cache: Cache,
    *,
    label: str,
    console: Console,
    out: TextIO | None,
    seed: int = 0,
    **options: Any,
) -> Generation:
    """Generate after one prompt and stream the text.

    Args:
        model: Compiled or not.
        tokenizer: The model's.
        input_ids: The prompt, int64 ``[1, S]``.
        cache: Empty; holds prompt and answer afterwards.
        label: What the progress bar is called.
        console: Where the bar goes; it is shown on a terminal only.
        out: Where the text goes as it is made; None keeps it.
        seed: Seed of sampling.
        options: Passed to ``generate``.
    """
    prompt_tokens = input_ids.shape[1]
    progress = GenerationProgress(label, cache, prompt_tokens, console)

    def first_token() -> None:
        if out is not None and out.isatty():
            progress.stop()  # the text and a bar would share the screen
        else:
            progress.start_decode(options.get("max_new_tokens", 0))

    stream = _TokenStream(tokenizer, out, first_token)
    torch.manual_seed(seed)
    generate = cast(Callable[..., torch.Tensor], model.generate)
    start = time.perf_counter()
    with progress:
        output = generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=stream,
            **{cache_argument(model): cache},
            **options,
        )
    end = time.perf_counter()
    tokens = output[0, prompt_tokens:].tolist()
    return Generation(
        tokens=tokens,
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        prompt_tokens=prompt_tokens,
        first_token_seconds=(stream.first_token_at or end) - start,
        seconds=end - start,
    )
