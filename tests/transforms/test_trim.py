"""A smaller vocabulary: the same tokens and logits for what stays, and no text is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from varied_text import samples

import gemma_multi
from gemma_multi import DataError, OptionError
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.cli import cli
from gemma_multi.config import EMBEDDING
from gemma_multi.engines import ALL, create_engine
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.transforms import trimmed
from gemma_multi.transforms.trim import _Pieces

STORY = [
    "Once upon a time there was a sleepy fox who lived in a quiet forest.",
    "The stairs went round and round, and each step had its own creak.",
]
UNSEEN = "Çok güzel! 🦊 東京 — 12,5 % <end_of_turn> \u0000 \x7f"


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    return gemma_multi.open_checkpoint("storyteller")


@pytest.fixture(scope="module")
def small(whole: Checkpoint) -> Checkpoint:
    return gemma_multi.trim(whole, STORY)


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text)]


def test_gemmas_own_tokenizer(gemma_tokenizer_directory: Path) -> None:
    """Over all sorts of text: what a corpus uses comes out the same, whatever else is in a text."""
    whole = Tokenizer.from_directory(gemma_tokenizer_directory)
    pieces = _Pieces(whole.model, 262_144)
    texts = samples(2400)
    kept = pieces.indispensable(whole)
    assert len(kept) < 1000
    for text in texts[:1200]:
        for one in whole.encode(text):
            kept |= {one, *pieces.on_the_way(one)}
    small = Tokenizer(pieces.subset(np.array(sorted(kept))))
    assert small.vocab_size == len(kept)
    for text in texts[:1200]:
        assert spelled(small, text) == spelled(whole, text), repr(text)
    same = 0
    for text in texts[1200:]:
        assert small.decode(small.encode(text)) == whole.decode(whole.encode(text)), repr(text)
        if all(i in kept for i in whole.encode(text)):
            same += 1
            assert spelled(small, text) == spelled(whole, text), repr(text)
    assert same > 100
    for name in ("pad", "eos", "bos", "start_of_turn", "end_of_turn"):
        assert getattr(small, f"{name}_id") == getattr(whole, f"{name}_id")


def test_logits_of_what_stays_are_the_same(whole: Checkpoint, small: Checkpoint) -> None:
    old_ids = np.array([whole.tokenizer.id(small.tokenizer.piece(i))
                        for i in range(small.config.vocab_size)])  # fmt: skip
    for text in STORY:
        assert spelled(small.tokenizer, text) == spelled(whole.tokenizer, text)
        logits = [
            create_engine(c, "keras", "float32").session().read(c.tokenizer.encode(text), ALL)
            for c in (whole, small)
        ]
        np.testing.assert_allclose(logits[1], logits[0][:, old_ids], rtol=0, atol=1e-5)
    codes = small.tensors[EMBEDDING], whole.tensors[EMBEDDING].rows(old_ids)
    assert codes[0] == codes[1]  # nothing was rounded again


def test_any_text_still_comes_back(small: Checkpoint) -> None:
    for text in (UNSEEN, *samples(200)):
        ids = small.tokenizer.encode(text)
        assert small.tokenizer.decode(ids) == text.replace("\u2581", " ")
        assert max(ids, default=0) < small.config.vocab_size


def test_it_is_an_ordinary_checkpoint(small: Checkpoint, tmp_path: Path) -> None:
    """For every engine, every exporter and the trainer."""
    greedy = {"temperature": 0.0, "max_tokens": 12}
    texts = {
        backend: gemma_multi.load(small, backend=backend, precision="float32")
        .generate("Tell me a bedtime story.", **greedy).text
        for backend in ("mlx", "keras", "litert")
    }  # fmt: skip
    assert len(set(texts.values())) == 1
    for name in ("m.tflite", "m.litertlm"):
        gemma_multi.export(small, tmp_path / name)
        opened = gemma_multi.open_checkpoint(tmp_path / name)
        assert opened.config.vocab_size == small.config.vocab_size
        assert opened.tokenizer.encode(UNSEEN) == small.tokenizer.encode(UNSEEN)
    gemma_multi.export(small, tmp_path / "directory", format="mlx")
    assert gemma_multi.open_checkpoint(tmp_path / "directory").digest() == small.digest()
    assert "trimmed from" in small.provenance.notice()
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(12)]
    tuned = gemma_multi.finetune(small, rows, tmp_path / "tuned", epochs=1, backend="mlx",
                                 progress=False)  # fmt: skip
    assert tuned.model.config.vocab_size == small.config.vocab_size


def test_so_many_pieces(whole: Checkpoint) -> None:
    for corpus in (None, STORY):
        small = gemma_multi.trim(whole, corpus, keep=900)
        assert small.config.vocab_size == small.tokenizer.vocab_size == 900
    assert spelled(small.tokenizer, STORY[0]) == spelled(whole.tokenizer, STORY[0])
    assert trimmed(whole, [], whole.tokenizer.vocab_size).tokenizer == whole.tokenizer


def test_tokens_that_end_an_answer_stay(whole: Checkpoint) -> None:
    ends = whole.replace(generation={"eos_token_id": 4000, "temperature": 0.5})
    small = gemma_multi.trim(ends, STORY)
    new = small.generation["eos_token_id"]
    assert small.tokenizer.piece(new) == whole.tokenizer.piece(4000)
    assert small.stop_ids == {1, 106, new}


def test_on_the_command_line(tmp_path: Path, small: Checkpoint) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORY))
    arguments = ["trim", "storyteller", "-o", str(tmp_path / "small"), "--corpus", str(rows)]
    cli.main(arguments, standalone_mode=False)
    assert gemma_multi.open_checkpoint(tmp_path / "small").digest() == small.digest()
    with pytest.raises(OptionError, match="exists already"):
        cli.main(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "trim needs a corpus"),
        ({"keep": 10}, r"keep is 10, expected \d+ to \d+ pieces"),
        ({"keep": 10**6}, r"keep is 1000000, expected"),
        ({"keep": 2.5}, "keep is 2.5, expected a number"),
        ({"corpus": [{"words": "x"}]}, "unknown key 'words'"),
        ({"corpus": []}, "no text in it"),
    ],
)
def test_bad_input(whole: Checkpoint, given: dict, message: str) -> None:
    with pytest.raises((OptionError, DataError), match=message):
        gemma_multi.trim(whole, **given)
