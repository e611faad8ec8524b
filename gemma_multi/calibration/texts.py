"""What a model is calibrated on: the caller's rows, what the model writes itself, or both.

Rows are what a specialist will see, so up to six thousand tokens are theirs; but rounding that was
fitted to them alone would give up the rest, other languages first, so four thousand more are the
model's own. Every ninth text (a row, or a part of a long one) is held out, of the model's texts
too, to say what was won.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_multi.calibration.writing import write_texts
from gemma_multi.config import ModelConfig
from gemma_multi.decoder import Decoder
from gemma_multi.errors import DataError, OptionError
from gemma_multi.progress import Report
from gemma_multi.rows import Data, data_name, encode_row, read_rows
from gemma_multi.tokenizer import Tokenizer

SELF = "self"
WRITTEN = 36  # texts, where there are no rows
WRITTEN_BESIDE_ROWS = 18
LENGTH = 256  # tokens of a text that the model writes
_LONGEST = 512  # tokens of a row's text; longer ones are taken in parts
_MOST = 6144  # tokens of rows; a share of every row's if there are more
_FEWEST = 512
_HELD_OUT = 9  # one text in so many


@dataclass(frozen=True)
class Texts:
    """Token ids, `i32[T]` each, beginning with `<bos>`."""

    fitted: list[np.ndarray]
    held_out: list[np.ndarray]
    source: str  # for people

    @property
    def tokens(self) -> int:
        return sum(map(len, self.fitted))


def is_self(text: str | Data) -> bool:
    """Whether the model is to write the text."""
    return isinstance(text, str) and text == SELF


def check_source(option: str, text: str | Data) -> None:
    """Raises OptionError for what is no source of text."""
    if isinstance(text, str) and not is_self(text) and "." not in text:
        raise OptionError(f"{option} is {text!r}, expected 'self', rows, a file of rows, or None")


def collect(
    calibrate: str | Data, decoder: Decoder, tokenizer: Tokenizer, pool: Executor, progress: Report
) -> Texts:
    """Reads rows, and has the model write. Raises DataError for rows that are bad or too few."""
    rows: list[np.ndarray] = []
    source = "text of its own"
    if not is_self(calibrate):
        rows = _read(calibrate, tokenizer, decoder.config)
        named = data_name(calibrate) if isinstance(calibrate, str | Path) else "rows"
        source = f"{named} and {source}"
    count = WRITTEN_BESIDE_ROWS if rows else WRITTEN
    length = min(LENGTH, decoder.config.max_position_embeddings)
    written = write_texts(decoder, tokenizer, count, length, pool, progress)
    fitted, held_out = _split(written)
    row_fitted, row_held_out = _split(rows)
    return Texts(row_fitted + fitted, row_held_out + held_out, source)


def _read(data: Data, tokenizer: Tokenizer, config: ModelConfig) -> list[np.ndarray]:
    """The rows' texts, evenly thinned to a budget."""
    texts: list[np.ndarray] = []
    for row in read_rows(data):
        ids, _ = encode_row(tokenizer, row)
        if max(ids) >= config.vocab_size:
            raise DataError(
                f"{data_name(data)}:{row.line}: token {max(ids)} is outside the model's vocabulary "
                f"of {config.vocab_size}"
            )
        longest = min(_LONGEST, config.max_position_embeddings)
        texts += _parts(ids, tokenizer.bos_id, longest)
    total = sum(map(len, texts))
    if total < _FEWEST:
        raise DataError(
            f"{data_name(data)}: {total} tokens in all, too few to calibrate on; give at least "
            f"{_FEWEST}, or calibrate='self'"
        )
    every = max(1.0, total / _MOST)
    return [texts[int(i * every)] for i in range(int(len(texts) / every))]


def _parts(ids: list[int], bos: int, longest: int) -> list[np.ndarray]:
    rest, step = ids[1:], longest - 1
    return [
        np.array([bos, *rest[start : start + step]], np.int32)
        for start in range(0, len(rest), step)
        if start == 0 or len(rest) - start > 1
    ]


def _split(texts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    held_out = [text for i, text in enumerate(texts) if i % _HELD_OUT == _HELD_OUT // 2]
    fitted = [text for i, text in enumerate(texts) if i % _HELD_OUT != _HELD_OUT // 2]
    return fitted, held_out
