"""ToolFormat: how a conversation speaks of tools. Two checkpoints' families, two formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from gemma_multi.constraints import Constraint
from gemma_multi.errors import OptionError
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools.tool import Call, Tool

CHOICES = ("auto", "required", "none")
MAX_CALLS = 8  # in one answer; small models that may go on do go on


class ToolFormat(ABC):
    """Token ids around calls."""

    # whether what a tool gave is part of the model's own turn
    in_one_turn: bool

    @abstractmethod
    def opening(
        self, tokenizer: Tokenizer, tools: Sequence[Tool], system: str
    ) -> tuple[list[int], str]:
        """What declares the tools: ids of turns in front of the first one, and the system text
        that goes into it."""

    @abstractmethod
    def constraint(self, tools: Sequence[Tool], choice: str) -> Constraint:
        """What an answer may be: a text or valid calls ("auto"), calls ("required"), a text
        ("none"). It parses into calls."""

    @abstractmethod
    def calls(
        self, tokenizer: Tokenizer, calls: Sequence[Call], tools: Sequence[Tool]
    ) -> list[int]:
        """Calls as the model says them, in the order that the constraint asks for, without what
        ends its answer."""

    @abstractmethod
    def response(
        self, tokenizer: Tokenizer, calls: Sequence[Call], results: Sequence[Any]
    ) -> list[int]:
        """What tells the model the results, up to where it goes on."""


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The one that a checkpoint speaks, by its tokenizer."""
    from gemma_multi.tools.functiongemma import FunctionGemmaFormat
    from gemma_multi.tools.json_calls import JsonFormat

    return FunctionGemmaFormat(tokenizer) if tokenizer.has_function_pieces else JsonFormat()


def chosen(tools: Sequence[Tool], choice: Any) -> tuple[Sequence[Tool], str, int]:
    """(the tools that may be called, one of CHOICES, the most calls). A tool's name is also a
    choice, and one call of it."""
    if choice in CHOICES:
        return tools, choice, MAX_CALLS
    named = [tool for tool in tools if tool.name == choice]
    if not named:
        names = ", ".join(tool.name for tool in tools)
        raise OptionError(f"tool_choice is {choice!r}, expected {', '.join(CHOICES)} or {names}")
    return named, "required", 1
