"""Log-probabilities of an answer's tokens: the model's own, whatever chose them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import Model, OptionError

PROMPT = "Tell me a bedtime story. Tell me a bedtime story."


@pytest.fixture(scope="module", params=["mlx", "litert"])
def model(request: pytest.FixtureRequest) -> Model:
    return gemma_multi.load(
        tiny_checkpoint(vocab_size=4096), backend=request.param, precision="float32"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "prompt_lookup": True},
        {"temperature": 1.5, "top_k": 3, "seed": 1, "repetition_penalty": 1.2},
    ],
)
def test_they_are_those_of_a_second_reading(model: Model, options: dict[str, Any]) -> None:
    plain = model.generate(PROMPT, max_tokens=20, **options)
    result = model.generate(PROMPT, max_tokens=20, logprobs=3, **options)
    assert (result.tokens, plain.logprobs) == (plain.tokens, ())
    assert [one.token for one in result.logprobs] == list(result.tokens)
    ids = model.encode(PROMPT)
    again = model.logprobs([*ids, *result.tokens])[len(ids) - 1 :]
    assert np.allclose([one.logprob for one in result.logprobs], again, atol=1e-4)
    for one in result.logprobs:
        best = [logprob for _, logprob in one.top]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert one.logprob <= best[0]
        assert dict(one.top).get(one.token, one.logprob) == one.logprob


def test_a_stop_text_takes_its_tokens_logprobs_with_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=20, temperature=0, logprobs=0)
    stop = model.tokenizer.decode(whole.tokens)[8:10]
    result = model.generate(PROMPT, max_tokens=20, temperature=0, logprobs=0, stop=stop)
    assert 0 < len(result.tokens) < 20
    assert result.logprobs == whole.logprobs[: len(result.tokens)]
    assert all(one.top == () for one in result.logprobs)


def test_what_cannot_be_told(model: Model) -> None:
    with pytest.raises(OptionError, match="logprobs cannot be had where schema decides"):
        model.generate(PROMPT, schema={"type": "object"}, logprobs=1)
    for bad in (-1, 21, True, 1.0):
        with pytest.raises(OptionError, match="logprobs is"):
            model.generate(PROMPT, logprobs=bad)
