"""`.sbs`: the single file that gemma.cpp loads.

Design choices:
- SFP8 codes go in as they are, and so does bfloat16; what is neither is rounded to bfloat16, or all
  matrices to SFP8 where that is asked for. Norms stay in bfloat16 or float32.
- Matrices lie as gemma.cpp multiplies them (queries apart from keys and values, gate from up), so
  that it has nothing to rearrange and each has a scale of its own. Keys and values share one matrix
  and its scale: where theirs differ, both are encoded at the larger.
- gemma.cpp computes what its code says, whatever else a config says: other rope bases, eps, query
  or embedding scales are refused. (A residual scale changes no result.)
- What its config has no field for, the licence and the modifications are in blobs of ours, so that
  a file opens as the checkpoint it was.
- Tensors are made some rows at a time, as they are written.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Provenance, dense, rows_of
from gemma_multi.config import EMBEDDING, SLIDING, ModelConfig
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.files import renamed_when_whole
from gemma_multi.formats.sbs import layout
from gemma_multi.formats.sbs.fields import MOST_TEXT_WORDS, Words
from gemma_multi.formats.sbs.file import ALIGNMENT, END_ALIGNMENT, HEADER, KEY_BYTES, MAGIC
from gemma_multi.formats.sbs.tensors import DTYPES, join_heads, locations, write_entry
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.quantization import sfp8
from gemma_multi.quantization.tensor import SFP8, Sfp8Tensor
from gemma_multi.sentencepiece_model import with_spoken_steering_pieces

_CHUNK_ROWS = 1 << 12
_KINDS = {SFP8: "SFP", "bfloat16": "BF16"}
_KEYS, _VALUES = ".k_proj.", ".v_proj."


@dataclass(frozen=True)
class SbsOptions:
    precision: str = option(
        "auto", "sfp8, bfloat16, or auto: as stored, and in bfloat16 what is neither."
    )
    wrapping: str = option(
        "it", "it: prompts are put in turns; pt: left as they are (base models)."
    )


def _write(
    checkpoint: Checkpoint, output: Path, options: SbsOptions, progress: Report
) -> ExportReport:
    _check_options(options)
    config = checkpoint.config
    _check_config(config)
    ends = _ends(checkpoint)
    kinds = _kinds(checkpoint, options.precision)
    matrices = {kinds[name] for name, shape in config.tensor_shapes().items() if len(shape) == 2}
    smallest = "SFP" if "SFP" in matrices else "BF16"
    provenance = checkpoint.provenance.modified(
        f"exported for gemma.cpp in {', '.join(sorted(matrices))}"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(output) as target, target.open("wb") as file:
        blobs, table = _Blobs(file), list[int]()
        done, total = 0, config.num_parameters
        for stored in _stored(checkpoint, kinds):
            blobs.begin(stored.name)
            for part in stored.parts:
                blobs.append(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                done += part.size
                progress(done, total)
            table += write_entry(stored.name, stored.kind, stored.shape, stored.scale)
        name = _plain(provenance.source.rsplit("/", 1)[-1])
        about = layout.write_config(config, name, smallest, options.wrapping, ends)
        for key, data in (
            (layout.CONFIG, _bytes(about)),
            (layout.TOKENIZER, with_spoken_steering_pieces(checkpoint.tokenizer.model)),
            (layout.TABLE, _bytes(table)),
            (layout.OWN, _own(checkpoint, provenance)),
            (layout.NOTICE, provenance.notice().encode()),
        ):
            blobs.begin(key)
            blobs.append(data)
        blobs.finish()
        file.flush()
        os.fsync(file.fileno())
    linear = {kinds[name] for name, shape in config.tensor_shapes().items()
              if len(shape) == 2 and name != EMBEDDING}  # fmt: skip
    held = next(name for name, kind in _KINDS.items() if kind in linear)
    return ExportReport(
        output, output.stat().st_size, EXPORTER.format, held if len(linear) == 1 else "mixed",
        config.max_position_embeddings,
    )  # fmt: skip


# what can be written


def _check_options(options: SbsOptions) -> None:
    for name, value, known in (
        ("precision", options.precision, ("auto", *_KINDS)),
        ("wrapping", options.wrapping, tuple(layout.WRAPPINGS)),
    ):
        if value not in known:
            raise OptionError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _check_config(config: ModelConfig) -> None:
    """Refuses what gemma.cpp would compute otherwise, and the file could not tell it."""
    scalars = layout.query_scalars(config.head_dim, config.hidden_size, config.num_attention_heads)
    bases = (layout.ROPE_BASE, layout.LOCAL_ROPE_BASE)
    for name, value, computed in (
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, scalars),
        ("rms_norm_eps", config.rms_norm_eps, (layout.EPS,)),
        ("rope_theta", config.rope_theta, bases),
        ("rope_local_base_freq", config.rope_local_theta, (layout.LOCAL_ROPE_BASE,)),
        ("rope_scaling factor", config.rope_scaling_factor, (1.0,)),
        ("bos_token_id", config.bos_token_id, (layout.BOS,)),
    ):
        if value not in computed:
            expected = " or ".join(f"{one:g}" for one in dict.fromkeys(computed))
            raise CheckpointError(
                f"{name} is {value!r}, but gemma.cpp computes with {expected}, and an .sbs file "
                "cannot say otherwise; use another format"
            )
    if not config.is_scaled_by_root:
        raise CheckpointError(
            f"embedding_scale is {config.embedding_scale!r}, but gemma.cpp multiplies by "
            f"{config.hidden_size**0.5:.6g} in bfloat16, and an .sbs file cannot say otherwise; "
            "use another format"
        )
    for name, size, most in (
        ("head_dim", config.head_dim, layout.WIDEST_HEAD),
        ("num_hidden_layers", config.num_hidden_layers, layout.MOST_LAYERS),
    ):
        if size > most:
            raise CheckpointError(f"{name} is {size}, but gemma.cpp has room for {most}")
    if SLIDING in config.layer_types and config.sliding_window == config.max_position_embeddings:
        raise CheckpointError(
            f"sliding_window is {config.sliding_window}, all positions there are, by which "
            "gemma.cpp tells a global layer; use another format"
        )


def _ends(checkpoint: Checkpoint) -> tuple[int, int]:
    """The tokens that end an answer."""
    first, *others = sorted(checkpoint.stop_ids)
    if len(others) > 1:
        raise CheckpointError(
            f"answers end at the tokens {[first, *others]}, but an .sbs file names two; take the "
            "others out of eos_token_id, or use another format"
        )
    return first, others[0] if others else first


def _kinds(checkpoint: Checkpoint, precision: str) -> dict[str, str]:
    """What each tensor is stored as."""
    kinds = {}
    for name, info in checkpoint.tensors.infos.items():
        if len(info.shape) == 1:
            kinds[name] = "BF16" if info.dtype == "bfloat16" else "F32"
        else:
            wanted = info.dtype if precision == "auto" else precision
            kinds[name] = _KINDS.get(wanted, "BF16")
    for name in kinds:
        if _KEYS in name and kinds[name] != kinds[name.replace(_KEYS, _VALUES)]:
            kinds[name] = kinds[name.replace(_KEYS, _VALUES)] = "BF16"  # they share a matrix
    return kinds


# tensors


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file, its numbers in parts."""

    name: str
    kind: str
    shape: tuple[int, int]
    scale: float
    parts: Iterable[np.ndarray]


