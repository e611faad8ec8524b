"""What the endpoints have in common: an answer's options, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_multi.generation import GenerationResult, TokenLogprobs
from gemma_multi.serving.errors import invalid
from gemma_multi.serving.requests import Several
from gemma_multi.serving.tickets import Generation
from gemma_multi.tokenizer import Tokenizer

_SEEDS = 1 << 64
_NEVER = -9999.0  # JSON has no -infinity; what OpenAI writes for it


def generations(prompt: Any, options: Mapping[str, Any], n: int | None = None) -> list[Generation]:
    """`n` answers to a prompt, each with a seed of its own."""
    seed = options.get("seed")
    own = [{} if seed is None else {"seed": (seed + i) % _SEEDS} for i in range(n or 1)]
    return [Generation(prompt, {**options, **one}) for one in own]


def several_options(body: Several) -> dict[str, Any]:
    """Raises ApiError for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise invalid(
            "stream_options is for a stream; set stream, or leave it out", "stream_options"
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {**body.sampling(), **({"stop": stop} if stop else {})}


def wants_usage(body: Several) -> bool:
    """Whether a stream is to end with it."""
    return bool(body.stream_options and body.stream_options.include_usage)


def finish_reason(result: GenerationResult) -> str:
    """An answer whose time was up ended for want of room, as one that reached max_tokens did."""
    if result.calls:
        return "tool_calls"
    return "stop" if result.finish_reason == "stop" else "length"


def usage(results: Sequence[GenerationResult], n: int = 1) -> dict[str, Any]:
    """Tokens; a prompt that `n` answers in a row share counts once."""
    prompts = results[::n]
    prompt = sum(one.prompt_tokens for one in prompts)
    said = sum(one.generated_tokens for one in results)
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in prompts)},
    }  # fmt: skip


def chat_logprobs(tokenizer: Tokenizer, told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As chats have them."""
    return {
        "content": [
            {**_token(tokenizer, one.token, one.logprob),
             "top_logprobs": [_token(tokenizer, *other) for other in one.top]}
            for one in told
        ],
        "refusal": None,
    }  # fmt: skip


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token)
    return {
        "token": spelled.decode(errors="replace"), "logprob": max(logprob, _NEVER),
        "bytes": list(spelled),
    }  # fmt: skip


def completion_logprobs(
    tokenizer: Tokenizer, told: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:  # fmt: skip
    """As completions have them; the text of `told` begins at `offset`."""
    texts = [tokenizer.token_bytes(one.token).decode(errors="replace") for one in told]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(one.logprob, _NEVER) for one in told],
        "top_logprobs": [
            {tokenizer.token_bytes(token).decode(errors="replace"): max(logprob, _NEVER)
             for token, logprob in one.top}
            for one in told
        ],
        "text_offset": offsets,
    }  # fmt: skip
