"""`generate`: a model answers once."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import (
    argument_or_piped,
    field_options,
    given,
    json_list,
    load_model,
    model_options,
    print_json,
)
from gemma_multi.constraints import ConstraintOptions
from gemma_multi.errors import OptionError
from gemma_multi.sampling import GenerationOptions
from gemma_multi.tools import read_tools

if TYPE_CHECKING:
    from gemma_multi.generation import GenerationResult


@click.command()
@click.argument("prompt", required=False)
@click.option("--system", help="Text in front of the conversation.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a turn.")
@click.option("--tools", metavar="FILE", help="Functions it may call: a JSON list, or its file.")
@click.option("--tool-choice", default="auto", show_default=True,
              help="auto, required, none, or the name of one.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@model_options
@field_options(ConstraintOptions)
@field_options(GenerationOptions)
def generate(
    prompt: str | None, system: str | None, raw: bool, tools: str | None, tool_choice: str,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer PROMPT, or what is piped in."""
    from gemma_multi.terminal import show_stream

    text = argument_or_piped(prompt, "prompt")
    if raw and system:
        raise OptionError("--raw continues plain text and takes no --system")
    if not text.strip():
        raise OptionError("the prompt is empty; give it some text")
    declared = None if tools is None else read_tools(json_list("tools", tools))
    model = load_model(options)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    stream = model.stream(
        text if raw else messages, raw=raw, tools=declared, tool_choice=tool_choice,
        **given(options),
    )  # fmt: skip
    if not as_json:
        show_stream(stream)
        for call in stream.result.calls:
            print_json(asdict(call))
        return
    print_json(answer_facts(stream.run(), model.backend))


def answer_facts(result: GenerationResult, backend: str) -> dict[str, Any]:
    """An answer for scripts."""
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        **({} if result.parsed is None else {"parsed": result.parsed}),
        **({"calls": [asdict(call) for call in result.calls]} if result.calls else {}),
        **({"logprobs": [asdict(one) for one in result.logprobs]} if result.logprobs else {}),
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "seed": result.seed,
        "prefill_seconds": round(result.prefill_seconds, 4),
        "decode_seconds": round(result.decode_seconds, 4),
        "backend": backend,
    }
