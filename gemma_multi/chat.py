"""Chat: a conversation with a model, which reads only what is new in each turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi import chat_template
from gemma_multi.constraints import Constraint
from gemma_multi.errors import ConstraintError, ContextError, OptionError
from gemma_multi.generation import GenerationResult
from gemma_multi.prefixes import shared_beginning
from gemma_multi.sampling import GenerationOptions
from gemma_multi.streaming import TextStream
from gemma_multi.tools import Call, read_tools, tool_format

if TYPE_CHECKING:
    from gemma_multi.model import Model


class Chat:
    """A conversation: each turn reads only what is new."""

    def __init__(
        self, model: Model, system: str | None = None, tools: Sequence[Any] | None = None,
        messages: Sequence[chat_template.Message] | None = None,
    ) -> None:  # fmt: skip
        """`messages` are those of an earlier conversation, which this one takes up; a system
        message in front of them is the system text. Raises OptionError for what is none."""
        if system is not None and not isinstance(system, str):
            raise OptionError(f"system is {system!r}, expected a text")
        said = chat_template.read_conversation(messages or [])
        if said and said[0]["role"] == "system":
            if system:
                raise OptionError("there is a system text, and the messages begin with another")
            system, said = said[0]["content"], said[1:]
        if said and tools is not None:
            raise OptionError("a conversation with tools begins anew; leave out its messages")
        self._model = model
        self.system = system or ""
        self._system = self.system  # what is left of it for the first turn
        self.tools = read_tools(tools) if tools is not None else ()
        self._opening: list[int] = []  # the turns that declare them
        self._format = tool_format(model.tokenizer)
        if self.tools:
            self._opening, self._system = self._format.opening(
                model.tokenizer, self.tools, self._system
            )
        self.reset()
        for message in said:
            role, text = message["role"], message["content"]
            if role == "user":
                text = chat_template.user_text(text, "" if self.messages else self._system)
            self._ids += chat_template.encode_turn(model.tokenizer, role, text)
            self.messages.append(dict(message))

    def reset(self) -> None:
        """Forgets the conversation, not the system text."""
        self.messages: list[dict[str, Any]] = []
        # the whole conversation so far
        self._ids = [self._model.tokenizer.bos_id, *self._opening]
        self.calls: tuple[Call, ...] = ()  # of the last answer, to be replied to
        self._start_session()
        self._answer: ChatStream | None = None

    def _start_session(self) -> None:
        self._session = self._model.new_session()
        self._adapter = self._model.active_adapter  # whose cache the session holds

    def send(self, text: str, **options: Any) -> GenerationResult:
        """The model's answer to a user's turn."""
        return self.stream(text, **options).run()

    def stream(self, text: str, **options: Any) -> ChatStream:
        """The answer piece by piece. Closing it early, or starting another, keeps what was said
        so far; where nothing was said yet, the turn never happened."""
        if not isinstance(text, str) or not text.strip():
            raise OptionError("the prompt is empty; give it some text")
        chosen, constraint = self._answer_options(options)
        self._finish_last()
        tokenizer = self._model.tokenizer
        spoken = chat_template.user_text(text, "" if self.messages else self._system)
        # calls that nobody replied to are still the model's own turn
        waiting = self.calls and self._format.in_one_turn
        turn = chat_template.close_turn(tokenizer) if waiting else []
        turn += chat_template.encode_turn(tokenizer, "user", spoken)
        turn += chat_template.open_turn(tokenizer, "model")
        self._answer = ChatStream(self, turn, {"role": "user", "content": text}, chosen, constraint)
        return self._answer

    def reply(self, results: Sequence[Any], **options: Any) -> GenerationResult:
        """What the model says to what its calls gave: a result for each of `calls`, in order."""
        chosen, constraint = self._answer_options(options)
        self._finish_last()
        if not self.calls:
            raise OptionError("there are no calls to reply to")
        if isinstance(results, str | Mapping) or not isinstance(results, Sequence):
            raise OptionError(f"results are {results!r}, expected a list, one for each call")
        if len(results) != len(self.calls):
            raise OptionError(f"{len(results)} results for {len(self.calls)} calls")
        turn = self._format.response(self._model.tokenizer, self.calls, results)
        said = {"role": "tool", "content": list(results)}
        self._answer = stream = ChatStream(self, turn, said, chosen, constraint)
        return stream.run()

    def _finish_last(self) -> None:
        if self._answer is not None:
            self._answer.close()

    def _answer_options(
        self, options: dict[str, Any]
    ) -> tuple[GenerationOptions, Constraint | None]:
        choice = options.pop("tool_choice", None)
        if choice is not None and not self.tools:
            raise OptionError("tool_choice is for a chat with tools")
        chosen, constraint = self._model.answer_options(options)
        if choice is not None and constraint is not None:
            raise OptionError(f"an answer cannot have both tools and {constraint.kind}; give one")
        if self.tools and constraint is None:
            constraint = self._format.constraint(self.tools, choice or "auto")
        return chosen, constraint


class ChatStream(TextStream):
    """A TextStream that becomes part of its conversation when it ends."""

    def __init__(
        self, chat: Chat, turn: list[int], said: dict[str, Any], options: GenerationOptions,
        constraint: Constraint | None,
    ) -> None:  # fmt: skip
        """`turn` is what the model has not read of it, `said` what a message says of that."""
        model = chat._model
        self._before = chat._ids + turn
        if len(self._before) > model.context_length:
            raise ContextError(
                f"the conversation would be {len(self._before)} tokens long, but the context "
                f"holds {model.context_length}; reset it or raise context_length"
            )
        if chat._adapter != model.active_adapter:
            chat._start_session()
        # what an earlier turn generated but never read is read now, with the new turn
        known = shared_beginning(chat._session.ids, self._before)
        chat._session.truncate(min(known, len(self._before) - 1))
        self._chat, self._said = chat, said
        reused = chat._session.length
        super().__init__(model, chat._session, self._before[reused:], options, constraint, reused)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            if self._said_something or self._decoding.finish_reason not in ("cancelled", "closed"):
                self._remember()
            else:
                self._forget()
            raise
        except ConstraintError:  # not what was asked for
            self._forget()
            raise

    def close(self) -> None:
        super().close()
        if self._said_something:
            self._remember()
        else:
            self._forget()

    @property
    def _said_something(self) -> bool:
        """Half a call is nothing that was said."""
        return bool(self._decoding.tokens and (self.result.calls or not self._silent))

    def _forget(self) -> None:
        """The turn never happened."""
        if self._chat._answer is self:
            self._chat._answer = None

    def _remember(self) -> None:
        chat, result = self._chat, self.result
        if chat._answer is not self:  # remembered already, or the chat was reset
            return
        chat._answer = None
        tokenizer, said = chat._model.tokenizer, list(result.tokens)
        if not result.calls and tokenizer.decode(said) != result.text:
            said = tokenizer.encode(result.text)  # cut at a stop text, or in mid-character
        chat._ids = [*self._before, *said]
        if not (result.calls and chat._format.in_one_turn):
            chat._ids += chat_template.close_turn(tokenizer)
        chat.calls = result.calls
        answer: dict[str, Any] = {"role": "model", "content": result.text}
        if result.calls:
            answer["calls"] = [{"name": c.name, "arguments": c.arguments} for c in result.calls]
        chat.messages += [self._said, answer]
