"""Several devices: two and four virtual CPUs give what one gives. JAX counts its devices once, so
each number has a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import OptionError, finetune
from training.conftest import ROWS

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from tiny import tiny_checkpoint
from training.conftest import ROWS
import gemma_multi
result = gemma_multi.finetune(
    tiny_checkpoint(vocab_size=4096), ROWS, output={output!r}, devices={devices}, epochs=1,
    learning_rate=1e-4, batch_size=4, max_length=64, qat={qat}, backend="keras", progress=False,
)
print(json.dumps(result.history))
"""


def history(output: Path, devices: int | None, qat: bool = False) -> list[float]:
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]), output=str(output),
                         devices=devices, qat=qat)  # fmt: skip
    flags = f"--xla_force_host_platform_device_count={devices or 1}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": flags}, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads(done.stdout)
    return [r.get("loss", r.get("validation_loss")) for r in records]


@pytest.mark.slow
def test_devices_share_a_batch(tmp_path: Path) -> None:
    one = history(tmp_path / "one", None)
    for devices in (2, 4):
        several = history(tmp_path / str(devices), devices)
        np.testing.assert_allclose(several, one, rtol=0, atol=2e-4)


def test_devices_train_through_the_grid(tmp_path: Path) -> None:
    one, two = history(tmp_path / "1", None, qat=True), history(tmp_path / "2", 2, qat=True)
    np.testing.assert_allclose(two[:2], one[:2], rtol=0, atol=1e-4)
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-2)  # a code that flips is a step


def test_processes_of_mlx_share_a_batch(tmp_path: Path) -> None:
    """`mlx.launch` starts two; one of them writes, both end with the same losses."""
    script = tmp_path / "train.py"
    code = SCRIPT.replace('"keras"', '"mlx"').replace("print(", "print('LOSSES', ")
    tests = str(Path(__file__).parents[1])
    script.write_text(
        code.format(tests=tests, output=str(tmp_path / "two"), devices=None, qat=False)
    )
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring",
              "--python", sys.executable, str(script)]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stdout.splitlines() if "LOSSES" in line]
    assert len(lines) == 2, done.stderr[-3000:]
    two = [[r.get("loss", r.get("validation_loss")) for r in json.loads(line.split("LOSSES")[1])]
           for line in lines]  # fmt: skip
    assert two[0] == two[1]
    one = gemma_multi.finetune(
        tiny_checkpoint(vocab_size=4096), ROWS, output=tmp_path / "one", epochs=1,
        learning_rate=1e-4, batch_size=4, max_length=64, qat=False, backend="mlx", progress=False,
    )  # fmt: skip
    expected = [r.get("loss", r.get("validation_loss")) for r in one.history]
    np.testing.assert_allclose(two[0], expected, rtol=0, atol=2e-4)
    assert (tmp_path / "two" / "model").exists()


def test_what_the_leader_refuses_all_processes_of_mlx_refuse(tmp_path: Path) -> None:
    """Only the leader looks at the output; a follower that went on would wait for it for ever."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine.txt").write_text("in use")
    script = tmp_path / "train.py"
    tests = str(Path(__file__).parents[1])
    code = SCRIPT.replace('"keras"', '"mlx"')
    code = code.format(tests=tests, output=str(tmp_path / "two"), devices=None, qat=False)
    script.write_text(
        "try:\n"
        + "\n".join(f"    {line}" for line in code.splitlines())
        + "\nexcept Exception as error:\n    print('REFUSED', type(error).__name__, error)\n"
    )
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring",
              "--python", sys.executable, str(script)]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    refused = [line.split("REFUSED ")[1] for line in done.stdout.splitlines() if "REFUSED" in line]
    assert len(refused) == 2, done.stdout + done.stderr[-3000:]
    assert any(line.startswith("OptionError") and "exists already" in line for line in refused)
    assert any(line.startswith("TrainingError another process") for line in refused)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("devices", "batch_size", "message"),
    [(99, 4, "devices is 99, but there are"), (0, 4, "devices is 0"), (True, 4, "devices is True")],
)
def test_devices_that_are_not_there(
    tmp_path: Path, devices: int, batch_size: int, message: str
) -> None:
    from tiny import tiny_checkpoint

    from training.conftest import ROWS

    with pytest.raises(OptionError, match=message):
        finetune(tiny_checkpoint(vocab_size=4096), ROWS, output=tmp_path / "run", backend="keras",
                 devices=devices, batch_size=batch_size, progress=False)  # fmt: skip
