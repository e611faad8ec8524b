"""LiteRT's batches: the next tokens of several conversations in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi.engines import HIDDEN, LAST, NOTHING, Rows, create_engine
from gemma_multi.engines.litert_caches import BatchCalls
from gemma_multi.errors import OptionError
from gemma_multi.exporters.tflite import TfliteOptions, choose


def engine(rows: int, precision: str = "int4") -> Any:
    return create_engine(tiny_checkpoint(), "litert", precision, options={"decode_batch": rows})


def conversations(one: Any) -> list[Any]:
    """Of different lengths, one past the sliding window and one that is a fork."""
    sessions = [one.session() for _ in range(14)]
    for i, session in enumerate(sessions):
        session.read(np.arange(5, 6 + 7 * i) % 300, NOTHING)
    return [*sessions, sessions[9].fork()]


@pytest.mark.parametrize("precision", ["int4", "int8", "float32"])
def test_a_row_is_what_it_is_alone(precision: str) -> None:
    """To the bit: what somebody is told does not depend on who else asks."""
    told = []
    for rows in (1, 8):
        one = engine(rows, precision)
        sessions = conversations(one)
        steps = [one.read(sessions, [[7 + step + i] for i in range(15)]) for step in range(3)]
        told.append(np.array(steps))
        assert [session.length for session in sessions[:3]] == [4, 11, 18]
    np.testing.assert_array_equal(*told)


@pytest.mark.parametrize(
    ("asked", "sizes"), [(2, [2]), (3, [2]), (7, [4, 2]), (8, [8]), (15, [8, 4, 2])]
)
def test_many_are_split_into_the_batches_that_there_are(
    asked: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    read = BatchCalls.read

    def counted(self: BatchCalls, rows: Any, *more: Any) -> Any:
        found.append(len(rows))
        return read(self, rows, *more)

    monkeypatch.setattr(BatchCalls, "read", counted)
    one = engine(8)
    one.read([one.session() for _ in range(asked)], [[5]] * asked)
    assert found == sizes


def test_prompts_and_other_wants_are_read_beside_them() -> None:
    wants = [LAST, LAST, HIDDEN, Rows(np.array([5, 6])), NOTHING, LAST]
    rows = [[5], [6], [7], [8], [9], np.arange(5, 40)]
    one, alone = engine(8), engine(1)
    for found, row, want in zip(
        one.read([one.session() for _ in rows], rows, wants), rows, wants, strict=True
    ):
        expected = alone.session().read(row, want)
        if want is NOTHING:
            assert found is None
        else:
            np.testing.assert_array_equal(found, expected)


def test_int8_caches_have_their_scales() -> None:
    """As long contexts have, of which the file is told."""
    told = []
    for rows in (1, 4):
        checkpoint = tiny_checkpoint(max_position_embeddings=16384)
        one = create_engine(checkpoint, "litert", "int4", 16384, {"decode_batch": rows})
        assert one.file.info.cache == "int8"
        sessions = [one.session() for _ in range(4)]
        for i, session in enumerate(sessions):
            session.read(np.arange(5, 30 + i), NOTHING)
        told.append(np.array([one.read(sessions, [[5]] * 4) for _ in range(2)]))
    np.testing.assert_array_equal(*told)


def test_a_batch_that_fails_leaves_empty_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(4)
    sessions = [one.session() for _ in range(4)]
    expected = one.session().read([5, 6])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    one.read(sessions, [[9]] * 4)
    with monkeypatch.context() as patched:
        patched.setattr(one.runtime, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.read(sessions, [[5]] * 4)
    assert [session.length for session in sessions] == [0] * 4
    for session in sessions:
        np.testing.assert_array_equal(session.read([5, 6]), expected)


def test_answers_are_those_of_a_model_without(tmp_path: Path) -> None:
    """Through a file that is exported with batches, as a server would be given it."""
    path = tmp_path / "story.tflite"
    gemma_multi.export(
        "storyteller", path, context_length=512, decode_batch=4, verify=False, progress=False
    )
    batched, alone = gemma_multi.load(path), gemma_multi.load("storyteller", backend="litert")
    assert batched.engine.rows_at_a_time == 4
    prompts = [f"Tell me of the {animal}." for animal in ("fox", "owl", "hen", "mole", "cat")]
    for options in ({"temperature": 0.0}, {"seed": 3, "temperature": 1.0}):
        asked = {"max_tokens": 30, **options}
        found = [row.value.text for row in batched.batch(prompts, progress=False, **asked)]
        assert found == [alone.generate(prompt, **asked).text for prompt in prompts]


@pytest.mark.parametrize("rows", [0, 3, 16, True, "2"])
def test_batches_are_powers_of_two(rows: Any) -> None:
    with pytest.raises(OptionError, match=f"decode_batch is {rows!r}, expected 1, 2, 4 or 8"):
        engine(rows)
    with pytest.raises(OptionError, match=f"decode_batch is {rows!r}, expected 1, 2, 4 or 8"):
        choose(tiny_checkpoint(), TfliteOptions(decode_batch=rows))


def test_what_cannot_batch_says_so(tmp_path: Path) -> None:
    path = tmp_path / "story.tflite"
    with pytest.raises(OptionError, match="decode_batch is 2, but target 'gpu' reads one"):
        gemma_multi.export("storyteller", path, target="gpu", decode_batch=2, progress=False)
    gemma_multi.export("storyteller", path, context_length=512, verify=False, progress=False)
    with pytest.raises(OptionError, match=r"decode_batch is 2, but .* was exported with 1; export"):
        gemma_multi.load(path, decode_batch=2)
