"""Chat: a conversation with a model, which reads only what is new in each turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_multi import chat_template
from gemma_multi.constraints import Constraint
from gemma_multi.errors import ConstraintError, ContextError, OptionError
from gemma_multi.generation import GenerationResult, shared_beginning
from gemma_multi.sampling import GenerationOptions
from gemma_multi.streaming import TextStream

if TYPE_CHECKING:
    from gemma_multi.model import Model


class Chat:
    """A conversation: each turn reads only what is new."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        if system is not None and not isinstance(system, str):
            raise OptionError(f"system is {system!r}, expected a text")
        self._model = model
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, not the system text."""
        self.messages: list[dict[str, str]] = []
        self._ids = [self._model.tokenizer.bos_id]  # the whole conversation so far
        self._start_session()
        self._answer: ChatStream | None = None

    def _start_session(self) -> None:
        self._session = self._model.new_session()
        self._adapter = self._model.active_adapter  # whose cache the session holds

    def send(self, text: str, **options: Any) -> GenerationResult:
        """The model's answer to a user's turn."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, text: str, **options: Any) -> ChatStream:
        """The answer piece by piece. Closing it early, or starting another, keeps what was said
        so far; where nothing was said yet, the turn never happened."""
        chosen, constraint = self._model.answer_options(options)
        if self._answer is not None:
            self._answer.close()
        self._answer = ChatStream(self, text, chosen, constraint)
        return self._answer


class ChatStream(TextStream):
    """A TextStream that becomes part of its conversation when it ends."""

    def __init__(
        self, chat: Chat, text: str, options: GenerationOptions, constraint: Constraint | None
    ) -> None:
        model, tokenizer = chat._model, chat._model.tokenizer
        if not isinstance(text, str) or not text.strip():
            raise OptionError("the prompt is empty; give it some text")
        system = chat._system if chat._system and not chat.messages else ""
        spoken = chat_template.user_text(text, system)
        self._before = chat._ids + chat_template.encode_turn(tokenizer, "user", spoken)
        self._before += chat_template.open_turn(tokenizer, "model")
        if len(self._before) > model.context_length:
            raise ContextError(
                f"the conversation would be {len(self._before)} tokens long, but the context "
                f"holds {model.context_length}; reset it or raise context_length"
            )
        if chat._adapter != model.active_adapter:
            chat._start_session()
        # what an earlier turn generated but never read is read now, with the new turn
        known = shared_beginning(chat._session.ids.tolist(), self._before)
        chat._session.truncate(min(known, len(self._before) - 1))
        self._chat, self._user = chat, text
        reused = chat._session.length
        super().__init__(model, chat._session, self._before[reused:], options, constraint, reused)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            if self._decoding.tokens or self._decoding.finish_reason != "cancelled":
                self._remember()
            else:
                self._forget()
            raise
        except ConstraintError:  # not what was asked for
            self._forget()
            raise

    def close(self) -> None:
        super().close()
        if self._decoding.tokens:
            self._remember()
        else:
            self._forget()

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
        if tokenizer.decode(said) != result.text:  # cut at a stop text, or in mid-character
            said = tokenizer.encode(result.text)
        chat._ids = [*self._before, *said, *chat_template.close_turn(tokenizer)]
        chat.messages += [
            {"role": "user", "content": self._user},
            {"role": "model", "content": result.text},
        ]
