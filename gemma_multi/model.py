"""Model: what a user holds. Words in, words out, the same on every backend.

One prompt's way through this package: `Model.stream` turns messages into ids (`chat_template`), the
loop (`generation.loop`) asks the engine's session for logits and the decoding for a token, and
`streaming.TextStream` turns tokens into text and watches for stop texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi import chat_template, tasks
from gemma_multi.chat import Chat
from gemma_multi.checkpoint import Adapter, Checkpoint, Tensor
from gemma_multi.config import ModelConfig
from gemma_multi.constraints import Constraint, ConstraintOptions
from gemma_multi.engines import ALL, Engine, Session, create_engine
from gemma_multi.errors import ContextError, OptionError
from gemma_multi.exporters import ExportReport, choose_format, export_checkpoint, save
from gemma_multi.formats.peft import read_adapter
from gemma_multi.generation import GenerationResult, TextScore
from gemma_multi.options import refuse_unknown
from gemma_multi.prefixes import PrefixCache, shared_beginning
from gemma_multi.progress import Progress, reporting
from gemma_multi.sampling import GenerationOptions
from gemma_multi.streaming import TextStream
from gemma_multi.tasks import BatchRow
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools import encode_after_calls, has_calls, read_tools, tool_format
from gemma_multi.transforms import cast_to_stored, merge
from gemma_multi.transforms.merge import merged_tensors

_SCORE_CHUNK = 128  # positions whose logits are looked at together, at most 134 MB


class Model:
    """A checkpoint on an engine. Made by `gemma_multi.load`."""

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine, context_length: int | None = None,
        backend_options: Mapping[str, Any] | None = None, prefix_cache: str | int = "256 MB",
    ) -> None:  # fmt: skip
        self.base = checkpoint
        self.engine = engine
        self.context_length = engine.check_context(context_length)
        self.adapters: dict[str, Adapter] = {}  # that can be switched to, by name
        self.active_adapter: str | None = None
        self._backend_options = dict(backend_options or {})  # to make the engine again
        self._merged: tuple[str, Checkpoint] | None = None  # the last one asked for
        # merged layers on the grid, which are small
        self._packed: dict[str, dict[str, Tensor]] = {}
        vocabulary = self.tokenizer.vocab_size
        if vocabulary < self.config.vocab_size - 64:  # models pad their vocabulary a little
            raise OptionError(
                f"the tokenizer has {vocabulary} pieces, but the model {self.config.vocab_size}"
            )
        self.stop_ids = checkpoint.stop_ids
        self.prefixes = PrefixCache(prefix_cache)  # what prompts have in common

    @property
    def checkpoint(self) -> Checkpoint:
        """What runs: the checkpoint that was loaded, with the active adapter merged. What the
        adapter changes in a dense one is in float32, to be rounded once."""
        if self.active_adapter is None:
            return self.base
        if self._merged is None or self._merged[0] != self.active_adapter:
            merged = merge(self.base, self.adapters[self.active_adapter])
            self._merged = (self.active_adapter, merged)
        return self._merged[1]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    def add_adapter(self, name: str, adapter: str | Path | Adapter) -> None:
        """Makes a LoRA adapter, or its directory in PEFT's layout, known under `name`. Raises
        CheckpointError where it is malformed or for another model."""
        if not isinstance(name, str) or not name or name in self.adapters:
            raise OptionError(f"adapter name {name!r} is taken or no name")
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self.config)
        adapter.check(self.config, self.base.provenance.channels)
        self.adapters[name] = adapter

    def switch_adapter(self, name: str | None) -> Model:
        """Switches to an adapter by name, or with None back to the base; the base is not loaded
        again. A chat reads its conversation anew when it goes on. Returns this model."""
        if name is not None and name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise OptionError(f"no adapter is called {name!r}; there are: {known}")
        if name == self.active_adapter:
            return self
        before = self.adapters.get(self.active_adapter or "")
        if self.engine.fixed_weights:
            merged = self.base if name is None else merge(self.base, self.adapters[name])
            self.engine = create_engine(
                merged, self.engine.name, self.engine.precision, self.engine.context_length,
                self._backend_options,
            )  # fmt: skip
        else:
            changes = {n: self.base.tensors[n] for n in (before.tensors if before else ())}
            self.engine.assign(changes | self._changes(name))
        self.active_adapter = name
        self.prefixes.clear()
        return self

    def _changes(self, name: str | None) -> dict[str, Tensor]:
        """The layers that an adapter changes, with the change in them."""
        if name is None:
            return {}
        if name not in self._packed:
            merged = merged_tensors(self.base, self.adapters[name])
            if not self.base.is_quantized:
                return merged
            self._packed[name] = merged
        return self._packed[name]

    @property
    def backend(self) -> str:
        return self.engine.name

    def generate(
        self, prompt: str | Sequence[chat_template.Message], *, raw: bool = False,
        tools: Sequence[Any] | None = None, tool_choice: str = "auto", **options: Any,
    ) -> GenerationResult:  # fmt: skip
        """Answers a prompt (one user turn) or a list of `{"role", "content"}` messages, in which
        with `tools` also stand a model's `calls` and what they gave (`role: "tool"`), as in
        `Chat.messages`.

        `raw=True` continues the prompt as plain text, as base models want it. For the options see
        `GenerationOptions`, whose defaults come from the checkpoint, and `ConstraintOptions`
        (`schema`, `choices`, `regex`, `grammar`): what the text must be, and is; `result.parsed` is
        the object. `tools` are functions, pydantic models or JSON that the answer may call: then
        `result.calls` says which, with valid arguments, and `tool_choice` ("auto", "required",
        "none" or a name) whether it must.

        Raises OptionError for an empty prompt or a bad option, ContextError for a prompt longer
        than the context, ConstraintError where `max_tokens` ends a constrained text before it is
        whole.
        """
        return self.stream(prompt, raw=raw, tools=tools, tool_choice=tool_choice, **options).run()

    def stream(
        self, prompt: str | Sequence[chat_template.Message], *, raw: bool = False,
        tools: Sequence[Any] | None = None, tool_choice: str = "auto", **options: Any,
    ) -> TextStream:  # fmt: skip
        """The same, as an iterator of text pieces; closing it stops generation."""
        chosen, constraint = self.answer_options(options)
        opening: list[int] = []
        if tools is None and tool_choice != "auto":
            raise OptionError(f"tool_choice is {tool_choice!r}, but there are no tools")
        if tools is not None:
            if raw or constraint is not None:
                other = "raw=True" if raw else constraint.kind  # type: ignore[union-attr]
                raise OptionError(f"an answer cannot have both tools and {other}; give one")
            declared, speaks = read_tools(tools), tool_format(self.tokenizer)
            constraint = speaks.constraint(declared, tool_choice)
        if tools is not None and has_calls(prompt):
            ids, before = encode_after_calls(self.tokenizer, prompt, declared)
            self.check_prompt(ids)
            earlier = shared_beginning(ids, before)
        else:
            if tools is not None:
                system, prompt = chat_template.split_system(prompt)
                opening, system = speaks.opening(self.tokenizer, declared, system)
                prompt = chat_template.with_system(system, prompt)
            ids = self.encode(prompt, raw=raw, opening=opening)
            # what comes before the last turn's own text may come again
            earlier = 0 if raw else self._shared_with_another(prompt, ids, opening)
        session, reused = self.prefixes.start(self.engine, ids, earlier, self.context_length)
        return TextStream(self, session, ids[session.length :], chosen, constraint, reused)

    def _shared_with_another(
        self, prompt: str | Sequence[chat_template.Message], ids: Sequence[int],
        opening: Sequence[int],
    ) -> int:  # fmt: skip
        """How many of a prompt's ids do not depend on the text of its last turn."""
        if isinstance(prompt, str) and not opening:
            return 0
        before, last = (
            ([], prompt) if isinstance(prompt, str) else (prompt[:-1], prompt[-1]["content"])
        )
        another = {"role": "user", "content": "A" if last.strip().startswith("7") else "7"}
        other = chat_template.encode_prompt(self.tokenizer, [*before, another], opening)
        return shared_beginning(ids, other)

    def chat(
        self, system: str | None = None, tools: Sequence[Any] | None = None,
        messages: Sequence[chat_template.Message] | None = None,
    ) -> Chat:  # fmt: skip
        """A conversation that remembers its turns and keeps their cache. With `tools`, what the
        model calls is in `calls` of a result, and `Chat.reply` tells it what they gave. With
        `messages`, `Chat.messages` of an earlier one, it goes on from there."""
        return Chat(self, system, tools, messages)

    def classify(
        self, text: str | Sequence[str], labels: Sequence[str], instruction: str | None = None,
        examples: Any = None, *, calibrate: bool = False, raw: bool = False,
        progress: Progress = True,
    ) -> Any:  # fmt: skip
        """Which of `labels` a text gets: a `Classification` with the probability of each, or a list
        of them for a list of texts.

        `examples` are (text, label) pairs. `calibrate=True` divides by what each label would get
        without a text, which takes away a model's liking for one of them. `raw=True` is for base
        models: the prompt is plain text instead of a conversation. Raises OptionError for labels
        that are none, the same, or more than 1,000.
        """
        return tasks.classify(
            self, text, labels, instruction, examples, calibrate=calibrate, raw=raw,
            progress=progress,
        )  # fmt: skip

    def route(
        self, query: str | Sequence[str], routes: Mapping[str, str], instruction: str | None = None,
        examples: Any = None, *, calibrate: bool = False, raw: bool = False,
        progress: Progress = True,
    ) -> Any:  # fmt: skip
        """Which of `routes` (name -> description) a request should go to; like `classify`."""
        return tasks.route(
            self, query, routes, instruction, examples, calibrate=calibrate, raw=raw,
            progress=progress,
        )  # fmt: skip

    def extract(
        self, text: str | Sequence[str], schema: Any, instruction: str | None = None,
        examples: Any = None, *, raw: bool = False, progress: Progress = True, **options: Any,
    ) -> Any:  # fmt: skip
        """What a text says, as an object of `schema` (see `ConstraintOptions`): a dict, or an
        instance of the type that was given; a list of them for a list of texts. Greedy unless a
        `temperature` is given. Raises ConstraintError where `max_tokens` cuts it off."""
        return tasks.extract(
            self, text, schema, instruction, examples, raw=raw, progress=progress, **options
        )

    def embed(
        self, texts: str | Sequence[str], pooling: str = "last", *, progress: Progress = True
    ) -> np.ndarray:
        """Texts as directions of length 1: `f32[N, D]`, or `f32[D]` of one text. `pooling` takes
        the last token's hidden state, or the mean of all. Raises OptionError for an empty text."""
        return tasks.embed(self, texts, pooling, progress)

    def batch(
        self, items: Iterable[Any], task: str = "generate", *, width: int | None = None,
        progress: Progress = True, **options: Any,
    ) -> Iterator[BatchRow]:  # fmt: skip
        """A task ("generate", "classify", "route", "extract" or "embed") over rows, which may be
        without end: a `BatchRow` for each, in order, as they are done.

        An item is what the task takes for one text, or a dict of it (`prompt`, `messages`, `text`
        or `query`) with options of its own, and `adapter`: the name of the one to answer with.
        `options` are for all rows. `width` rows are on their way at a time, on Keras and MLX in
        one batch (and asked of `items` at once), and a greedy text does not depend on which they
        are. What a row is refused for,
        or fails with, is its `error`; what is wrong for all of them raises OptionError at once.
        """
        return tasks.batch(self, items, task, width=width, progress=progress, **options)

    def encode(
        self, prompt: str | Sequence[chat_template.Message], *, raw: bool = False,
        opening: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """The token ids that `generate` reads for a prompt; `opening` are those of turns in front
        of it, in which tools are declared.

        Raises OptionError for an empty prompt, ContextError for one longer than the context.
        """
        if isinstance(prompt, str):
            if not prompt.strip() and not (raw and prompt):
                raise OptionError("the prompt is empty; give it some text")
            if raw:
                ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
            else:
                turn = {"role": "user", "content": prompt}
                ids = chat_template.encode_prompt(self.tokenizer, [turn], opening)
        else:
            if raw:
                raise OptionError("raw=True takes a text, received messages")
            ids = chat_template.encode_prompt(self.tokenizer, prompt, opening)
        self.check_prompt(ids)
        return ids

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises ContextError for a prompt that the context does not hold."""
        if len(ids) > self.context_length:
            raise ContextError(
                f"the prompt is {len(ids)} tokens long, but the context holds "
                f"{self.context_length}; shorten it or raise context_length"
            )

    def save_prefixes(self, path: str | Path) -> Path:
        """Writes what the prefix cache holds to a file, for `load_prefixes` in another process."""
        self.prefixes.save(Path(path), self._weights_read_with())
        return Path(path)

    def load_prefixes(self, path: str | Path) -> int:
        """Takes in beginnings of prompts that were saved, so that they are not read again; how
        many of them. Raises OptionError where they were read with other weights or on another
        engine, CheckpointError for a damaged file."""
        return self.prefixes.load(
            Path(path), self._weights_read_with(), self.engine, self.context_length
        )

    def _weights_read_with(self) -> str:
        engine = self.engine
        told = (
            engine.name, engine.precision, engine.compute, str(self.context_length),
            self.checkpoint.tensors.identity, json.dumps(self.config.to_dict(), sort_keys=True),
        )  # fmt: skip
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def score(self, text: str) -> TextScore:
        """The log-probability of each token of a plain text, after `<bos>`."""
        ids = self.encode(text, raw=True)
        return TextScore(tuple(ids[1:]), tuple(self.logprobs(ids).tolist()))

    def logprobs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The log-probability of each token but the first after those before it: `f64[T - 1]`."""
        session = self.new_session()
        parts = [np.zeros(0)]
        for start in range(0, len(ids) - 1, _SCORE_CHUNK):
            targets = ids[start + 1 : start + 1 + _SCORE_CHUNK]
            logits = session.read(ids[start : start + len(targets)], ALL)
            logits = logits - logits.max(axis=-1, keepdims=True)  # theirs may be read-only
            found = logits[np.arange(len(targets)), targets].astype(np.float64)
            totals = np.exp(logits, out=logits).sum(axis=-1, dtype=np.float64)
            parts.append(found - np.log(totals))
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        """What runs here, in plain values that print and serialise."""
        config, checkpoint = self.config, self.base
        return {
            "source": checkpoint.provenance.source,
            **({"adapter": self.active_adapter} if self.active_adapter else {}),
            "license": checkpoint.provenance.license,
            "parameters": config.num_parameters,
            "embedding_parameters": config.num_embedding_parameters,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context_length": self.context_length,
            "stored_as": checkpoint.precision,
            "grid": checkpoint.grid,
            "stored_bytes": checkpoint.nbytes,
            "backend": self.engine.name,
            "device": self.engine.device,
            "weights": self.engine.precision,
            "activations": self.engine.compute,
        }

    def save(self, output: str | Path) -> Path:
        """Writes the checkpoint, with the active adapter merged, in its stored precision to a new
        directory."""
        return save(cast_to_stored(self.checkpoint, self.base), output)

    def export(
        self, output: str | Path, *, format: str | None = None, progress: Progress = True,
        **options: Any,
    ) -> ExportReport:  # fmt: skip
        """Writes the checkpoint, with the active adapter merged; see `gemma_multi.export`."""
        checkpoint = self.checkpoint
        as_stored = options.get("precision", "auto") == "auto"
        if as_stored and choose_format(output, format).is_directory:
            checkpoint = cast_to_stored(checkpoint, self.base)
        with reporting(progress, "exporting") as report:
            return export_checkpoint(checkpoint, output, format=format, progress=report, **options)

    def new_session(self) -> Session:
        """An empty conversation on the engine."""
        return self.engine.session(self.context_length)

    def answer_options(
        self, given: Mapping[str, Any]
    ) -> tuple[GenerationOptions, Constraint | None]:
        """How to choose tokens, a caller's options over the checkpoint's own, and what the text
        must be."""
        refuse_unknown((GenerationOptions, ConstraintOptions), given)
        own = {field.name for field in fields(ConstraintOptions)}
        asked = {n: v for n, v in given.items() if n in own and v is not None}
        chosen = {n: v for n, v in given.items() if n not in own}
        return (
            GenerationOptions.merge(self.base.generation, chosen),
            ConstraintOptions(**asked).compile(),
        )
