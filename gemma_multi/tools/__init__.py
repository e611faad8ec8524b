"""Functions that a model may call: what they are, how a prompt declares them, how calls are read.

A checkpoint speaks one of two formats, and its tokenizer says which: FunctionGemma has tokens of
its own for declarations, calls and responses (`functiongemma`); any other Gemma is told in words
and answers in JSON (`json_calls`).
"""

from gemma_multi.tools.conversation import (
    encode_after_calls,
    encode_with_tools,
    has_calls,
    read_conversation,
)
from gemma_multi.tools.format import ToolFormat, tool_format
from gemma_multi.tools.tool import Call, Tool, read_tools

__all__ = [
    "Call",
    "Tool",
    "ToolFormat",
    "encode_after_calls",
    "encode_with_tools",
    "has_calls",
    "read_conversation",
    "read_tools",
    "tool_format",
]
