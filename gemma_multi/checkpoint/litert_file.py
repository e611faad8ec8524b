"""Reading the `.tflite` and `.litertlm` files that our exporters write.

Design choices:
- A file of ours ends with its own SHA-256, checked before anything in it is believed: the
  runtime takes a model's offsets at their word, and a wrong one ends the process. What was
  checked once is remembered by path, size and time, so that a start costs no second reading.
- Such a file is a whole checkpoint: config, tokenizer, generation defaults, provenance, and the
  exact codes and scales, read only when someone asks. So every engine can run it, and what a
  phone loads can be compared with what was trained, bit for bit.
- A `.litertlm` is a row of sections; the model's is a `.tflite` with its trailer, and is read in
  place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.checkpoint.litert_format import (
    BUNDLE_HEADER,
    BUNDLE_HEADER_END,
    BUNDLE_MARK,
    FORMAT,
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
from gemma_multi.checkpoint.provenance import Provenance
from gemma_multi.config import ModelConfig
from gemma_multi.errors import BackendError, CheckpointError, ConfigError
from gemma_multi.files import writable_cache, write_atomically
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor

if TYPE_CHECKING:
    from gemma_multi.checkpoint.checkpoint import Tensor

SUFFIXES = (".tflite", ".litertlm")
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


class LitertFile:
    """One exported model on disk."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is not ours, cut short or changed."""
        self.path = path = path.absolute()
        try:
            self._file = path.open("rb")
            size = path.stat().st_size
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self._sections: dict[str, tuple[int, int]] = {}
        begin, end = 0, size
        if path.suffix == ".litertlm":
            self._sections = _sections(path, size)
            begin, end = self._sections["model"]
        self.begin, self.end = begin, end - TRAILER_SIZE  # of the flatbuffer
        stamp = _stamp(path, self._file, begin, end)
        known = _known_stamps()
        if stamp not in known:
            _check_digest(path, self._file, begin, self.end, self.digest)
        self._read_metadata()
        if stamp not in known:
            self._check_scales()
            _remember([*known[-_CHECKED:], stamp])

    def _read_metadata(self) -> None:
        data = self.metadata(METADATA)
        if data is None:
            raise CheckpointError(f"{self.path}: has no {METADATA!r} metadata")
        facts = json.loads(data)
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{self.path}: is of format {facts['format']}, but this version reads {FORMAT}; "
                "export it again"
            )
        try:
            self.config = ModelConfig.from_dict(facts["config"])
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        export = facts["export"]
        self.info = ExportInfo(**{**export, "prefill": tuple(export["prefill"])})
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
        """The SentencePiece model, from its own section or from inside the flatbuffer."""
        if self.path.suffix == ".litertlm":
            begin, end = self._sections["tokenizer"]
            model: bytes | None = self._map[begin:end]
        else:
            model = self.metadata(TOKENIZER)
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
        """The factors of a norm, 1 + w, as the graph multiplies by them: `f32`."""
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
        return rows[-1]

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

    def read(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, as the checkpoint held it."""
        if name in self._norms:
            return self._read_norm(name)
        holders = (item for item in fused_tensors(self.config).items() if name in item[1])
        fused, parts = next(holders, ("", ()))
        if not parts:
            raise KeyError(name)
        shapes = self.config.tensor_shapes()
        first = sum(shapes[part][0] for part in parts[: parts.index(name)])
        rows = slice(first, first + shapes[name][0])
        (entry, _), width = self._tensors[fused], shapes[name][1]
        data = self._buffer(entry.Buffer())
        kind = _schema().TensorType
        if entry.Type() == kind.FLOAT32:
            return data.view(np.float32).reshape(-1, width)[rows]
        if entry.Type() == kind.INT8:
            packed = (data.reshape(-1, width)[rows] ^ np.uint8(INT8_SIGN_BIT)).view("<u4")
            scales = entry.Quantization().ScaleAsNumpy()[rows]
            return _quantized(packed, np.repeat(scales[:, None], width // GROUP_SIZE, 1), 8)
        packed = (data.reshape(-1, width // 2)[rows] ^ np.uint8(INT4_SIGN_BITS)).view("<u4")
        scales = self._group_scales(fused).reshape(-1, width // GROUP_SIZE)[rows]
        return _quantized(packed, scales, 4)

    def _read_norm(self, name: str) -> np.ndarray:
        data = np.frombuffer(self.metadata(NORMS) or b"", np.uint8)
        begin = 0
        for other, kind in self._norms.items():
            dtype = BFLOAT16 if kind == "bfloat16" else np.dtype(kind)
            size = self.config.tensor_shapes()[other][0] * dtype.itemsize
            if other == name:
                return data[begin : begin + size].view(dtype)
            begin += size
        raise KeyError(name)


class LitertTensors(Mapping[str, "Tensor"]):
    """A file's tensors by Hugging Face name, each read when asked for."""

    def __init__(self, file: LitertFile) -> None:
        self.file = file
        self._names = file.config.tensor_shapes()

    def __getitem__(self, name: str) -> Tensor:
        return self.file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def metadata_json(
    config: ModelConfig, info: ExportInfo, generation: Mapping[str, Any], provenance: Provenance,
    norms: Mapping[str, str], tokenizer_model: bytes,
) -> bytes:  # fmt: skip
    """What `LitertFile` reads back."""
    facts = {
        "format": FORMAT,
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


def _header_schema() -> Any:
    """The schema of a bundle's header, without the rest of its package, which takes 50 ms."""
    package = importlib.util.find_spec("litert_lm_builder")
    if package is None or not package.submodule_search_locations:
        raise BackendError(
            "reading a .litertlm needs litert-lm-builder: pip install 'gemma-multi[litert]'"
        )
    name = "litertlm_header_schema_py_generated"
    file = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sections(path: Path, size: int) -> dict[str, tuple[int, int]]:
    """Where a bundle's model and tokenizer begin and end."""
    header = _header_schema()
    kind = header.AnySectionDataType
    names = {kind.TFLiteModel: "model", kind.SP_Tokenizer: "tokenizer"}
    found: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file:
            start = file.read(BUNDLE_HEADER)
            if not start.startswith(BUNDLE_MARK):
                raise CheckpointError(f"{path}: is not a .litertlm file: it does not begin as one")
            end = int.from_bytes(start[BUNDLE_HEADER_END:], "little")
            if not len(start) < end <= min(size, 1 << 24):
                raise CheckpointError(f"{path}: its header ends at {end}, outside the file")
            metadata = header.LiteRTLMMetaData.GetRootAs(file.read(end - len(start)), 0)
        sections = metadata.SectionMetadata()
        for i in range(min(sections.ObjectsLength(), 1000)):
            entry = sections.Objects(i)
            if entry.DataType() in names:
                found[names[entry.DataType()]] = (entry.BeginOffset(), entry.EndOffset())
    except CheckpointError:
        raise
    except Exception as error:  # flatbuffers raise whatever their bytes lead to
        raise CheckpointError(f"{path}: its header is damaged: {error}") from error
    for name in names.values():
        if name not in found:
            raise CheckpointError(f"{path}: has no {name} section; export it again")
        first, last = found[name]
        if not 0 <= first < last <= size:
            raise CheckpointError(
                f"{path}: its {name} section runs from {first} to {last}, outside the {size} bytes "
                "of the file"
            )
    return found


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
    note = writable_cache("litert")
    if note is None:
        return []
    try:
        return [str(stamp) for stamp in json.loads((note / _STAMPS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _remember(stamps: list[str]) -> None:
    note = writable_cache("litert")
    if note is not None:
        with contextlib.suppress(OSError):  # without it, the next start only takes longer
            write_atomically(note / _STAMPS, json.dumps(stamps).encode())
