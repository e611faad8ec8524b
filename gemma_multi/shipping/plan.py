"""What `ship` decides before it begins: how to train and to ask, from the model and the rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError, DataError, OptionError
from gemma_multi.rows import encode_row
from gemma_multi.scoring import LOSS
from gemma_multi.shipping.held_out import Split
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.training.options import TrainingOptions

_ROWS_READ = 600  # in all, of few rows; measured on the real 270M (benchmarks/specialists.py)
_MOST_EPOCHS = 15
_FEW = 100  # rows, of which 4 make a step
_SMALL, _SMALL_RATE = 20_000_000, 2e-3  # parameters, and the rate that they want in full
_ROOM = 8  # tokens that an answer may be longer than any in the rows
_CONTEXT = 1024  # tokens that a phone has room for, and rows rarely need
_INT4 = 0.58  # bytes a parameter


@dataclass(frozen=True)
class Plan:
    """`training` are `finetune`'s options; `options` the same, checked."""

    training: dict[str, Any]
    options: TrainingOptions
    max_tokens: int  # of an answer
    context_length: int  # of the exported file


def plan(
    base: Checkpoint, split: Split, given: Mapping[str, Any], context_length: int | None
) -> Plan:  # fmt: skip
    """Raises OptionError for what cannot be, DataError for a row that is too long."""
    lengths = [
        (one.where, len(encode_row(base.tokenizer, one.row)[0]) + 1)  # a text ends with one more
        for one in (*split.training, *split.held)
    ]
    longest = max(length for _, length in lengths)
    room = base.config.max_position_embeddings
    count = len(split.training)
    # an original is calibrated first, and its scales are trained: see training/calibrated.py
    method = given.get("method") or (None if base.is_int4 else "scales")
    if given.get("qat") is False and "method" not in given:
        method = "full"
    training: dict[str, Any] = {
        "epochs": max(1, min(_MOST_EPOCHS, round(_ROWS_READ / count))),
        "batch_size": 4 if count < _FEW else 8, "schedule": "cosine",
        "max_length": min(max(64, -(-longest // 64) * 64), room),
        **({"method": method} if method else {}), **given,
    }  # fmt: skip
    scales = method == "scales" or (method is None and bool(base.provenance.channels))
    if not scales and method != "lora" and base.config.num_parameters < _SMALL:
        training.setdefault("learning_rate", _SMALL_RATE)
    checked = TrainingOptions.checked(
        {**training, "validation": 0.0}, room, "scales" if scales else "full"
    )
    _check_lengths(lengths, checked)
    needed = longest + _ROOM
    held = min(max(_CONTEXT, 1 << (needed - 1).bit_length()), room)
    if context_length is not None and context_length < needed:
        raise OptionError(
            f"context_length is {context_length}, but the longest row and its answer take {needed} "
            "tokens; raise it, or leave it out"
        )
    return Plan(
        training, checked, _longest_answer(base.tokenizer, split) + _ROOM, context_length or held
    )


def check_room(base: Checkpoint, plan: Plan, output: Path) -> None:
    """Raises CheckpointError where the disk cannot hold what is certain to be written."""
    parameters = base.config.num_parameters
    needed = 2 * _INT4 * parameters  # a directory and a file
    if plan.options.method == "full":
        needed += 12 * parameters  # weights and Adam's two moments, to go on with
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{output}: the disk has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB will be "
            "written; make room, or choose an output elsewhere"
        )


def _longest_answer(tokenizer: Tokenizer, split: Split) -> int:
    """In tokens, of those that are asked for."""
    if split.scoring.kind == LOSS:
        return 0
    rows = (*split.training, *split.held)
    return max(len(tokenizer.encode(one.answer)) for one in rows if one.answer is not None)


def _check_lengths(lengths: list[tuple[str, int]], options: TrainingOptions) -> None:
    """Raises DataError naming the first row that training would refuse."""
    for where, length in lengths:
        if options.too_long == "refuse" and length > options.max_length:
            raise DataError(
                f"{where}: {length} tokens, but {options.max_length} is the most that this model "
                "and these options take; shorten the row, or choose too_long='cut' or 'skip'"
            )
