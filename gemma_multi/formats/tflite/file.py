"""Reading the `.tflite` files that our exporter writes, alone or inside a bundle.

Design choices:
- A file of ours ends with its own SHA-256, checked before anything in it is believed: the
  runtime takes a model's offsets at their word, and a wrong one ends the process. What was
  checked once is remembered by path, size and time, so that a start costs no second reading.
- Such a file is a whole checkpoint: config, tokenizer, generation defaults, provenance, and the
  exact codes and scales, read only when someone asks. So every engine can run it, and what a
  phone loads can be compared with what was trained, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.cache import EXPORTS, writable_cache
from gemma_multi.checkpoint import Checkpoint, Origin, Provenance, Tensor, TensorInfo, Tensors
from gemma_multi.config import ModelConfig
from gemma_multi.errors import BackendError, CheckpointError, ConfigError
from gemma_multi.files import write_atomically
from gemma_multi.formats.tflite.layout import (
    FORMAT_VERSION,
    INT4_SIGN_BITS,
    INT8_SIGN_BIT,
    METADATA,
    NORMS,
    QUERY_KEY_NORM,
    TOKENIZER,
    TRAILER_MARK,
    TRAILER_SIZE,
    fused_tensors,
    gain_name,
)
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor
from gemma_multi.tokenizer import Tokenizer

_READ = 1 << 22
_CHECKED = 64  # files whose check is remembered
_STAMPS = "checked.json"


@dataclass(frozen=True)
class ExportInfo:
    """What an exporter fixed, as the file's metadata states it."""

    precision: str
    context_length: int
    prefill: tuple[int, ...]
    cache: str  # type of the global layers' caches: "float32" or "int8"
    target: str = "cpu"  # "gpu": laid out for LiteRT's GPU delegate
    prefill_precision: str = "same"  # "int8": layers as int8 rows beside int4, to read prompts with
    decode_batch: int = 1  # conversations whose next tokens one call reads, at most


