"""What differs between Keras on JAX and Keras on TensorFlow: compiling, and moving arrays.

Compiled code for JAX is kept in the user's cache, so only the first run on a machine waits for
XLA. A directory the user has set with `jax_compilation_cache_dir` is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.cache import COMPILED, writable_cache

_BFLOAT16_SINCE = 8.0  # NVIDIA's compute capability


class KerasRuntime:
    """The framework under Keras. Arrays it makes are its own."""

    def __init__(self, keras: ModuleType) -> None:
        self.keras = keras
        self.on_jax = keras.backend.backend() == "jax"
        if self.on_jax:
            import jax

            self.jax = jax
            self.device = jax.default_backend()
            cache = writable_cache(COMPILED)
            if cache is not None and not jax.config.jax_compilation_cache_dir:
                jax.config.update("jax_compilation_cache_dir", str(cache))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        else:
            import tensorflow

            self.tf = tensorflow
            self.device = "gpu" if tensorflow.config.list_physical_devices("GPU") else "cpu"

    @property
    def fast(self) -> str:
        """The type of activations that the device is fast at."""
        if self.device == "cpu":
            return "float32"
        return "bfloat16" if self._has_bfloat16() else "float16"

    @property
    def gpu(self) -> str:
        """The cards by name, and what they lack; "" without one."""
        if self.device == "cpu":
            return ""
        if self.on_jax:
            names = {device.device_kind for device in self.jax.devices()}
        else:
            devices = self.tf.config.list_physical_devices("GPU")
            details = self.tf.config.experimental.get_device_details
            names = {details(device).get("device_name", "a GPU") for device in devices}
        lack = "" if self._has_bfloat16() else ", which has no bfloat16: float16 is used"
        return ", ".join(sorted(names)) + lack

    def _has_bfloat16(self) -> bool:
        """NVIDIA's cards since the A100 do; the T4 and the V100 of free notebooks do not."""
        if self.on_jax:
            capability = getattr(self.jax.devices()[0], "compute_capability", "")
            return not capability or float(capability) >= _BFLOAT16_SINCE
        devices = self.tf.config.list_physical_devices("GPU")
        details = self.tf.config.experimental.get_device_details(devices[0])
        major, minor = details.get("compute_capability", (8, 0))
        return major + minor / 10 >= _BFLOAT16_SINCE

    def array(self, array: np.ndarray, dtype: str) -> Any:
        """A framework array of this type. (TensorFlow's numbers take shape in NumPy first.)"""
        if self.on_jax:
            return self.jax.numpy.asarray(array).astype(dtype)
        return array.astype("float32" if dtype == "float32" else array.dtype)

    def as_value(self, array: Any, dtype: str) -> Any:
        """What a Keras variable holds."""
        if self.on_jax:
            return self.jax.numpy.asarray(array, dtype)
        return self.tf.Variable(self.tf.cast(self.tf.constant(np.ascontiguousarray(array)), dtype))

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        return self.jax.numpy.zeros(shape, dtype) if self.on_jax else self.tf.zeros(shape, dtype)

    def copy(self, array: Any) -> Any:
        """TensorFlow's tensors never change; JAX's caches are given away to the next step."""
        return self.jax.numpy.copy(array) if self.on_jax else array

    def pad_positions(self, cache: Any, extra: int) -> Any:
        """`[B, S, heads, dim]` -> `[B, S + extra, heads, dim]`, zeros behind."""
        pads = ((0, 0), (0, extra), (0, 0), (0, 0))
        return self.jax.numpy.pad(cache, pads) if self.on_jax else self.tf.pad(cache, pads)

    def compile(self, function: Callable[..., Any], variables: list[Any]) -> Compiled:
        """`function(ids, caches, start, count, rows, **static)`, compiled once per shape."""
        return Compiled(self, function, variables)


class Compiled:
    """A function of a model's variables, whose values are read once, not at every call."""

    def __init__(
        self, runtime: KerasRuntime, function: Callable[..., Any], variables: list[Any]
    ) -> None:
        self._runtime, self._function, self._variables = runtime, function, variables
        self._trace: Callable[..., Any]
        if runtime.on_jax:
            self._trace = runtime.jax.jit(
                self._stateless, static_argnames=("wanted", "fresh"), donate_argnums=1
            )
        self.refresh()

    def refresh(self) -> None:
        """To be called when variables have been given other values."""
        if self._runtime.on_jax:
            self._values = [variable.value for variable in self._variables]
        else:
            # without XLA, which TensorFlow would run anew for every value of `start`; a function
            # of TensorFlow's holds on to the values it was traced with
            self._trace = self._runtime.tf.function(self._function)

    def __call__(
        self, ids: Any, caches: Any, start: Any, count: Any, rows: Any, **static: Any
    ) -> Any:
        if self._runtime.on_jax:
            return self._trace(self._values, caches, ids, start, count, rows, **static)
        integer = partial(self._runtime.tf.constant, dtype="int32")
        given = (integer(ids), caches, integer(start), integer(count), integer(rows))
        return self._trace(*given, **static)

    def _stateless(
        self, values: list[Any], caches: Any, ids: Any, start: Any, count: Any, rows: Any,
        **static: Any,
    ) -> Any:  # fmt: skip
        scope = self._runtime.keras.src.backend.common.stateless_scope.StatelessScope
        mapping = list(zip(self._variables, values, strict=True))
        with scope(state_mapping=mapping):
            return self._function(ids, caches, start, count, rows, **static)
