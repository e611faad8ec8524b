"""Level 2, tokens: does every side read the same ids, and the same text in them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_multi.comparison.prompts import Prompt
from gemma_multi.comparison.subjects import Subject
from gemma_multi.model import Model


@dataclass(frozen=True)
class TokenDifference:
    prompt: str
    what: str  # where, and what stands there on either side


@dataclass(frozen=True)
class TokensResult:
    prompts: int
    tokens: int
    different: tuple[TokenDifference, ...]

    @property
    def passed(self) -> bool:
        return not self.different

    @property
    def summary(self) -> str:
        if self.passed:
            return f"all {self.prompts} prompts give the same {self.tokens:,} ids and text"
        first = self.different[0]
        return (
            f"{len(self.different)} of {self.prompts} prompts are read differently; "
            f"{first.prompt}: {first.what}"
        )


def compare_tokens(reference: Subject, other: Subject, prompts: Sequence[Prompt]) -> TokensResult:
    total, different = 0, []
    for prompt in prompts:
        mine, theirs = (s.model.encode(prompt.content, raw=prompt.raw) for s in (reference, other))
        total += len(mine)
        if what := _difference(reference.model, other.model, mine, theirs):
            different.append(TokenDifference(prompt.name, what))
    return TokensResult(len(prompts), total, tuple(different))


def _difference(one: Model, other: Model, mine: list[int], theirs: list[int]) -> str:
    for i in range(max(len(mine), len(theirs))):
        a, b = _show(one, mine, i), _show(other, theirs, i)
        if a != b:
            return f"at position {i} is {a}, not {b}" if a and b else f"{a or b} is left over"
    texts = [model.tokenizer.decode(ids) for model, ids in ((one, mine), (other, theirs))]
    if texts[0] != texts[1]:
        return f"the same ids are {texts[0][:40]!r} and {texts[1][:40]!r} as text"
    return ""


def _show(model: Model, ids: list[int], i: int) -> str:
    return f"{model.tokenizer.piece(ids[i])!r} ({ids[i]})" if i < len(ids) else ""
