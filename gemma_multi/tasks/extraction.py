"""extract: an object of a schema, filled in from a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.schema import read_schema, write_json
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress
from gemma_multi.reads import Reads
from gemma_multi.streaming import TextStream
from gemma_multi.tasks.prompts import TaskPrompt, read_examples, read_instruction, read_texts
from gemma_multi.tasks.running import run_all

if TYPE_CHECKING:
    from gemma_multi.model import Model


def extract(
    model: Model, texts: str | Sequence[str], schema: Any, instruction: str | None = None,
    examples: Any = None, *, raw: bool = False, progress: Progress = True, **options: Any,
) -> Any:  # fmt: skip
    """See `Model.extract`."""
    given, single = read_texts(texts, "text")
    extractor = by_schema(model, schema, instruction, examples, raw=raw, **options)
    jobs = [extractor(text) for text in given]  # each is checked before any is read
    return run_all(model, jobs, single, "extracting", progress)


def by_schema(
    model: Model, schema: Any, instruction: str | None = None, examples: Any = None, *,
    raw: bool = False, **options: Any,
) -> Callable[[str], Reads[Any]]:  # fmt: skip
    """The reads for a text, which raises OptionError where it is none or too long. Raises
    OptionError."""
    plain, _ = read_schema(schema)
    properties = plain.get("properties")
    names = list(properties) if isinstance(properties, dict) else []
    what = ", ".join(names) if names else "what the text says"
    default = f"Extract from the text: {what}. Answer with JSON only."
    answered = tuple((t, _as_text(a)) for t, a in read_examples(examples))
    prompt = TaskPrompt(read_instruction(instruction, default), answered, raw, "JSON")
    chosen, constraint = model.answer_options({"temperature": 0.0, **options, "schema": schema})
    shared = prompt.shared(model)

    def reads(ids: list[int]) -> Reads[Any]:
        session, reused = model.prefixes.start(model.engine, ids, shared, model.context_length)
        stream = TextStream(model, session, ids[session.length :], chosen, constraint, reused)
        return (yield from stream.whole()).parsed

    return lambda text: reads(prompt.ids(model, text))


def _as_text(answer: Any) -> str:
    """An example's object as the model is to write it."""
    if isinstance(answer, str):
        return answer
    try:
        return write_json(answer)
    except ValueError as error:
        raise OptionError(f"an example's answer {answer!r} is no JSON: {error}") from None
