"""EleutherAI's lm-evaluation-harness asks, this package's engines answer: `--model gemma-multi`.

    python -m gemma_multi.evaluation --model gemma-multi \\
        --model_args pretrained=storyteller,backend=litert --tasks arc_easy

is `lm_eval` itself, with this model known to it. Releases of lm_eval after 0.4.13 find the model by
its entry point, and `lm_eval --model gemma-multi` is enough; with those before, a program of one's
own imports this module first.

Design choices:
- How texts are cut into context and continuation, and contexts into tokens, is the harness's own
  (`TemplateLM`), so that figures can stand beside those of its other models.
- A context is read once for all its continuations, and what contexts share (examples of few-shot
  tasks) once for all of them. A first token needs the last logits alone, which engines read for
  many contexts in one batch.
- In a rolling loglikelihood `<bos>` stands once in front. (The harness's `hf` model has it twice
  there for Gemma, and counts the second as a word to foresee.)
- As in the harness's other models, a text that spells a special piece is read as that piece: chat
  templates come as texts. Elsewhere in this package no text can do that.
- Options that are not ours are refused by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gemma_multi import chat_template
from gemma_multi.engines import LAST, Session
from gemma_multi.errors import GemmaError, OptionError, TokenizerError
from gemma_multi.evaluation.measured import place_of, weights_of
from gemma_multi.generation import likelihoods, pick_logprobs
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.prefixes import shared_beginning
from gemma_multi.progress import Progress, reporting
from gemma_multi.reads import Read, Reads, complete_together
from gemma_multi.sentencepiece_model import STEERING_PIECES
from gemma_multi.streaming import TextStream
from gemma_multi.tokenizer import Tokenizer

NAME = "gemma-multi"
_GRANULARITY = 128  # sessions are as long as is needed, in steps, so that beginnings can be shared
_UNSET_DEVICE = "cuda:0"  # what lm_eval's command line says where nobody said anything
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
Pair = tuple[Any, list[int], list[int]]  # what it is cached under, context, continuation


@register_model(NAME)
class GemmaMultiLM(TemplateLM):
    """A model of this package, as lm_eval asks one."""

    def __init__(
        self, pretrained: str | Model = "storyteller", *, batch_size: int | str | None = None,
        max_batch_size: int | None = None, device: str | None = None, progress: Progress = True,
        **options: Any,
    ) -> None:  # fmt: skip
        """`pretrained` and the other `model_args` are what `gemma_multi.load` takes. `batch_size`
        is how many requests are read side by side; "auto" is what suits the engine."""
        super().__init__()
        if isinstance(pretrained, Model) and options:
            raise OptionError(f"{next(iter(options))!r} is for a model that is yet to be loaded")
        self._progress = progress
        self.model = (
            pretrained if isinstance(pretrained, Model)
            else load(pretrained, progress=progress, **options)
        )  # fmt: skip
        if device not in (None, _UNSET_DEVICE, self.model.engine.device):
            raise OptionError(f"device is {device!r}, but the backend is on "
                              f"{self.model.engine.device!r}; choose by backend=...")  # fmt: skip
        self._width = _read_width(batch_size, max_batch_size, self.model)
        self._special = _special_pieces(self.model.tokenizer)
        self._between = re.compile(f"({'|'.join(map(re.escape, self._special))})")

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.context_length

    @property
    def batch_size(self) -> int:
        return self._width

    @property
    def tokenizer_name(self) -> str:
        """Of what texts become, for the harness's cache of requests."""
        return f"{NAME}-{hashlib.sha256(self.model.tokenizer.model).hexdigest()}"

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the results: which weights were asked, and on what."""
        return {**weights_of(self.model.checkpoint), **place_of(self.model)}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name of it for the results; it is code."""
        return None if chat_template is False or chat_template is None else "gemma"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Without `add_generation_prompt` the last message is an answer that is begun."""
        begun = bool(chat_history) and chat_history[-1].get("role") in ("assistant", "model")
        if begun is add_generation_prompt:
            raise OptionError("a chat ends with a question to answer, or an answer to go on with")
        return chat_template.render_prompt(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """With `<bos>` in front unless it is there or not wanted."""
        tokenizer = self.model.tokenizer
        ids: list[int] = []
        for part in self._between.split(string):
            ids += [self._special[part]] if part in self._special else tokenizer.encode(part)
        starts = ids[:1] == [tokenizer.bos_id]
        wanted = not starts if add_special_tokens is None else add_special_tokens
        return [tokenizer.bos_id, *ids] if wanted else ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether greedy decoding
        would write it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id,
                self.max_length, 1,
            )  # fmt: skip
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would write it) of each continuation. What
        does not fit loses its beginning, as in the harness's other models."""
        most = self.max_length
        fitted = []
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > most:
                raise OptionError(
                    f"a context of {len(context)} tokens and a continuation of "
                    f"{len(continuation)}, expected at least one of each and at most {most} of "
                    "the latter; raise context_length"
                )
            kept = context[-(most + 1 - len(continuation)) :]
            fitted.append((tuple(kept), continuation, place))
        fitted.sort(key=lambda one: one[0])
        # each context once, with all that is asked after it
        groups = [
            (context, [(continuation, place) for _, continuation, place in group])
            for context, group in groupby(fitted, key=lambda one: one[0])
        ]  # fmt: skip
        longest = max((len(context) + len(one) - 1 for context, one, _ in fitted), default=1)
        room = min(most, -(-longest // _GRANULARITY) * _GRANULARITY)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def jobs() -> Iterator[Callable[[], Reads[None]]]:
            for i, (context, asked) in enumerate(groups):
                after = groups[i + 1][0] if i + 1 < len(groups) else ()
                shared = shared_beginning(context, after)
                yield partial(self._continuations, context, asked, shared, room, found)

        self._run("loglikelihoods", jobs(), len(groups))
        for (cached, _, _), answer in zip(requests, found, strict=True):
            if cached is not None:
                self.cache_hook.add_partial("loglikelihood", cached, answer)
        return found

    def _continuations(
        self, context: Sequence[int], asked: Sequence[tuple[list[int], int]], shared: int,
        room: int, found: list[tuple[float, bool]],
    ) -> Reads[None]:  # fmt: skip
        """Fills in what is asked of one context."""
        model = self.model
        session, _ = model.prefixes.start(model.engine, context, shared, room)
        logits = yield Read(session, context[session.length :], LAST)
        several = [one for one, _ in asked if len(one) > 1]
        for continuation, place in asked:
            first, likeliest = pick_logprobs(logits[None], continuation[:1])
            logprob, greedy = float(first[0]), bool(likeliest[0])
            if len(continuation) > 1:
                several.pop()
                reader: Session = session.fork() if several else session
                rest, best = yield from likelihoods(reader, continuation)
                logprob, greedy = logprob + float(rest.sum()), greedy and bool(best.all())
            found[place] = (logprob, greedy)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What the model writes, until a text of `until`."""
        found = [""] * len(requests)

        def job(place: int, context: str, asked: Mapping[str, Any]) -> Reads[None]:
            found[place] = yield from self._written(context, asked)
            self.cache_hook.add_partial("generate_until", (context, asked), found[place])

        jobs = (partial(job, i, *request.args) for i, request in enumerate(requests))
        self._run("answers", jobs, len(requests))
        return found

    def _written(self, context: str, asked: Mapping[str, Any]) -> Reads[str]:
        model = self.model
        told = dict(normalize_gen_kwargs(dict(asked), default_max_gen_toks=256))
        most, stop = told.pop("max_gen_toks"), [text for text in told.pop("until") if text]
        sampled = told.pop("do_sample")
        if unknown := sorted(set(told) - set(_SAMPLING)):
            raise OptionError(
                f"generation takes no option {unknown[0]!r}; expected until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        if not sampled:
            told["temperature"] = 0.0
        if most >= self.max_length:
            raise OptionError(f"max_gen_toks is {most}, but the context holds {self.max_length}")
        chosen, _ = model.answer_options({**told, "max_tokens": most, "stop": tuple(stop)})
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        session, reused = model.prefixes.start(model.engine, ids, 0, model.context_length)
        stream = TextStream(model, session, ids[session.length :], chosen, None, reused)
        return (yield from stream.whole()).text

    def _run(self, what: str, jobs: Iterator[Callable[[], Reads[None]]], count: int) -> None:
        """All of them, side by side. Raises what the first that failed raised."""
        with reporting(self._progress, what) as report:
            done = complete_together(self.model.engine, jobs, self._width)
            for i, (_, outcome) in enumerate(done, 1):
                if isinstance(outcome, GemmaError):
                    raise outcome
                report(i, count)


def _special_pieces(tokenizer: Tokenizer) -> dict[str, int]:
    """The pieces that no text can spell elsewhere, as far as the vocabulary has them."""
    found = {}
    for piece in ("<bos>", "<eos>", *STEERING_PIECES):
        with suppress(TokenizerError):
            found[piece] = tokenizer.id(piece)
    return found


def _read_width(given: int | str | None, most: int | None, model: Model) -> int:
    width = model.engine.rows_at_a_time if given in (None, "auto") else given
    if isinstance(width, str) and width.isdigit():
        width = int(width)
    if type(width) is not int or width < 1:
        raise OptionError(f"batch_size is {given!r}, expected a whole number or 'auto'")
    return min(width, most) if most else width