def _stored(checkpoint: Checkpoint, kinds: dict[str, str]) -> Iterator[_Stored]:
    config = checkpoint.config
    for name in config.tensor_shapes():
        if _VALUES in name:
            continue
        names = [name, name.replace(_KEYS, _VALUES)] if _KEYS in name else [name]
        location, kind = locations(config, name)[0], kinds[name]
        scale = max(_scale(checkpoint, one) for one in names) if kind == "SFP" else 1.0
        parts: Iterable[np.ndarray] = _parts(checkpoint, name, kind, scale)
        if len(names) == 2:
            keys, values = (
                np.concatenate(list(_parts(checkpoint, one, kind, scale))) for one in names
            )
            parts = [join_heads(keys, values, config)]
        yield _Stored(location.name, kind, location.shape, scale, parts)


def _scale(checkpoint: Checkpoint, name: str) -> float:
    """At which a matrix is in SFP8, or would be."""
    tensor = checkpoint.tensors[name]
    if isinstance(tensor, Sfp8Tensor):
        return tensor.scale
    return max(float(sfp8.fit_scales(np, rows)) for rows in _rows(checkpoint, name))


def _parts(checkpoint: Checkpoint, name: str, kind: str, scale: float) -> Iterator[np.ndarray]:
    """A tensor as the file holds it, some rows at a time."""
    tensor = checkpoint.tensors[name]
    if kind == "SFP" and isinstance(tensor, Sfp8Tensor) and tensor.scale == scale:
        yield tensor.codes
        return
    for rows in _rows(checkpoint, name):
        if kind == "SFP":
            yield sfp8.quantize(np, rows.astype(np.float32, copy=False), np.float32(scale))
        else:
            yield rows.astype(DTYPES[kind], copy=False)


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    tensor = checkpoint.tensors[name]  # once: some readers make it when it is asked for
    for start in range(0, tensor.shape[0], _CHUNK_ROWS):
        yield dense(rows_of(tensor, slice(start, start + _CHUNK_ROWS)))


# the container


class _Blobs:
    """Writes blobs one behind the other, then the directory of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._keys: list[bytes] = []
        self._spans: list[tuple[int, int]] = []
        file.write(HEADER.pack(MAGIC, 0, END_ALIGNMENT))  # the real one stands at the end

    def begin(self, key: str) -> None:
        self._pad()
        self._keys.append(key.encode().ljust(KEY_BYTES, b"\0"))
        self._spans.append((self._file.tell(), 0))

    def append(self, data: bytes | memoryview) -> None:
        """More of the blob that was begun last."""
        self._file.write(data)
        begin, size = self._spans[-1]
        self._spans[-1] = begin, size + len(data)

    def finish(self) -> None:
        self._pad()
        directory = b"".join([*self._keys, *(struct.pack("<QQ", *span) for span in self._spans)])
        rest = len(directory) + HEADER.size
        at = self._file.tell()
        size = at + rest + -(at + rest) % END_ALIGNMENT
        self._file.write(bytes(size - at - rest))
        self._file.write(directory + HEADER.pack(MAGIC, len(self._keys), size))

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


def _bytes(words: Words) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


def _plain(name: str) -> str:
    """As gemma.cpp takes texts: ASCII, and not much of it."""
    return "".join(c for c in name if " " <= c <= "~")[: 4 * MOST_TEXT_WORDS] or "Gemma 3"


def _own(checkpoint: Checkpoint, provenance: Provenance) -> bytes:
    """What gemma.cpp has no field for, as JSON."""
    described = {**checkpoint.config.to_dict(), "residual_scale": checkpoint.config.residual_scale}
    return json.dumps({
        layout.OWN_CONFIG: {name: described[name] for name in layout.OWN_FIELDS},
        layout.GENERATION: dict(checkpoint.generation),
        layout.PROVENANCE: asdict(provenance),
    }).encode()  # fmt: skip


EXPORTER = Exporter(format="sbs", options=SbsOptions, write=_write)
