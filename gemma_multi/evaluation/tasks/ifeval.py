"""ifeval: instructions whose keeping a program can check, by IFEval's published checkers.

Design choices:
- The checkers are those of IFEval (Zhou et al., 2023) as the package `if-verifiable` has them; rows
  are IFEval's own: `prompt`, `instruction_id_list`, `kwargs`. Its 541 prompts are not in that
  package. Those here are a dozen of our own, of the same form; a figure of them is no IFEval score.
- That package skips an instruction that it does not know, and counts none of an empty answer. Here
  the first is refused, and of the second every instruction counts as not kept.
- What a checker needs and does not find (words of nltk's) is said before anything is generated.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi.errors import BackendError, DataError
from gemma_multi.evaluation.task import (
    MOST_TOKENS_HELP,
    Findings,
    PromptOptions,
    Question,
    Task,
    answered,
    numbered_rows,
    prompt_form,
    text_of,
    write_all,
)
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.scoring import share

if TYPE_CHECKING:
    from gemma_multi.model import Model

OUR_PROMPTS = Path(__file__).parents[1] / "instructions.jsonl"
_MOST_TOKENS = 512
_KEYS = {"prompt", "instruction_id_list", "kwargs"}
_TRIED_ON = "One sentence. And ANOTHER one."


@dataclass(frozen=True)
class IfevalOptions(PromptOptions):
    """What `ifeval` can be told."""

    max_tokens: int | None = option(None, MOST_TOKENS_HELP)


def _run(model: Model, data: Any, options: IfevalOptions, progress: Progress) -> Findings:
    checkers = _checkers()
    questions = []
    for where, _, raw in numbered_rows(data, options.limit):
        asked = _check(where, raw, checkers)
        questions.append(Question(where, [{"role": "user", "content": asked.prompt}], asked))
    most = options.max_tokens or _MOST_TOKENS
    found = write_all(
        model, questions, options, "following instructions", progress, max_tokens=most
    )
    given = [text_of(one) for one in found]
    kept = [_kept(q.expected, text) for q, text in zip(questions, given, strict=True)]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for one in chain(*kept):
        by_kind[one.instruction_id].append(one.strict_pass)
    shares = {name: share(sum(each), len(each)) for name, each in sorted(by_kind.items())}
    figures = {}
    for how in ("strict", "loose"):
        passed = [[bool(getattr(each, f"{how}_pass")) for each in one] for one in kept]
        figures[f"prompts, {how}"] = share(sum(map(all, passed)), len(passed))
        single = list(chain(*passed))
        figures[f"instructions, {how}"] = share(sum(single), len(single))
    rows = [
        answered(question, ", ".join(question.expected.instruction_id_list), text,
                 all(each.strict_pass for each in one))
        for question, text, one in zip(questions, given, kept, strict=True)
    ]  # fmt: skip
    return Findings(
        figures, shares=shares, rows=tuple(rows), count=len(rows),
        protocol={**prompt_form(options, questions, ""), "answer": "written, greedy",
                  "max_tokens": most, "checkers": f"if-verifiable {_version()}"},
    )  # fmt: skip


def _checkers() -> Mapping[str, Any]:
    """IFEval's, by the id of an instruction. Raises BackendError where they are not installed."""
    try:
        import langdetect
        from if_verifiable.ifeval import INSTRUCTION_DICT
    except ImportError:
        raise BackendError("IFEval's checkers need: pip install 'gemma-multi[eval]'") from None
    langdetect.DetectorFactory.seed = 0  # which else draws
    return INSTRUCTION_DICT


def _check(where: str, raw: Any, checkers: Mapping[str, Any]) -> Any:
    """A row as the checkers take it. Raises DataError, or BackendError for what is missing."""
    from if_verifiable import IFEvalSample

    if not isinstance(raw, Mapping) or set(raw) - {"key"} != _KEYS:
        raise DataError(f"{where}: expected the keys {', '.join(sorted(_KEYS))}, as IFEval has")
    names, told = raw["instruction_id_list"], raw["kwargs"]
    if not isinstance(raw["prompt"], str) or not raw["prompt"].strip():
        raise DataError(f"{where}: 'prompt' is {raw['prompt']!r}, expected some words")
    if not isinstance(names, list) or not isinstance(told, list) or not 0 < len(names) == len(told):
        raise DataError(f"{where}: expected as many 'kwargs' as instructions, at least one")
    for name, its in zip(names, told, strict=True):
        if name not in checkers:
            raise DataError(f"{where}: {name!r} is no instruction of IFEval's; there are "
                            f"{', '.join(checkers)}")  # fmt: skip
        if not isinstance(its, Mapping):
            raise DataError(f"{where}: 'kwargs' of {name} is {its!r}, expected an object")
        _try(where, name, its, checkers[name])
    return IFEvalSample(raw.get("key", 0), raw["prompt"], names, [dict(its) for its in told])


def _try(where: str, name: str, its: Mapping[str, Any], checker: Any) -> None:
    """Runs a checker once, so that what it will refuse is said before a model is asked."""
    wanted = set(inspect.signature(checker.build_description).parameters) - {"self"}
    if {key for key, value in its.items() if value is not None} != wanted:  # it draws what it lacks
        needs = f"expected {', '.join(sorted(wanted))}" if wanted else "it takes none"
        raise DataError(f"{where}: 'kwargs' of {name} is {dict(its)!r}; {needs}")
    try:
        one = checker(name)
        one.build_description(**{key: its[key] for key in wanted})
        one.check_following(_TRIED_ON)
    except LookupError as error:
        if "nltk" not in str(error).lower():
            raise
        raise BackendError(
            f"{where}: the checker of {name} needs nltk's sentences, which no package brings: "
            "python -m nltk.downloader punkt_tab"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {name} does not take {dict(its)!r}: {error}") from None


def _kept(asked: Any, text: str) -> list[Any]:
    """For each instruction whether an answer keeps it, strictly and with some leniency."""
    from if_verifiable import InstructionResult, evaluate_output_for_sample

    results, _ = evaluate_output_for_sample("ifeval", asked, text)
    if not results:  # an empty answer keeps nothing
        return [InstructionResult(name, False, False) for name in asked.instruction_id_list]
    return list(results)


def _version() -> str:
    from importlib.metadata import version

    return version("if-verifiable")


TASK = Task(
    "ifeval", "IFEval's: 'prompt', 'instruction_id_list' and 'kwargs'",
    IfevalOptions, _run, OUR_PROMPTS,
)  # fmt: skip
