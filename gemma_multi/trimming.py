"""`trim`: a model with the vocabulary that a task needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import DataError, OptionError
from gemma_multi.progress import Progress, reporting
from gemma_multi.rows import data_name, encode_row, read_rows
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.transforms import trimmed


def trim(
    model: Source,
    corpus: Any = None,
    *,
    keep: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
) -> Checkpoint:
    """A checkpoint with fewer pieces in its vocabulary, and so fewer rows in its embedding. Every
    engine, exporter and trainer takes it as it takes others.

    model, revision, local_files_only: what to trim; see `open_checkpoint`.
    corpus: rows as `finetune` takes them, or texts; every piece they use stays, where `keep` is
        given the most frequent ones.
    keep: pieces in all; what the corpus does not use is filled up with those that are frequent
        anywhere.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).

    Text of pieces that stay gives the same tokens, renumbered, and the same logits; any other text
    is still read and written, in smaller pieces. Raises OptionError where neither is given or
    `keep` is too small, DataError for rows that are bad.
    """
    if corpus is None and keep is None:
        raise OptionError("trim needs a corpus whose pieces stay, or keep, the number of pieces")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise OptionError(f"keep is {keep!r}, expected a number of pieces")
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    with reporting(progress, "trimming") as report:
        report(0, 2)
        used = [] if corpus is None else _used(checkpoint, corpus)
        report(1, 2)
        result = trimmed(checkpoint, used, keep)
        report(2, 2)
    return result


def _used(checkpoint: Checkpoint, corpus: Any) -> list[int]:
    """The pieces of a corpus, the most frequent first."""
    tokenizer, found = checkpoint.tokenizer, Counter[int]()
    for ids in _encoded(tokenizer, corpus):
        found.update(ids)
    if not found:
        raise DataError(f"{data_name(corpus)}: no text in it")
    return [piece for piece, _ in found.most_common()]


def _encoded(tokenizer: Tokenizer, corpus: Any) -> Iterator[list[int]]:
    """The token ids of texts, or of rows as they are trained on."""
    if isinstance(corpus, list | tuple) and corpus and all(isinstance(t, str) for t in corpus):
        yield from map(tokenizer.encode, corpus)
    else:
        yield from (encode_row(tokenizer, row)[0] for row in read_rows(corpus))
