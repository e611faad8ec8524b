"""What differs between Keras on JAX and Keras on TensorFlow: compiling, and moving arrays.

Compiled code for JAX is kept in the user's cache, so only the first run on a machine waits for
XLA. A directory the user has set with `jax_compilation_cache_dir` is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
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

    def as_array(self, array: np.ndarray, dtype: str) -> Any:
        """A framework array that is a copy."""
        if self.on_jax:
            return self.jax.numpy.array(array, dtype)
        return self.tf.cast(self.tf.constant(array), dtype)

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        return self.jax.numpy.zeros(shape, dtype) if self.on_jax else self.tf.zeros(shape, dtype)

    def copy(self, array: Any) -> Any:
        """TensorFlow's tensors never change; JAX's caches are given away to the next step."""
        return self.jax.numpy.copy(array) if self.on_jax else array

    def pad_positions(self, cache: Any, extra: int) -> Any:
        """`[B, S, KV, H]` -> `[B, S + extra, KV, H]`, zeros behind."""
        pads = ((0, 0), (0, extra), (0, 0), (0, 0))
        return self.jax.numpy.pad(cache, pads) if self.on_jax else self.tf.pad(cache, pads)

    def where(self, condition: np.ndarray, these: Any, others: Any) -> Any:
        return (self.jax.numpy if self.on_jax else self.tf).where(condition, these, others)

    def take_row(self, layers: Any, row: int) -> Any:
        """Caches `[B, ...]` -> those of one row, `[1, ...]`."""
        return self._rows[0](layers, np.int32(row))

    def put_row(self, layers: Any, given: Any, row: int) -> Any:
        """Caches `[B, ...]`, which are given away, with `given`, `[1, ...]`, in one row."""
        return self._rows[1](layers, given, np.int32(row))

    @cached_property
    def _rows(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if not self.on_jax:
            return _take_row, _put_row
        return self.jax.jit(_take_row), self.jax.jit(_put_row, donate_argnums=0)

    def compile(
        self, function: Callable[..., Any], variables: list[Any], static: tuple[str, ...] = (),
        donated: tuple[int, ...] = (),
    ) -> Compiled:  # fmt: skip
        """`function(*arrays, **static)`, compiled once per shape. Those of its arrays that are
        `donated`, by their place, are given away."""
        return Compiled(self, function, variables, static, donated)


class Compiled:
    """A function of a model's variables, whose values are read once, not at every call."""

    def __init__(
        self, runtime: KerasRuntime, function: Callable[..., Any], variables: list[Any],
        static: tuple[str, ...], donated: tuple[int, ...],
    ) -> None:  # fmt: skip
        self._runtime, self._function, self._variables = runtime, function, variables
        self._trace: Callable[..., Any]
        if runtime.on_jax:
            self._trace = runtime.jax.jit(
                self._stateless, static_argnames=static,
                donate_argnums=tuple(1 + place for place in donated),
            )  # fmt: skip
        self.refresh()

    def refresh(self) -> None:
        """To be called when variables have been given other values."""
        if self._runtime.on_jax:
            self._values = [variable.value for variable in self._variables]
        else:
            # without XLA, which TensorFlow would run anew for every value of `start`; a function
            # of TensorFlow's holds on to the values it was traced with
            self._trace = self._runtime.tf.function(self._function)

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        if self._runtime.on_jax:
            return self._trace(self._values, *arrays, **static)
        constant = self._runtime.tf.constant
        given = (constant(a) if isinstance(a, np.ndarray) else a for a in arrays)
        return self._trace(*given, **static)

    def _stateless(self, values: list[Any], *arrays: Any, **static: Any) -> Any:
        scope = self._runtime.keras.src.backend.common.stateless_scope.StatelessScope
        mapping = list(zip(self._variables, values, strict=True))
        with scope(state_mapping=mapping):
            return self._function(*arrays, **static)


def _take_row(layers: Any, row: Any) -> Any:
    from keras import ops

    def taken(cache: Any) -> Any:
        return ops.slice(cache, (row, 0, 0, 0), (1, *cache.shape[1:]))

    return [(taken(keys), taken(values)) for keys, values in layers]


def _put_row(layers: Any, given: Any, row: Any) -> Any:
    from keras import ops

    def put(cache: Any, new: Any) -> Any:
        return ops.slice_update(cache, (row, 0, 0, 0), new)

    return [
        (put(keys, new[0]), put(values, new[1]))
        for (keys, values), new in zip(layers, given, strict=True)
    ]
