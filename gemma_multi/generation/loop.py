"""One answer, read by read: the prompt, then what the decoding chose, until it is finished."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from gemma_multi.engines import ALL, NOTHING, Chosen, Session
from gemma_multi.generation.decoding import Decoding
from gemma_multi.generation.lookup import PromptLookup
from gemma_multi.prefixes import shared_beginning
from gemma_multi.reads import Read, Reads, next_read

_PROMPT_CHUNK = 512  # tokens read between two looks at the cancel flag
Taken = Callable[[Sequence[int]], None]


def answer(
    session: Session, prompt: Sequence[int], decoding: Decoding, taken: Taken,
    lookup: PromptLookup | None = None,
) -> Reads[None]:  # fmt: skip
    """The reads of an answer, until `decoding` is finished. `taken` is told of tokens as they are
    chosen, one or several at once, and may finish the decoding.

    `prompt` is what the session has not read yet; `lookup`, if there is one, knows it and what was
    read before. The last token has not been read by the session: nobody may need what comes after
    it.
    """
    session.check_room(prompt)  # before the first chunk, not in the middle
    *before, last = [prompt[i : i + _PROMPT_CHUNK] for i in range(0, len(prompt), _PROMPT_CHUNK)]
    for chunk in before:
        yield Read(session, chunk, NOTHING)
        if decoding.cancelled.is_set():
            decoding.finish("cancelled")
            return
    unread, first = list(last), True
    while True:
        forced = decoding.forced()
        unread += forced
        taken(forced)
        if decoding.finished:
            return
        guess: list[int] = []
        if lookup is not None:
            lookup.add(forced)
            room = session.context_length - session.length - len(unread)
            guess = [] if first else lookup.guess()[: max(room, 0)]
        if guess:
            chosen = yield from _with_guess(session, unread, guess, decoding)
        elif isinstance(decoding.want, Chosen):
            chosen = yield from _ahead(session, unread, decoding)
        else:
            # what follows without a choice is read at once, with what came before it
            token = decoding.next((yield Read(session, unread, decoding.want)))
            chosen = [] if token is None else [token]
        # of what was chosen, the session has read as much as was guessed, or all but the last
        right = shared_beginning(chosen, guess) if guess else max(len(chosen) - 1, 0)
        first = False
        if lookup is not None:
            lookup.add(chosen)
            if guess:
                lookup.judge(right)
                decoding.guessed_tokens += right
        count = len(decoding.tokens)
        taken(chosen)
        if decoding.finished:
            cut = count - len(decoding.tokens)
            if cut:  # a stop text ended it in the middle of what was chosen at once
                session.truncate(min(session.length, decoding.position - cut - 1))
            return
        unread = chosen[right:]


def _with_guess(
    session: Session, unread: list[int], guess: list[int], decoding: Decoding
) -> Reads[list[int]]:
    """Reads what is unread, and a guess of what follows; the tokens that the decoding takes, up to
    the first that was not guessed. The session has then read those that were."""
    *before, last = unread
    if before:
        yield Read(session, before, NOTHING)
    rows = yield Read(session, [last, *guess], ALL)
    chosen: list[int] = []
    while chosen == guess[: len(chosen)]:
        token = decoding.next(rows[len(chosen)], after_guess=True)
        if token is None:
            break
        chosen += [token, *decoding.forced()]
        if decoding.finished:
            break
    session.truncate(session.length - len(guess) + shared_beginning(chosen, guess))
    return chosen


def _ahead(session: Session, unread: list[int], decoding: Decoding) -> Reads[list[int]]:
    """Reads what is unread and has tokens chosen ahead; those that the decoding takes. The session
    has then read all of them but the last, or all where the answer ended before the next."""
    given = (yield Read(session, unread, decoding.want)).tolist()
    if not given:  # the logits say why, or what
        token = decoding.next((yield Read(session, unread[-1:])))
        return [] if token is None else [token]
    read = session.length - len(given) + 1
    chosen = decoding.force(given)
    session.truncate(min(session.length, read + len(chosen)))
    return chosen


def generate_tokens(
    session: Session, prompt: Sequence[int], decoding: Decoding, lookup: PromptLookup | None = None
) -> Generator[int]:
    """Yields the token ids of one answer as they are chosen; see `answer`."""
    waiting: list[int] = []
    reads, result = answer(session, prompt, decoding, waiting.extend, lookup), None
    while True:
        read = next_read(reads, result)
        yield from waiting
        waiting.clear()
        if read is None:
            return
        result = read.session.read(read.ids, read.want)
