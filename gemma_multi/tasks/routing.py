"""route: which of several services, agents or experts a request should go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.options import check_choices
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress
from gemma_multi.tasks.classification import MAX_LABELS, Classifier
from gemma_multi.tasks.prompts import TaskPrompt, read_choices, read_instruction

if TYPE_CHECKING:
    from gemma_multi.model import Model


def route(
    model: Model, queries: str | Sequence[str], routes: Mapping[str, str],
    instruction: str | None = None, examples: Any = None, *, calibrate: bool = False,
    raw: bool = False, progress: Progress = True,
) -> Any:  # fmt: skip
    """See `Model.route`."""
    classifier = by_routes(model, routes, instruction, examples, calibrate=calibrate, raw=raw)
    return classifier.all(queries, progress)


def by_routes(
    model: Model, routes: Mapping[str, str], instruction: str | None = None, examples: Any = None,
    *, calibrate: bool = False, raw: bool = False,
) -> Classifier:  # fmt: skip
    """Raises OptionError."""
    if not isinstance(routes, Mapping):
        raise OptionError(f"routes is {routes!r}, expected a dict of names and descriptions")
    names = check_choices("routes", list(routes), MAX_LABELS)
    for name, description in routes.items():
        if not isinstance(description, str):
            raise OptionError(f"route {name!r} has the description {description!r}, expected text")
    answered = read_choices(examples, "route", names)
    asked = read_instruction(instruction, "Which of these should take care of the request?")
    described = [f"- {n}: {d}" if d else f"- {n}" for n, d in routes.items()]
    text = "\n".join([asked, *described, "Answer with its name only."])
    prompt = TaskPrompt(text, answered, raw, "Name")
    return Classifier(model, prompt, names, calibrate)
