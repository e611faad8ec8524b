"""extract: an object of a schema, filled in from a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.schema import read_schema, write_json
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress, reporting
from gemma_multi.streaming import TextStream
from gemma_multi.tasks.prompts import TaskPrompt, read_examples, read_instruction, read_texts

if TYPE_CHECKING:
    from gemma_multi.model import Model


def extract(
    model: Model, texts: str | Sequence[str], schema: Any, instruction: str | None = None,
    examples: Any = None, *, raw: bool = False, progress: Progress = True, **options: Any,
) -> Any:  # fmt: skip
    """See `Model.extract`."""
    given, single = read_texts(texts, "text")
    plain, _ = read_schema(schema)
    properties = plain.get("properties")
    names = list(properties) if isinstance(properties, dict) else []
    what = ", ".join(names) if names else "what the text says"
    default = f"Extract from the text: {what}. Answer with JSON only."
    answered = tuple((t, _as_text(a)) for t, a in read_examples(examples))
    prompt = TaskPrompt(read_instruction(instruction, default), answered, raw, "JSON")
    chosen, constraint = model.answer_options({"temperature": 0.0, **options, "schema": schema})
    shared, found = prompt.shared(model), []
    prompts = [prompt.ids(model, text) for text in given]  # each is checked before any is read
    with reporting(progress, "extracting") as report:
        for ids in prompts:
            session, reused = model.prefixes.start(model.engine, ids, shared, model.context_length)
            stream = TextStream(model, session, ids[session.length :], chosen, constraint, reused)
            found.append(stream.run().parsed)
            if not single:
                report(len(found), len(prompts))
    return found[0] if single else found


def _as_text(answer: Any) -> str:
    """An example's object as the model is to write it."""
    if isinstance(answer, str):
        return answer
    try:
        return write_json(answer)
    except ValueError as error:
        raise OptionError(f"an example's answer {answer!r} is no JSON: {error}") from None
