"""Hugging Face transformers as a subject: its Gemma 3 and its tokenizer, in float32.

An engine and a model like the others, so that someone else's code can be the reference. Eager
attention, the embedding scale of the checkpoint (transformers rounds it only when it computes in
bfloat16), and conversations spelt by `chat` with every text encoded by their tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines.base import Engine, Session
from gemma_multi.errors import BackendError, CheckpointError
from gemma_multi.model import Model
from gemma_multi.tokenizer import Tokenizer

INSTALL = "pip install 'gemma-multi[reference]'"


def load_transformers(checkpoint: Checkpoint) -> Model:
    """Raises BackendError where transformers or torch is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BackendError(f"transformers needs {error.name}, not installed: {INSTALL}") from error
    return TransformersModel(checkpoint, TransformersEngine(torch, transformers, checkpoint))


class TransformersModel(Model):
    """A checkpoint in transformers, with its own tokenizer."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return TransformersTokenizer(self.checkpoint)


class TransformersTokenizer(Tokenizer):
    """Encodes and decodes by transformers; pieces and special ids are looked up in ours."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoTokenizer

        super().__init__(checkpoint.tokenizer.model)
        if checkpoint.path is None or not checkpoint.path.is_dir():
            raise CheckpointError(
                "transformers needs a model directory with its tokenizer, received "
                f"{checkpoint.path or 'a checkpoint in memory'}"
            )
        # from a tokenizer.model it would let a text spell these, even when told to split them
        control = [self.piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
        self._theirs = AutoTokenizer.from_pretrained(str(checkpoint.path))
        self._theirs.backend_tokenizer.add_special_tokens(control)

    def encode(self, text: str | bytes) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        text = text.encode(errors="replace").decode()  # theirs refuses lone surrogates
        ids: list[int] = self._theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        spoken = [token for token in ids if self.token_bytes(token)]  # no control tokens
        text: str = self._theirs.decode(spoken)
        return text


class TransformersEngine(Engine):
    name = "transformers"
    precision = compute = "float32"
    device = "cpu"

    def __init__(self, torch: Any, transformers: Any, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.config)
        self.torch, self.transformers = torch, transformers
        fields = {k: v for k, v in checkpoint.config.to_dict().items() if k != "architectures"}
        if fields["rope_scaling"] is None:
            del fields["rope_scaling"]
        config = transformers.Gemma3TextConfig(**fields, attn_implementation="eager")
        with torch.device("meta"):
            model = transformers.Gemma3ForCausalLM(config)
        self.model = model.to_empty(device="cpu").float().eval()
        weights = {
            name: torch.from_numpy(np.array(checkpoint.weight(name), np.float32))
            for name in checkpoint.tensors
        }
        _, extra = self.model.load_state_dict(weights, strict=False)
        assert not extra, extra
        self.model.tie_weights()
        inner = self.model.model
        inner.embed_tokens.embed_scale = torch.tensor(checkpoint.config.embedding_scale)
        inner.rotary_emb = type(inner.rotary_emb)(config)  # its buffers are no weights

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        held = self.model.get_parameter(name).detach()
        values: np.ndarray = (held[rows] if held.ndim == 2 else 1 + held).numpy()
        return values

    def _session(self, batch: int, context_length: int) -> Session:
        return TransformersSession(self, batch, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        states: list[Any] = []
        inner = self.model.model
        hooks = [inner.layers[0].register_forward_pre_hook(lambda _, x: states.append(x[0]))]
        for module in (*inner.layers, inner.norm):
            hooks.append(module.register_forward_hook(
                lambda _, __, y: states.append(y[0] if isinstance(y, tuple) else y)
            ))  # fmt: skip
        try:
            with self.torch.no_grad():
                inner(self.torch.from_numpy(ids.astype(np.int64)))
        finally:
            for hook in hooks:
                hook.remove()
        return np.concatenate([state.numpy() for state in states])


class TransformersSession(Session):
    def __init__(self, engine: TransformersEngine, batch: int, context_length: int) -> None:
        super().__init__(engine.config, batch, context_length)
        self._engine = engine
        self._cache = self._new_cache()

    def _new_cache(self) -> Any:
        engine = self._engine
        return engine.transformers.DynamicCache(config=engine.model.config)

    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        engine = self._engine
        with engine.torch.no_grad():
            given = engine.torch.from_numpy(ids.astype(np.int64))
            made = engine.model(
                given, past_key_values=self._cache, use_cache=True,
                logits_to_keep=0 if every else 1,
            )  # fmt: skip
        logits: np.ndarray = made.logits.float().numpy()
        return logits

    def _rewind(self, length: int) -> bool:
        if not length:
            self._cache = self._new_cache()
        return not length

    def _copy(self) -> Session:
        other = TransformersSession(self._engine, self.batch, self.context_length)
        other._cache = copy.deepcopy(self._cache)
        return other
