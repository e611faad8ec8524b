"""What clients may ask for: OpenAI's requests as far as they are obeyed, and no further.

A field that is not here is refused by name. Of those that are here, some have one value, which is
what the server does anyway (`store: false`). The OpenAPI document is made of these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemma_multi.serving.options import MOST_ANSWERS

_SIGNED, _UNSIGNED = 1 << 63, 1 << 64
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Strict):
    """What every answer can be told. Unset ones are the checkpoint's own."""

    model: Text
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_SIGNED, lt=_UNSIGNED)
    # beyond OpenAI's, as other servers have them
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stream: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """As `GenerationOptions` takes them."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: getattr(self, name) for name in names}
        if self.seed is not None:
            found["seed"] = self.seed % _UNSIGNED
        return found


class StreamOptions(Strict):
    include_usage: bool | None = None


class Several(Sampling):
    """What chats and completions have in common."""

    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class FunctionCall(Strict):
    name: Text
    arguments: str  # JSON


class ToolCall(Strict):
    id: Text
    type: Literal["function"]
    function: FunctionCall


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    refusal: None = None  # as answers have it, which may come back as they are


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: Text


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Strict):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments always fit


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Text


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Text
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # texts always fit


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Several):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: (
        Annotated[
            TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
        ] | None
    ) = None  # fmt: skip
    tools: Annotated[list[FunctionTool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(Several):
    """POST /v1/completions: plain text to go on with, as base models want it."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=128)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    model: Text
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None  # as answers have them
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(min_length=1)]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None


class InputCall(Strict):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: str
    id: str | None = None
    status: Literal["completed"] | None = None


class InputCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: Text
    output: str
    id: str | None = None
    status: Literal["completed"] | None = None


class ResponseTool(Function):
    type: Literal["function"]


class ResponseNamedTool(Strict):
    type: Literal["function"]
    name: Text


class ResponseSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class ResponseText(Strict):
    format: (
        Annotated[
            TextFormat | JsonObjectFormat | ResponseSchemaFormat, Field(discriminator="type")
        ] | None
    ) = None  # fmt: skip


class ResponseRequest(Sampling):
    """POST /v1/responses: nothing is kept from one to the next."""

    input: str | Annotated[list[InputMessage | InputCall | InputCallOutput], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
