"""What ``generate`` can do besides greedy decoding, with the resident model's tokens each time.

k query tokens (a draft model's, or those of a prompt lookup) cost one pass over the streamed KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from harness import (
    MAX_LOGIT_DIFFERENCE,
    CompiledModel,
    assert_same,
    clean_dynamo,
    generate,
    random_ids,
    tiny_llama,
)

NEW = 16


@pytest.fixture(scope="module")
def llama(run_seed: int) -> Iterator[CompiledModel]:
    """One compiled model with 3 KV heads for all tests of this module."""
    with clean_dynamo():
        yield CompiledModel(tiny_llama(run_seed))


SAMPLING: dict[str, dict[str, Any]] = {
    "top k": {"temperature": 1.3, "top_k": 40},
    "top p": {"temperature": 0.9, "top_k": 0, "top_p": 0.8},
    "min p": {"top_k": 0, "min_p": 0.02},
    "typical": {"top_k": 0, "typical_p": 0.9, "repetition_penalty": 1.2},
}


@pytest.mark.oldest
@pytest.mark.parametrize(
    "kind", ["top k", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(SAMPLING)[1:])]
)
def test_sampled_tokens(llama: CompiledModel, seed: int, kind: str) -> None:
    ids = random_ids(seed, 90)
    options = {"do_sample": True, **SAMPLING[kind]}
    torch.manual_seed(seed)
    oracle = generate(llama.resident, ids, llama.resident_cache(), NEW, **options)
    cache = llama.cache()
    torch.manual_seed(seed)
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=40, **options), oracle)
    llama.assert_streamed(cache)
    torch.manual_seed(seed + 1)
    other = generate(llama.resident, ids, llama.resident_cache(), NEW, **options)
    assert not torch.equal(other.tokens, oracle.tokens)


class _Favour(LogitsProcessor):
    """Makes every third token a fixed one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 3 == 0:
            scores = scores.clone()
            scores[:, 5] = scores.max() + 1
        return scores


class _StopAt(StoppingCriteria):
    """Stops when there are ``tokens`` tokens, or raises then."""

    def __init__(self, tokens: int, error: type[BaseException] | None = None) -> None:
        self.tokens = tokens
        self.error = error

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        stop = input_ids.shape[1] >= self.tokens
        if stop and self.error is not None:
            raise self.error
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device)


@pytest.mark.oldest
def test_logits_processors(llama: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 70)
    options: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([_Favour()]),
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [11, 12]],
    }
    oracle = generate(llama.resident, ids, llama.resident_cache(), NEW, **options)
    cache = llama.cache()
    assert_same(generate(llama.model, ids, cache, NEW, prefill_chunk_size=30, **options), oracle)
    llama.assert_streamed(cache)
    # `output_logits` are those before the processors; the tokens show that they were at work.
    assert 5 in oracle.tokens[0, 70:].tolist()


@pytest.mark.oldest
def test_stopping_criteria(llama: CompiledModel, seed: int) -> None:
    ids, oracle = llama.prompt(seed, 70, NEW)
    cache = llama.cache()
    out = llama.model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=97,
        stopping_criteria=StoppingCriteriaList([_StopAt(77)]),
    )  # fmt: skip
    assert torch.equal(out, oracle.tokens[:, :77])
    assert cache.get_seq_length() == 76
    llama.assert_streamed(cache)


