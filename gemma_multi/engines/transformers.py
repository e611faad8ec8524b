"""Hugging Face transformers as an engine: its Gemma 3 on torch, in float32.

The reference: an engine like the others, so that someone else's code can be compared with ours,
and never chosen by `auto`. Eager attention, and the embedding scale of the checkpoint
(transformers rounds it only when it computes in bfloat16). The residual stream is carried as it is,
which in float32 gives the same numbers as at any power of two.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, dense
from gemma_multi.engines.backend import Backend, Request
from gemma_multi.engines.base import Engine, Session
from gemma_multi.engines.wants import ALL, HIDDEN, NOTHING, Rows, Wanted


def _create(checkpoint: Checkpoint, request: Request) -> Engine:
    import torch
    import transformers

    return TransformersEngine(torch, transformers, checkpoint)


class TransformersEngine(Engine):
    name = "transformers"
    precision = compute = "float32"
    device = "cpu"

    def __init__(self, torch: Any, transformers: Any, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.config.replace(residual_scale=1.0))
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

    def numpy(self, array: Any) -> np.ndarray:
        values: np.ndarray = array.numpy()
        return values

    def _assign(self, name: str, tensor: Tensor) -> None:
        value = self.torch.from_numpy(np.array(dense(tensor), np.float32))
        self.model.get_parameter(name).data.copy_(value)

    def _session(self, context_length: int) -> Session:
        return TransformersSession(self, context_length)

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
                inner(self.torch.from_numpy(ids.astype(np.int64)[None]))
        finally:
            for hook in hooks:
                hook.remove()
        return np.concatenate([state.numpy() for state in states])


class TransformersSession(Session):
    engine: TransformersEngine

    def __init__(self, engine: TransformersEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self._cache = self._new_cache()

    def _new_cache(self) -> Any:
        # a cache that knows of sliding layers drops what has left the window, and cannot go back
        return self.engine.transformers.DynamicCache()

    def _forward(self, ids: np.ndarray, want: Wanted) -> Any:
        engine = self.engine
        with engine.torch.no_grad():
            given = engine.torch.from_numpy(ids.astype(np.int64)[None])
            made = engine.model.model(given, past_key_values=self._cache, use_cache=True)
            hidden = made.last_hidden_state[0]
            head = engine.model.lm_head.weight
            if want is NOTHING:
                return None
            if want is HIDDEN:
                return hidden[-1]
            if isinstance(want, Rows):
                return head[engine.torch.from_numpy(want.ids)] @ hidden[-1]
            return hidden @ head.T if want is ALL else head @ hidden[-1]

    def _rewind(self, length: int) -> bool:
        if length:
            self._cache.crop(length - self.length)  # how many to drop, as a negative number
        else:
            self._cache = self._new_cache()
        return True

    def _copy(self) -> Session:
        other = TransformersSession(self.engine, self.context_length)
        other._cache = copy.deepcopy(self._cache)
        return other


BACKEND = Backend(
    name="transformers",
    title="transformers",
    order=9,
    create=_create,
    modules=lambda: ("torch", "transformers"),
    packages=("torch", "transformers"),
    install="pip install 'gemma-multi[reference]'",
    precisions=("float32",),
    suits=lambda quantized: 0,  # somebody else's whole stack, to be compared with
)
