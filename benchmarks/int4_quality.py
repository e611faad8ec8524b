"""What int4 costs the real Gemma 3 270M: ways to round it, on text that none of them saw.

    python benchmarks/int4_quality.py [--documents 20] [--only WORDS] [--json results/...]

The texts are every 25th document of the Brown corpus, the first 1,024 tokens of each, and the
first 64 tokens of the prompts that parity asks (23 languages, code, numbers). Weights of our own
and of mlx-lm are run by the same code in float32 (`gemma_multi.decoder`, which the
tests hold against Keras), so that what differs is the rounding; "int8 inputs" are inputs rounded
as phones do. llama.cpp's files are run by llama.cpp (`llama_cpp_quality`). A ratio is to the
unquantised model in the same engine. Ways that `--only` leaves out keep their line in the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import llama_cpp_quality
import numpy as np
from other_peoples_files import brown_documents, gemma_270m, gemma_tokenizer
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import gemma_multi
from gemma_multi.calibration.measure import Said, measure
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.prompts import shipped_prompts
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.exporters import save as save_checkpoint
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.training.calibrated import calibrated as kept_calibration
from gemma_multi.training.recovery import Recoverer
from gemma_multi.transforms import Closeness, original, quantize_checkpoint

EVERY, TOKENS = 25, 1024
_PROMPT_TOKENS = 64
_CALIBRATION_DOCUMENTS = 24
_RECOVERY_DOCUMENTS, _RECOVERY_EPOCHS = 96, 2  # as many tokens as on its own text
_MANY_TEXTS = 384  # of its own, instead of 128: an hour
_MLX_GROUPS = (64, 32)
_GPTQ_TOKENS = 480  # of a text
_LLAMA_CPP = "llama.cpp: "


@dataclass(frozen=True)
class Row:
    """A way to round, and what it cost."""

    name: str
    mb: float  # of weights in the file that ships
    seconds: float | None  # that it took, on top of the calibration for what is recovered
    ratio: float  # of perplexities, on Brown
    divergence: float
    agreement: float
    prompts: float | None = None  # divergence on these
    int8_divergence: float | None = None  # inputs in int8, to the same weights in float32; Brown
    int8_agreement: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20, help="of 20 to measure on")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--kept", action="store_true",
                        help="take what specialists begin with, from the cache")  # fmt: skip
    options = parser.parse_args()

    keep([], options)  # or it is refused before anything is measured
    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    documents = brown_documents()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        chosen = [
            (name, make)
            for name, make in ways(base, documents, Path(work), options.kept)
            if options.only in name
        ]
        if chosen:
            with threadpool_limits(1):
                judge = Judge(base, documents[::EVERY][: options.documents], pool)
        for name, make in chosen:
            Console(stderr=True).print(name)
            checkpoint, seconds = make()
            with threadpool_limits(1):
                rows.append(judge.row(name, checkpoint, seconds))
            keep(rows, options)
        kinds = [name for name in llama_cpp_quality.KINDS if options.only in _LLAMA_CPP + name]
        if kinds:
            rows += in_llama_cpp(kinds, base, documents, options.documents, Path(work))
    show(keep(rows, options))


class Judge:
    """The unquantised model and the texts, on which others are compared to it."""

    def __init__(self, base: Checkpoint, brown: list[str], pool: ThreadPoolExecutor) -> None:
        decoder, self.pool = Decoder(base.config, Weights(base)), pool
        self.brown = [_ids(base, text)[:TOKENS] for text in brown]
        prompts = [_prompt_ids(base, prompt) for prompt in shipped_prompts()]
        self.prompts = [ids for ids in prompts if len(ids) > 8]
        self.reference = [Said.by(decoder, texts, pool) for texts in (self.brown, self.prompts)]

    def row(self, name: str, checkpoint: Checkpoint, seconds: float) -> Row:
        model = Decoder(checkpoint.config, Weights(checkpoint))
        (own, brown), (_, prompts) = (
            self._closeness(said, model, texts)
            for said, texts in zip(self.reference, (self.brown, self.prompts), strict=True)
        )
        int8: dict[str, float] = {}
        if "mlx-lm" not in name:
            rounded = Decoder(checkpoint.config, model.weights, int8_activations=True)
            few = self.brown[:4]
            _, close = self._closeness(Said.by(model, few, self.pool), rounded, few)
            int8 = {"int8_divergence": close.divergence, "int8_agreement": close.agreement}
        return Row(
            name, megabytes(checkpoint), seconds, brown.perplexity / own, brown.divergence,
            brown.agreement, prompts.divergence, **int8,
        )  # fmt: skip

    def _closeness(
        self, reference: Said, model: Decoder, texts: list[np.ndarray]
    ) -> tuple[float, Closeness]:
        said = [Said.by(model, texts, self.pool)]
        perplexity, (closeness,) = measure(reference, said, texts, self.pool)
        return perplexity, closeness


def megabytes(checkpoint: Checkpoint) -> float:
    """As a phone's file holds them: only MLX's have biases, which on our grid follow from the
    scales, and scales of an int8 embedding again and again, which has one to a row."""
    size = checkpoint.nbytes
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor, QuantizedTensor) and tensor.grid == "portable":
            size -= tensor.biases.nbytes
            if tensor.bits == 8:
                size -= tensor.scales.nbytes - 4 * len(tensor.scales)
    return size / 1e6


def ways(
    base: Checkpoint, documents: list[str], work: Path, kept: bool
) -> Iterator[tuple[str, Callable[[], tuple[Checkpoint, float]]]]:
    """(name, a function that rounds and says how long it took). Documents that are measured
    calibrate nothing. `kept`: int4 calibrated on itself is not made anew."""
    rows, more = (
        [{"text": text} for text in _other_texts(base, documents, count)]
        for count in (_CALIBRATION_DOCUMENTS, _RECOVERY_DOCUMENTS)
    )

    @cache
    def calibrated(bits: int, on_rows: bool) -> tuple[Checkpoint, float]:
        target, source = work / f"calibrated-{bits}-{on_rows}", rows if on_rows else "self"

        def make() -> Checkpoint:
            if kept and (bits, on_rows) == (4, False):
                return kept_calibration(base, progress=True)
            gemma_multi.quantize(base, target, embedding_bits=bits, calibrate=source)
            return gemma_multi.open_checkpoint(target)

        return _timed(make)

    def recovered(bits: int, on_rows: bool, texts: int | None = None) -> tuple[Checkpoint, float]:
        """As `quantize(base, recover=..., texts=...)`, which calibrates first."""
        start, _ = calibrated(bits, on_rows)
        run = work / f"recovery-{bits}-{on_rows}-{texts}"
        options: dict[str, Any] = {"epochs": _RECOVERY_EPOCHS} if on_rows else {"texts": texts}
        recoverer = Recoverer.checked(base, more if on_rows else "self", run, **options)
        return _timed(lambda: recoverer.recover(start)[0])

    for bits in (4, 8):
        end = f"embedding int{bits}"
        yield f"nearest, {end}", partial(_timed, _nearest, base, bits)
        yield f"calibrated on itself, {end}", partial(calibrated, bits, False)
        yield f"and recovered on itself, {end}", partial(recovered, bits, False)
        if bits == 4:
            name = f"and recovered on itself for an hour, {end}"
            yield name, partial(recovered, bits, False, _MANY_TEXTS)
        yield f"calibrated on other Brown texts, {end}", partial(calibrated, bits, True)
        yield f"and recovered on other Brown texts, {end}", partial(recovered, bits, True)
    for group in _MLX_GROUPS:
        name = f"mlx-lm: 4 bits, groups of {group}"
        yield name, partial(_timed, _as_mlx_lm, base, work, group)
    name = "mlx-lm: GPTQ on other Brown texts, 4 bits, embedding 8"
    yield name, partial(_timed, _gptq_of_mlx_lm, base, work, rows)


def in_llama_cpp(
    kinds: list[str], base: Checkpoint, documents: list[str], count: int, work: Path
) -> Iterator[Row]:
    # a window is a document, so that what comes before a word is the same as for the others
    texts = [base.tokenizer.decode(_ids(base, d)[1:TOKENS]) for d in documents[::EVERY][:count]]
    others = _other_texts(base, documents, _CALIBRATION_DOCUMENTS)
    found = llama_cpp_quality.qualities(kinds, gemma_270m(), texts, others, work)
    for name, size, said in found:
        Console(stderr=True).print(_LLAMA_CPP + name)
        yield Row(
            _LLAMA_CPP + name, size / 1e6, None,
            said["perplexity"] / said["unquantised"], said["divergence"], said["agreement"],
        )  # fmt: skip


def _other_texts(base: Checkpoint, documents: list[str], count: int) -> list[str]:
    """About `count` documents that are not measured, their first 512 tokens each."""
    others = [text for i, text in enumerate(documents) if i % EVERY]
    step = len(others) // count
    return [base.tokenizer.decode(_ids(base, text)[1:512]) for text in others[::step]]


def _timed(make: Callable[..., Checkpoint], *given: Any) -> tuple[Checkpoint, float]:
    begin = time.perf_counter()
    return make(*given), time.perf_counter() - begin


def _nearest(base: Checkpoint, embedding_bits: int) -> Checkpoint:
    return quantize_checkpoint(base, 4, embedding_bits)[0]


def _as_mlx_lm(base: Checkpoint, work: Path, group: int) -> Checkpoint:
    from mlx_lm import convert

    target = work / f"mlx-{group}"
    dense = str(_dense(base, work))
    convert(dense, str(target), quantize=True, q_group_size=group, q_bits=4)
    return gemma_multi.open_checkpoint(target)


def _gptq_of_mlx_lm(base: Checkpoint, work: Path, texts: list[dict[str, str]]) -> Checkpoint:
    """By its own settings, but for the embedding in 8 bits instead of 6, which only MLX reads."""
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load, save

    dense, target = str(_dense(base, work)), work / "mlx-gptq"
    model, tokenizer, config = load(dense, return_config=True)
    rows = [ids for text in texts if len(ids := _ids(base, text["text"])) >= _GPTQ_TOKENS]
    data = mx.array(np.stack([ids[:_GPTQ_TOKENS] for ids in rows]))
    model, config["quantization"] = gptq_quantize(model, data, 4, 64, 8, 64)
    save(target, dense, model, tokenizer, config)
    return gemma_multi.open_checkpoint(target)


def _dense(base: Checkpoint, work: Path) -> Path:
    """What mlx-lm reads, with the tokenizer that it wants."""
    dense = work / "dense"
    if not dense.exists():
        save_checkpoint(base, dense)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (dense / name).write_bytes((gemma_tokenizer() / name).read_bytes())
    return dense


def _ids(base: Checkpoint, text: str) -> np.ndarray:
    return np.array([base.tokenizer.bos_id, *base.tokenizer.encode(text)], np.int32)


def _prompt_ids(base: Checkpoint, prompt: Any) -> np.ndarray:
    content = prompt.content
    text = content if isinstance(content, str) else "\n".join(m["content"] for m in content)
    return _ids(base, text)[:_PROMPT_TOKENS]


def keep(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Writes them to the file, if there is one, beside the lines that it has of other ways."""
    if not options.json:
        return rows
    file: Path = options.json
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("documents", options.documents) != options.documents:
        raise SystemExit(
            f"{file} is of {before['documents']} documents, and this run of {options.documents}; "
            "give it another file, or as many"
        )
    lines = {row["name"]: row for row in before.get("rows", [])}
    lines |= {row.name: asdict(row) for row in rows}
    data = {"documents": options.documents, "rows": list(lines.values())}
    file.write_text(json.dumps(data, indent=1) + "\n")
    return [Row(**line) for line in lines.values()]


def show(rows: list[Row]) -> None:
    table = Table(title="Gemma 3 270M against itself unquantised")
    headings = ("", "MB", "s", "ratio", "KL", "top-1", "KL, prompts", "int8 inputs: KL", "top-1")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in sorted(rows, key=lambda row: row.ratio):
        table.add_row(
            row.name, f"{row.mb:.0f}", shown(row.seconds, ".0f"), f"{row.ratio:.3f}",
            f"{row.divergence:.4f}", f"{row.agreement:.1%}", shown(row.prompts, ".4f"),
            shown(row.int8_divergence, ".4f"), shown(row.int8_agreement, ".1%"),
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
