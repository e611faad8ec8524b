"""Gemma3Backbone from keras-hub: imported lightly, built without throwaway weights, and wired.

Design choices:
- `import keras_hub` would import TensorFlow for its data pipelines, which no engine needs and
  which costs seconds and 400 MB. While keras-hub is imported, `tensorflow` is a stand-in that
  imports the real one on first use, so nothing of keras-hub is lost.
- A backbone is built inside a `StatelessScope`, where variables get a shape but no values: the
  270M weights are not first drawn at random and then thrown away.
- keras-hub fixes Gemma's constants (pattern 6, rope bases, eps, query scale) in its constructor.
  They are set again from the config, so that any Gemma 3 text model is computed as it says.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

from gemma_multi.config import ModelConfig
from gemma_multi.errors import BackendError
from gemma_multi.formats.heads import Arrange
from gemma_multi.formats.keras import NORMS, places


class _Deferred(ModuleType):
    """Stands in for a module until someone, after the import, reads from it."""

    importing = True

    def __getattr__(self, name: str) -> Any:
        if self.importing or name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _deferred(*names: str) -> Iterator[None]:
    """Within, `import name` gives a stand-in; afterwards it gives the real module again."""
    stand_ins = [_Deferred(name) for name in names if name not in sys.modules]
    for stand_in in stand_ins:
        sys.modules[stand_in.__name__] = stand_in
        # keras-hub asks whether TensorFlow has this, and takes it for uninstalled if not
        stand_in.executing_eagerly = (  # type: ignore[attr-defined]
            lambda: importlib.import_module("tensorflow").executing_eagerly()
        )
    try:
        yield
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in.__name__]
            stand_in.importing = False


def import_keras() -> ModuleType:
    """Keras, on JAX unless KERAS_BACKEND says otherwise."""
    if "keras" not in sys.modules and not os.environ.get("KERAS_BACKEND"):
        os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() not in ("jax", "tensorflow"):
        raise BackendError(
            f"Keras runs on {keras.backend.backend()!r} here; set KERAS_BACKEND=jax or tensorflow"
        )
    return keras


def import_backbone() -> Any:
    """The class Gemma3Backbone, without TensorFlow unless Keras runs on it."""
    keras = import_keras()
    heavy = ("tensorflow", "tensorflow_text") if keras.backend.backend() == "jax" else ()
    with _deferred(*heavy):
        from keras_hub.models import Gemma3Backbone
    return Gemma3Backbone


def build_backbone(config: ModelConfig, dtype: str) -> Any:
    """A Gemma3Backbone of this shape whose variables have no values yet; see `weight_slots`."""
    backbone_class = import_backbone()
    from keras.src.backend.common import global_state
    from keras.src.backend.common.stateless_scope import StatelessScope

    # Keras remembers variables without values to fill them later; these are filled by us
    waiting = list(global_state.get_global_attribute("uninitialized_variables", []))
    with StatelessScope(initialize_variables=False):
        backbone = backbone_class(
            vocabulary_size=config.vocab_size,
            image_size=None,
            num_layers=config.num_hidden_layers,
            num_query_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            hidden_dim=config.hidden_size,
            intermediate_dim=config.intermediate_size,
            head_dim=config.head_dim,
            use_query_key_norm=True,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=config.sliding_window,
            layer_norm_epsilon=config.rms_norm_eps,
            dtype=dtype,
        )
    global_state.set_global_attribute("uninitialized_variables", waiting)
    for i, layer in enumerate(backbone.transformer_layers):
        sliding = config.is_sliding(i)
        attention = layer.attention
        attention.use_sliding_window_attention = False  # its mask is given, by keras_decoder
        attention.rope_layer.max_wavelength = (
            config.rope_local_theta if sliding else config.rope_theta
        )
        attention.rope_layer.scaling_factor = 1.0 if sliding else config.rope_scaling_factor
        attention.head_dim = config.query_pre_attn_scalar  # once built, only scales the queries
        for module, norm in _norms(layer).items():
            norm.epsilon = config.norm_eps(module)
            _set_gain(norm, config.norm_gain(module))
    backbone.layer_norm.epsilon = config.norm_eps("model.norm")
    return backbone


def run_block(layer: Any, x: Any, attend: Callable[[Any], Any]) -> Any:
    """One of keras-hub's blocks, `[B, T, D]` -> `[B, T, D]`, of which `attend` does the attention.

    Its own call clips the stream in float16, which at a residual scale never comes near the ends;
    the gradients of those clips XLA would compute anew in every layer, for all layers behind it.
    """
    from keras import activations

    x = x + layer.post_attention_norm(attend(layer.pre_attention_norm(x)))
    h = layer.pre_ffw_norm(x)
    h = activations.gelu(layer.gating_ffw(h), approximate=True) * layer.gating_ffw_2(h)
    return x + layer.post_ffw_norm(layer.ffw_linear(h))


def _norms(layer: Any) -> dict[str, Any]:
    """A layer's norms by the names of Hugging Face."""
    return {name: attrgetter(norm)(layer) for name, norm in NORMS.items()}


def _set_gain(norm: Any, gain: float) -> None:
    """Multiplies what `norm` gives by `gain`, before it is rounded to the type of activations."""
    if gain == 1:
        return
    from keras import ops

    class GainedRMSNormalization(type(norm)):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            x = ops.cast(x, "float32")
            power = ops.mean(ops.square(x), axis=-1, keepdims=True)
            normed = x * ops.reciprocal(ops.sqrt(power + self.epsilon))
            weight = ops.cast(self.scale, "float32")
            return ops.cast(normed * ((1 + weight) * gain), self.compute_dtype)

    norm.__class__ = GainedRMSNormalization


@dataclass(frozen=True)
class WeightSlot:
    """The variable that holds a tensor, and how it lies there."""

    variable: Any
    arrange: Arrange  # from Hugging Face's layout to Keras's
    restore: Arrange  # and back


def weight_slots(backbone: Any, config: ModelConfig) -> dict[str, WeightSlot]:
    """Every tensor's slot by its Hugging Face name."""
    layers = backbone.transformer_layers
    return {
        name: WeightSlot(
            attrgetter(place.variable)(backbone if place.layer is None else layers[place.layer]),
            place.arrange,
            place.restore,
        )
        for name, place in places(config).items()
    }
