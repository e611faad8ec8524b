"""perplexity: how well a model foresees answers, or plain texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.errors import OptionError
from gemma_multi.evaluation.task import Findings, Task, TaskOptions, numbered_rows
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.scoring import perplexity_score
from gemma_multi.training.examples import LOSS_ON
from gemma_multi.training.validation import row_losses

if TYPE_CHECKING:
    from gemma_multi.model import Model


@dataclass(frozen=True)
class PerplexityOptions(TaskOptions):
    """What `perplexity` can be told."""

    loss_on: str = option("answer", "Of a conversation: answer, or all tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on not in LOSS_ON:
            raise OptionError(f"loss_on is {self.loss_on!r}, expected {' or '.join(LOSS_ON)}")


def _run(model: Model, data: Any, options: PerplexityOptions, progress: Progress) -> Findings:
    if options.limit is not None:
        data = [raw for _, _, raw in numbered_rows(data, options.limit)]
    found = list(row_losses(model, data, model.context_length, options.loss_on, progress=progress))
    losses, tokens = zip(*found, strict=True)
    scored = perplexity_score(losses, tokens)
    return Findings(
        {"perplexity": scored.estimate}, count=len(found),
        numbers={"loss": sum(losses) / sum(tokens), "tokens": sum(tokens)},
        protocol={"prompt": "the row as it stands; of a text all after <bos>",
                  "loss_on": options.loss_on},
    )  # fmt: skip


TASK = Task(
    "perplexity", "as for finetune: a 'prompt' and a 'completion', 'messages' or a "
    "'text'", PerplexityOptions, _run,
)  # fmt: skip
