"""Parity: prove that every backend gives the same answer.

Four levels, each of which can fail alone: `weights` (the numbers each engine holds), `tokens` (the
ids it reads), `logits` (what it expects next, at every position), `text` (what it writes). With
`trace`, `layers` names the first layer that drifts. `comparison` runs them, `tolerances` says what
counts as the same, `report` and `page` show what was found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gemma_multi.chat_template import encode_prompt
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.prompts import Prompt, choose_prompts
from gemma_multi.comparison.report import ParityReport
from gemma_multi.comparison.run import MAX_TOKENS, compare
from gemma_multi.comparison.subjects import line_up
from gemma_multi.errors import ContextError, OptionError
from gemma_multi.progress import Progress, reporting
from gemma_multi.sources import Source, open_checkpoint

__all__ = ["ParityReport", "Prompt", "parity"]


def parity(
    model: Source = "storyteller",
    backends: str | Sequence[str] = "auto",
    *,
    against: Source | None = None,
    prompts: Any = None,
    precision: str = "auto",
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    trace: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
) -> ParityReport:
    """Compares one model's answers on several backends.

    model, revision, local_files_only: what to compare; see `open_checkpoint`.
    backends: names, each alone or with a precision (`"keras:bfloat16"`) or a device
        (`"litert:gpu"`, `"litert:gpu:float32"`); the first is what the others are compared
        with. `"auto"` takes all that are installed and reports the rest.
    against: what to compare with instead: `"transformers"`, an exported file, another directory
        or id.
    prompts: None for the shipped set; a `.jsonl` or `.txt` file, or a list of texts or messages.
    precision: of backends that name none, as for `load`.
    max_tokens: of a greedy answer; sampled ones are shorter.
    seed: of the sampled texts.
    trace: also compare the hidden states after each layer, to find the one that drifts. Of an
        exported file, they come from a graph written anew from the file's own tensors.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).

    Raises OptionError for an empty prompt set, for models that are not the same and for options
    outside what is allowed, BackendError for a backend that is not installed, ContextError for a
    prompt longer than the context, and what `load` raises.
    """
    started = time.perf_counter()
    if type(max_tokens) is not int or max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens!r}, expected at least 1")
    chosen = choose_prompts(prompts)
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    lineup = line_up(checkpoint, backends, precision, against, local_files_only)
    lengths = {prompt.name: _length(checkpoint, prompt) for prompt in chosen}
    left_out = tuple(name for name, length in lengths.items() if length >= lineup.longest)
    fitting = tuple(prompt for prompt in chosen if prompt.name not in left_out)
    if left_out and (prompts is not None or not fitting):
        raise ContextError(
            f"prompt {left_out[0]!r} is {lengths[left_out[0]]} tokens long, but the context holds "
            f"{lineup.longest} and must have room for an answer; shorten the prompt"
        )
    longest = max(lengths[prompt.name] for prompt in fitting)
    with reporting(progress, "comparing") as report:
        subjects = lineup.start(min(longest + max_tokens, lineup.longest))
        comparisons = compare(
            subjects, fitting, max_tokens=max_tokens, seed=seed, trace=trace, progress=report
        )
    return ParityReport(
        model=checkpoint.provenance.source,
        comparisons=tuple(comparisons),
        prompts=fitting,
        left_out=left_out,
        skipped=lineup.skipped,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _length(model: Checkpoint, prompt: Prompt) -> int:
    if isinstance(prompt.content, str):
        return 1 + len(model.tokenizer.encode(prompt.content))
    return len(encode_prompt(model.tokenizer, prompt.content))
