"""A conversation on one cache: each turn computes only the tokens that are new.

Type a line and press return; an empty line or end of file ends the conversation. ``--say`` gives
the lines instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from example_model import Loaded, load, parser

from headinfer_compile import HeadInferCache

MARK = "\x00ANSWER\x00"


def turn_text(loaded: Loaded, said: str, first: bool) -> str:
    """The text of a user's turn, up to where the model answers.

    A later turn is what the template puts behind an answer, so that the tokens of the answers in
    the cache are the ones that were generated, and are not encoded anew.
    """
    if loaded.tokenizer.chat_template is None:
        return f"{'' if first else chr(10)}User: {said}\nAssistant:"
    messages = [{"role": "user", "content": said}]
    if not first:
        earlier = [{"role": "user", "content": ""}, {"role": "assistant", "content": MARK}]
        messages = [*earlier, *messages]
    text = str(
        loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    )
    return text.split(MARK)[-1]


def answer(
    loaded: Loaded, cache: HeadInferCache, conversation: torch.Tensor, new: int
) -> torch.Tensor:
    """The conversation ``[1, S]`` with an answer of at most ``new`` tokens, without its end token.

    All of it is passed; ``generate`` feeds what the cache does not hold.
    """
    output = loaded.model.generate(  # type: ignore[operator]
        conversation, cache=cache, max_new_tokens=new, do_sample=False
    )
    assert isinstance(output, torch.Tensor)
    ended = int(output[0, -1]) == loaded.tokenizer.eos_token_id
    return output[:, :-1] if ended else output


def lines() -> Iterator[str]:
    """What the user types, until an empty line."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit code."""
    options = parser(__doc__)
    options.add_argument("--say", action="append", help="a line of the user; may be repeated")
    options.add_argument("--max-new-tokens", type=int, default=64)
    args = options.parse_args(argv)
    loaded = load(args)
    with loaded.cache() as cache:
        conversation = torch.empty(1, 0, dtype=torch.int64, device=loaded.device)
        for said in args.say or lines():
            turn = loaded.encode(turn_text(loaded, said, first=conversation.shape[1] == 0))
            conversation = torch.cat([conversation, turn], dim=1)
            held = cache.get_seq_length()
            prompt = conversation.shape[1]
            conversation = answer(loaded, cache, conversation, args.max_new_tokens)
            text = loaded.tokenizer.decode(conversation[0, prompt:], skip_special_tokens=True)
            print(str(text).strip())
            print(f"({prompt - held} of {prompt} tokens were new)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