class _Collect(BaseStreamer):
    """Keeps what it is given, and raises after ``limit`` calls."""

    def __init__(self, limit: int | None = None) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._limit = limit

    def put(self, value: Tensor) -> None:
        if self._limit == 0:
            raise KeyboardInterrupt
        self._limit = None if self._limit is None else self._limit - 1
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer(llama: CompiledModel, seed: int) -> None:
    ids, oracle = llama.prompt(seed, 50, NEW)
    cache, streamer = llama.cache(), _Collect()
    assert_same(generate(llama.model, ids, cache, NEW, streamer=streamer), oracle)
    assert streamer.tokens == oracle.tokens[0].tolist() and streamer.ended
    llama.assert_streamed(cache)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "when",
    [
        "later token",
        pytest.param("first token", marks=pytest.mark.slow),
        pytest.param("stopping criterion", marks=pytest.mark.slow),
    ],
)
def test_a_turn_after_an_interrupted_one(llama: CompiledModel, seed: int, when: str) -> None:
    """Ctrl-C between two forwards: the cache holds what was read, and the conversation goes on."""
    ids, oracle = llama.prompt(seed, 60, NEW)
    cache = llama.cache()
    # The streamer is given the prompt first.
    options: dict[str, Any] = {"streamer": _Collect({"first token": 1, "later token": 7}.get(when))}
    if when == "stopping criterion":
        criterion = _StopAt(66, error=KeyboardInterrupt)
        options = {"stopping_criteria": StoppingCriteriaList([criterion])}
    with pytest.raises(KeyboardInterrupt):
        generate(llama.model, ids, cache, NEW, prefill_chunk_size=25, **options)
    held = cache.get_seq_length()
    assert held == {"first token": 60, "later token": 66, "stopping criterion": 65}[when]
    assert cache.stats().tokens == held
    ids, oracle = llama.prompt(seed + 1, 9, NEW, after=oracle.tokens[:, : held + 1])
    assert_same(generate(llama.model, ids, cache, NEW), oracle)
    llama.assert_streamed(cache)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> tuple[Any, Any, CompiledModel]:
    """Tokenizer, resident model and compiled model of the tiny checkpoint."""
    resident = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    resident.generation_config.eos_token_id = None
    return AutoTokenizer.from_pretrained(tiny_checkpoint), resident, CompiledModel(resident)


TEXT = "A page stores the K and V of one layer; it never moves. " * 2


def test_text_streamed_from_a_thread(checkpoint: tuple[Any, Any, CompiledModel]) -> None:
    """The usual chat server: ``generate`` in a thread, text taken from an iterator."""
    tokenizer, resident, m = checkpoint
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    cache = m.cache()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=generate, args=(m.model, ids, cache, NEW), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    oracle = generate(resident, ids, m.resident_cache(), NEW)
    assert text == tokenizer.decode(oracle.tokens[0, ids.shape[1] :])
    m.assert_streamed(cache)


@pytest.mark.oldest
def test_pipeline(checkpoint: tuple[Any, Any, CompiledModel]) -> None:
    tokenizer, resident, m = checkpoint
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    want = pipeline("text-generation", model=resident, tokenizer=tokenizer)(TEXT, **options)
    for model in (m.model, resident):
        model.generation_config.eos_token_id = None
    cache = m.cache()
    pipe = pipeline("text-generation", model=m.model, tokenizer=tokenizer)
    assert pipe(TEXT, past_key_values=cache, **options) == want
    m.assert_streamed(cache)


@pytest.mark.slow
@pytest.mark.oldest
def test_stop_strings(checkpoint: tuple[Any, Any, CompiledModel]) -> None:
    tokenizer, resident, m = checkpoint
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    free = generate(resident, ids, m.resident_cache(), NEW).tokens[0, ids.shape[1] :]
    stop = next(text for text in map(tokenizer.decode, free[5:]) if text.isascii())
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "tokenizer": tokenizer,
        "stop_strings": [stop],
    }  # fmt: skip
    cache = m.cache()
    want = resident.generate(ids, **options)
    assert torch.equal(m.model.generate(ids, past_key_values=cache, **options), want)
    assert want.shape[1] < ids.shape[1] + NEW
    m.assert_streamed(cache)


def assistant(seed: int, twin: CompiledModel | None = None, **config: Any) -> Any:
    """A draft model that always proposes 4 tokens; with ``twin`` it is always right."""
    model = tiny_llama(seed, layers=2 if twin else 1)
    if twin is not None:
        model.load_state_dict(twin.resident.state_dict())
    settings = model.generation_config
    settings.num_assistant_tokens = 4
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    return model