class TfliteFile:
    """One exported model on disk: a `.tflite`, or the part of a bundle that is one."""

    def __init__(
        self, path: Path, section: tuple[int, int] | None = None,
        tokenizer: Callable[[], bytes] | None = None,
    ) -> None:  # fmt: skip
        """`section` is where the model begins and ends, None for the whole file; `tokenizer`
        reads the SentencePiece model where it lies outside.

        Raises CheckpointError for a file that is not ours, cut short or changed.
        """
        self.path = path = path.absolute()
        self.is_whole = section is None  # whether the runtime can map `path` as it is
        self._external_tokenizer = tokenizer
        try:
            self._file = path.open("rb")
            size = path.stat().st_size
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        begin, end = section or (0, size)
        self.begin, self.end = begin, end - TRAILER_SIZE  # of the flatbuffer
        stamp = _stamp(path, self._file, begin, end)
        known = _known_stamps()
        if stamp not in known:
            _check_digest(path, self._file, begin, self.end, self.digest)
        self._read_metadata()
        if stamp not in known:
            self._check_scales()
            _remember([*known[-_CHECKED:], stamp])

    def checkpoint(self, format_name: str) -> Checkpoint:
        """The file as a checkpoint."""
        info = self.info
        facts = {"context_length": info.context_length, "prefill": list(info.prefill),
                 "cache": info.cache, "precision": info.precision}  # fmt: skip
        grid = "portable" if info.precision != "float32" else "none"  # the scales were checked
        origin = Origin(format_name, f"{self.digest} {self.path}", facts, self)
        return Checkpoint(
            config=self.config,
            tensors=Tensors(self._tensor_infos(), self.read, origin, grid),
            provenance=self.provenance,
            generation=self.generation,
            path=self.path,
            make_tokenizer=cache(lambda: Tokenizer(self.tokenizer_model())),
        )

    def _read_metadata(self) -> None:
        data = self.metadata(METADATA)
        if data is None:
            raise CheckpointError(f"{self.path}: has no {METADATA!r} metadata")
        facts = json.loads(data)
        if facts["format"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path}: is of format {facts['format']}, but this version reads "
                f"{FORMAT_VERSION}; export it again"
            )
        try:
            self.config = ModelConfig.from_dict(facts["config"])
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        export = facts["export"]
        known = {field.name: export[field.name] for field in fields(ExportInfo)
                 if field.name in export}  # fmt: skip
        self.info = ExportInfo(**{**known, "prefill": tuple(export["prefill"])})
        self.generation: dict[str, Any] = facts["generation"]
        provenance = facts["provenance"]
        provenance["modifications"] = tuple(provenance["modifications"])
        self.provenance = Provenance(**provenance)
        self._norms: dict[str, str] = facts["norms"]
        self._tokenizer_sha256: str = facts["tokenizer_sha256"]

    @property
    def graph(self) -> memoryview:
        """The flatbuffer."""
        return memoryview(self._map)[self.begin : self.end]

    @property
    def model_bytes(self) -> memoryview:
        """The flatbuffer with its trailer, as a `.tflite` file holds it."""
        return memoryview(self._map)[self.begin : self.end + TRAILER_SIZE]

    @property
    def digest(self) -> str:
        """SHA-256 of the flatbuffer, from the trailer."""
        return bytes(self.model_bytes[-32:]).hex()

    def metadata(self, name: str) -> bytes | None:
        entries = (self._model.Metadata(i) for i in range(self._model.MetadataLength()))
        for entry in entries:
            if entry.Name() == name.encode():
                return self._buffer(entry.Buffer()).tobytes()
        return None

    def tokenizer_model(self) -> bytes:
        """The SentencePiece model, from inside the flatbuffer or from beside it."""
        outside = self._external_tokenizer
        model = self.metadata(TOKENIZER) if outside is None else outside()
        if model is None:
            raise CheckpointError(f"{self.path}: has no tokenizer; export it again")
        if hashlib.sha256(model).hexdigest() != self._tokenizer_sha256:
            raise CheckpointError(
                f"{self.path}: its tokenizer is not the one the model was exported with; export it "
                "again"
            )
        return model

    @cached_property
    def _model(self) -> Any:
        return _schema().Model.GetRootAs(self.graph, 0)

    def _buffer(self, index: int) -> np.ndarray:
        data = self._model.Buffers(index).DataAsNumpy()
        return data if isinstance(data, np.ndarray) else np.zeros(0, np.uint8)

    # tensors

    @cached_property
    def _tensors(self) -> dict[str, tuple[Any, Any]]:
        """Linear tensor -> (its entry, its subgraph), wherever it comes first: all share the
        buffers, but a prefill signature lacks the last layer's."""
        wanted = {name.encode() for name in fused_tensors(self.config)}
        found: dict[str, tuple[Any, Any]] = {}
        for graph in map(self._model.Subgraphs, range(self._model.SubgraphsLength())):
            for entry in map(graph.Tensors, range(graph.TensorsLength())):
                if entry.Name() in wanted:
                    found.setdefault(entry.Name().decode(), (entry, graph))
            if len(found) == len(wanted):
                break
        return found

    def gain(self, name: str) -> np.ndarray:
        """The factors of a norm, 1 + w, from what the graph multiplies by: `f32`."""
        layer, attention, part = name.rpartition(".self_attn.")
        norm = f"{layer}.{QUERY_KEY_NORM}.weight" if attention else name
        if gain_name(norm) not in self._gains:
            raise CheckpointError(
                f"{self.path}: was exported by an older version, which did not name its norms; "
                "export it again"
            )
        rows = self._gains[gain_name(norm)].reshape(-1, self.config.tensor_shapes()[name][0])
        if part == "q_norm.weight":
            return rows[0] / np.float32(self.config.query_scale)
        return rows[-1] / np.float32(self.config.norm_gain(name))

    @cached_property
    def _gains(self) -> dict[str, np.ndarray]:
        graphs = map(self._model.Subgraphs, range(self._model.SubgraphsLength()))
        entries = (graph.Tensors(i) for graph in graphs for i in range(graph.TensorsLength()))
        return {
            entry.Name().decode(): self._buffer(entry.Buffer()).view(np.float32)
            for entry in entries
            if entry.Name().endswith(b".gain")
        }

    def _group_scales(self, fused: str) -> np.ndarray:
        """The scales of an int4 tensor, flat: `f16`."""
        entry, graph = self._tensors[fused]
        details, table = _schema().BlockwiseQuantization(), entry.Quantization().Details()
        details.Init(table.Bytes, table.Pos)
        return self._buffer(graph.Tensors(details.Scales()).Buffer()).view(np.float16)

    def _check_scales(self) -> None:
        """What the runtime would refuse, or take and compute nonsense with."""
        for name, (entry, _) in self._tensors.items():
            if entry.Type() == _schema().TensorType.INT4:
                scales = self._group_scales(name)
                if not (np.all(scales > 0) and np.all(np.isfinite(scales))):
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} has a scale that is not above zero; "
                        "export it again"
                    )

    def _tensor_infos(self) -> dict[str, TensorInfo]:
        """What each tensor is; what it takes in memory is what `read` would make of it."""
        infos, kind = {}, _schema().TensorType
        owner = {part: fused for fused, parts in fused_tensors(self.config).items()
                 for part in parts}  # fmt: skip
        for name, shape in self.config.tensor_shapes().items():
            if name in self._norms:
                dtype = self._norms[name]
                infos[name] = TensorInfo(shape, dtype, shape[0] * _norm_type(dtype).itemsize)
                continue
            stored = self._tensors[owner[name]][0].Type()
            count = shape[0] * shape[1]
            if stored == kind.FLOAT32:
                infos[name] = TensorInfo(shape, "float32", count * 4)
                continue
            bits = 8 if stored == kind.INT8 else 4
            scales = count // GROUP_SIZE * BFLOAT16.itemsize
            infos[name] = TensorInfo(shape, f"int{bits}", count * bits // 8 + 2 * scales)
        return infos

    def read(self, name: str, rows: slice | np.ndarray | None = None) -> Tensor:
        """A tensor by its Hugging Face name, as the checkpoint held it, or some of its rows."""
        if name in self._norms:
            return self._read_norm(name)
        holders = (item for item in fused_tensors(self.config).items() if name in item[1])
        fused, parts = next(holders, ("", ()))
        if not parts:
            raise KeyError(name)
        shapes = self.config.tensor_shapes()
        first = sum(shapes[part][0] for part in parts[: parts.index(name)])
        (entry, _), width = self._tensors[fused], shapes[name][1]
        data = self._buffer(entry.Buffer())
        kind = _schema().TensorType

        def own(stored: np.ndarray) -> np.ndarray:
            """The wanted rows of what the file holds for all parts together."""
            mine = stored[first : first + shapes[name][0]]
            return mine if rows is None else mine[rows]

        if entry.Type() == kind.FLOAT32:
            return own(data.view(np.float32).reshape(-1, width))
        if entry.Type() == kind.INT8:
            packed = (own(data.reshape(-1, width)) ^ np.uint8(INT8_SIGN_BIT)).view("<u4")
            scales = own(entry.Quantization().ScaleAsNumpy())
            return _quantized(packed, np.repeat(scales[:, None], width // GROUP_SIZE, 1), 8)
        packed = (own(data.reshape(-1, width // 2)) ^ np.uint8(INT4_SIGN_BITS)).view("<u4")
        scales = own(self._group_scales(fused).reshape(-1, width // GROUP_SIZE))
        return _quantized(packed, scales, 4)

    def _read_norm(self, name: str) -> np.ndarray:
        data = np.frombuffer(self.metadata(NORMS) or b"", np.uint8)
        begin = 0
        for other, kind in self._norms.items():
            dtype = _norm_type(kind)
            size = self.config.tensor_shapes()[other][0] * dtype.itemsize
            if other == name:
                return data[begin : begin + size].view(dtype)
            begin += size
        raise KeyError(name)


def _norm_type(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def metadata_json(
    config: ModelConfig, info: ExportInfo, generation: Mapping[str, Any], provenance: Provenance,
    norms: Mapping[str, str], tokenizer_model: bytes,
) -> bytes:  # fmt: skip
    """What `TfliteFile` reads back."""
    facts = {
        "format": FORMAT_VERSION,
        "config": config.to_dict(),
        "export": asdict(info),
        "generation": dict(generation),
        "provenance": asdict(provenance),
        "norms": dict(norms),
        "tokenizer_sha256": hashlib.sha256(tokenizer_model).hexdigest(),
    }
    return json.dumps(facts, indent=1).encode()


def _quantized(packed: np.ndarray, scales: np.ndarray, bits: int) -> QuantizedTensor:
    held = scales.astype(np.float32)
    narrow = held.astype(BFLOAT16)
    if np.array_equal(narrow.astype(np.float32), held):  # our own grid, as it was stored
        held = narrow
    biases = (held.astype(np.float32) * -(1 << (bits - 1))).astype(held.dtype)
    return QuantizedTensor(packed, held, biases, bits)


def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        raise BackendError(
            "reading a LiteRT file needs ai-edge-litert: pip install 'gemma-multi[litert]'"
        ) from None
    return schema_py_generated


def _stamp(path: Path, file: Any, begin: int, end: int) -> str:
    """What tells this file from others without reading it all. Refuses one without our trailer."""
    trailer = b""
    if end - begin > TRAILER_SIZE:
        file.seek(end - TRAILER_SIZE)
        trailer = file.read(TRAILER_SIZE)
    if not trailer.startswith(TRAILER_MARK):
        raise CheckpointError(
            f"{path}: was not written by gemma_multi, or was cut short; write one with "
            "gemma-multi export"
        )
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {trailer.hex()}"


def _check_digest(path: Path, file: Any, begin: int, end: int, digest: str) -> None:
    file.seek(begin)
    sha, left = hashlib.sha256(), end - begin
    while left and (part := file.read(min(_READ, left))):
        sha.update(part)
        left -= len(part)
    if sha.hexdigest() != digest:
        raise CheckpointError(f"{path}: was damaged after it was written; export it again")


def _known_stamps() -> list[str]:
    note = writable_cache(EXPORTS)
    if note is None:
        return []
    try:
        return [str(stamp) for stamp in json.loads((note / _STAMPS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _remember(stamps: list[str]) -> None:
    note = writable_cache(EXPORTS)
    if note is not None:
        with contextlib.suppress(OSError):  # without it, the next start only takes longer
            write_atomically(note / _STAMPS, json.dumps(stamps).encode())
