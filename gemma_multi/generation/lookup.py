"""PromptLookup: text that an answer copies is guessed from where it stood before.

Where the last tokens have come before, what followed them then is likely to follow again: a name
out of the text, a line of code, a list that goes on. The guess is read at once, and the logits
after each of its tokens say how much of it is right. What the decoding takes is what it would have
taken without a guess, greedy or with a seed, as far as an engine computes a token the same by
itself and among others.

Design choices:
- Guesses depend on tokens alone and not on the clock: a seed gives one text.
- Reading a guess costs about as much as `_PAYS` single steps (the head is multiplied for each of
  its tokens), so after guesses that were mostly wrong there are none for a while, longer each time.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 15  # tokens of a guess; with the one before it, as many as LiteRT scores at once
_MATCHES = (4, 3)  # tokens that must have come before; the longest match counts
_PAYS = 4  # tokens of a guess that must be right for it to have been worth it
_PAUSE = 8  # tokens without a guess after the first that was not worth it


class PromptLookup:
    """The tokens of one conversation, to find again what the last of them were."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where they were followed last
        self._pause, self._next_guess = _PAUSE, 0
        self.add(ids)

    def add(self, ids: Iterable[int]) -> None:
        """Tokens that follow."""
        for token in ids:
            end = len(self._ids)
            for size in _MATCHES:
                if end >= size:
                    self._after[tuple(self._ids[end - size :])] = end
            self._ids.append(int(token))

    def guess(self) -> list[int]:
        """What may come next; nothing where the last tokens are new."""
        end = len(self._ids)
        if end < self._next_guess:
            return []
        for size in _MATCHES:
            start = self._after.get(tuple(self._ids[end - size :])) if end >= size else None
            if start is not None:
                return self._ids[start : start + LONGEST]
        return []

    def judge(self, right: int) -> None:
        """How many tokens of the last guess were right."""
        if right >= _PAYS:
            self._pause = _PAUSE
        else:
            self._next_guess = len(self._ids) + self._pause
            self._pause *= 2