@pytest.mark.oldest
def test_a_draft_model_that_is_right(llama: CompiledModel, seed: int) -> None:
    """Five tokens a pass: the link carries a fifth of the bytes of greedy decoding."""
    llama.use(disable_passes=("hoist_prefetch",))
    ids, oracle = llama.prompt(seed, 100, NEW)
    plain, cache = llama.cache(), llama.cache()
    assert_same(generate(llama.model, ids, plain, NEW), oracle)
    draft = assistant(seed, twin=llama)
    assert_same(generate(llama.model, ids, cache, NEW, assistant_model=draft), oracle)
    assert cache.get_seq_length() == plain.get_seq_length() == 100 + NEW - 1
    stats, greedy = llama.assert_streamed(cache), llama.assert_streamed(plain)
    # The prompt and the first five tokens are one pass, which reads nothing; then 5 tokens each.
    assert greedy.h2d_bytes >= (NEW - 1) * 100 * llama.token_bytes
    assert stats.h2d_bytes <= (NEW // 5) * (100 + NEW) * llama.token_bytes
    llama.use()


@pytest.mark.oldest
@pytest.mark.parametrize(
    "tail_tokens", [8, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (3, 64))]
)
def test_a_draft_model_that_is_wrong(llama: CompiledModel, seed: int, tail_tokens: int) -> None:
    """Rejected tokens are cropped: within the tail, at its edge and out of pages."""
    ids, oracle = llama.prompt(seed, 70, NEW)
    cache = llama.cache(tail_tokens=tail_tokens)
    assert_same(generate(llama.model, ids, cache, NEW, assistant_model=assistant(seed)), oracle)
    assert cache.get_seq_length() <= 70 + NEW - 1
    llama.assert_streamed(cache)
    ids, oracle = llama.prompt(seed + 1, 9, NEW, after=oracle.tokens)
    assert_same(generate(llama.model, ids, cache, NEW), oracle)


@pytest.mark.slow
def test_sampling_with_a_draft_model(llama: CompiledModel, seed: int) -> None:
    ids = random_ids(seed, 60)
    runs = []
    cache = llama.cache()
    for model, kv in ((llama.resident, llama.resident_cache()), (llama.model, cache)):
        torch.manual_seed(seed)
        draft = assistant(seed, twin=llama)
        runs.append(generate(model, ids, kv, NEW, assistant_model=draft, do_sample=True))
    assert_same(runs[1], runs[0])
    llama.assert_streamed(cache)


@pytest.mark.oldest
def test_prompt_lookup(llama: CompiledModel, seed: int) -> None:
    """Candidates come from the prompt, which repeats itself; most are wrong and cropped."""
    part = random_ids(seed, 12)
    ids = torch.cat([part] * 6, 1)
    oracle = generate(llama.resident, ids, llama.resident_cache(), NEW)
    cache = llama.cache()
    run = generate(llama.model, ids, cache, NEW, prompt_lookup_num_tokens=5)
    assert_same(run, oracle)
    llama.assert_streamed(cache)


@pytest.mark.parametrize("tokens", [1, 9, pytest.param(64, marks=pytest.mark.slow)])
def test_k_query_tokens_stream_the_cache_once(llama: CompiledModel, seed: int, tokens: int) -> None:
    llama.use(disable_passes=("hoist_prefetch",))
    ids = random_ids(seed, 160 + tokens)
    cache = llama.cache(tail_tokens=2)
    llama.forward(ids[:, :160], cache, 80)
    before = cache.stats().h2d_bytes
    got = llama.forward(ids[:, 160:], cache, tokens)
    assert llama.assert_streamed(cache).h2d_bytes - before == 160 * llama.token_bytes
    want = llama.forward(ids, llama.resident_cache(), 160 + tokens)[:, 160:]
    assert float((got - want).abs().max()) <= MAX_LOGIT_DIFFERENCE
    llama.use()
