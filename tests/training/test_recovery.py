"""`quantize(..., recover=data)`: int4 trained back from the original's own probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, OptionError
from gemma_multi.cli import main
from gemma_multi.engines import ALL
from gemma_multi.exporters import save
from training.conftest import ROWS


def divergence(a: gemma_multi.Checkpoint, b: gemma_multi.Checkpoint) -> float:
    ids = np.random.default_rng(0).integers(3, 4096, 60)
    engines = [gemma_multi.load(c, backend="keras", precision="float32").engine for c in (a, b)]
    logits = [engine.session().read(ids, ALL) for engine in engines]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_recovery_brings_int4_closer_to_the_original(tmp_path: Path) -> None:
    original = tiny_checkpoint(vocab_size=4096)
    plain = gemma_multi.quantize(original, tmp_path / "plain", calibrate=None)
    assert plain.recovery is None
    rng = np.random.default_rng(0)
    words = [
        original.tokenizer.piece(int(i)).replace("▁", " ") for i in rng.integers(300, 4000, 900)
    ]
    rows = [{"text": "".join(words[i : i + 40])} for i in range(0, 900, 30)]
    report = gemma_multi.quantize(
        original, tmp_path / "recovered", recover=rows, backend="keras", learning_rate=3e-4,
        epochs=6, batch_size=8, max_length=256, too_long="cut", progress=False,
    )  # fmt: skip
    assert report.recovery is not None
    assert report.recovery.after < 0.8 * report.recovery.before
    assert "recovered to" in str(report)
    recovered = gemma_multi.open_checkpoint(tmp_path / "recovered")
    assert recovered.grid == "portable"
    assert "recovered from its own probabilities" in (tmp_path / "recovered/NOTICE").read_text()
    before = divergence(original, gemma_multi.open_checkpoint(tmp_path / "plain"))
    assert divergence(original, recovered) < 0.95 * before


def test_recovery_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_checkpoint(vocab_size=4096), tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(base), "-o", str(tmp_path / "out"), "--recover",
              str(tmp_path / "rows.jsonl"), "--backend", "keras", "--json"])  # fmt: skip
    assert ended.value.code == 0
    won = json.loads(capsys.readouterr().out)["recovery"]
    assert won["after"] <= won["before"]


def test_what_cannot_be_recovered(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="int4 already"):
        gemma_multi.quantize("storyteller", tmp_path / "a", recover=ROWS)
    base = tiny_checkpoint(vocab_size=4096)
    with pytest.raises(OptionError, match="recover is for int4"):
        gemma_multi.quantize(base, tmp_path / "a", embedding_bits=8, recover=ROWS)
    with pytest.raises(OptionError, match="option 'epochs' is for recover"):
        gemma_multi.quantize(base, tmp_path / "a", epochs=3)
    assert not (tmp_path / "a").exists()
