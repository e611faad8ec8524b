"""LoRA adapters: PEFT's own, ours, switching among them on every engine, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from goldens.make_training import ADAPTER, CONFIG, FILE, adapter_ids
from safetensors.numpy import load_file, save_file
from tiny import edit_json, random_checkpoint, tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, OptionError
from gemma_multi.checkpoint import Adapter
from gemma_multi.cli import main
from gemma_multi.engines import ALL, create_engine
from gemma_multi.exporters import save
from gemma_multi.exporters.peft import save_adapter
from gemma_multi.formats.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import merge, quantize_checkpoint, to_precision
from training.conftest import ROWS

BASE = random_checkpoint(CONFIG)


def random_adapter(seed: int, rank: int = 4, size: float = 0.2) -> Adapter:
    rng = np.random.default_rng(seed)
    tensors = {
        name: ((rng.standard_normal((rank, shape[1])) * size).astype(np.float32),
               (rng.standard_normal((shape[0], rank)) * size).astype(np.float32))
        for name, shape in CONFIG.tensor_shapes().items()
        if name.endswith(("q_proj.weight", "up_proj.weight"))
    }  # fmt: skip
    return Adapter(rank, 8.0, tensors, "tiny")


@pytest.mark.parametrize("backend", ["keras", "mlx", "litert"])
def test_an_adapter_of_peft_gives_its_logits(backend: str) -> None:
    expected = np.load(FILE)["adapter_logits"]
    merged = merge(BASE, read_adapter(ADAPTER, CONFIG))
    actual = create_engine(merged, backend, "float32").session().read(adapter_ids(), ALL)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)
    plain = create_engine(BASE, backend, "float32").session().read(adapter_ids(), ALL)
    assert np.abs(plain - expected).max() > 0.1


def test_ours_has_the_names_and_shapes_of_peft(tmp_path: Path) -> None:
    """PEFT itself reads it in `goldens/make_training.py --check`."""
    theirs = load_file(ADAPTER / WEIGHTS_FILE)
    save_adapter(read_adapter(ADAPTER, CONFIG), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    settings = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    known = json.loads((ADAPTER / CONFIG_FILE).read_text())
    assert settings.keys() <= known.keys()
    assert set(settings["target_modules"]) == set(known["target_modules"])
    for name in ("peft_type", "task_type", "r", "lora_alpha", "bias", "use_rslora"):
        assert settings[name] == known[name]


@pytest.mark.parametrize("backend", ["keras", "mlx", "litert"])
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_switching_is_loading_anew(tmp_path: Path, backend: str, precision: str) -> None:
    """Logits after a switch are those of a merged model loaded by itself, and the base comes back
    bit for bit."""
    base = tiny_checkpoint(vocab_size=4096)
    paths = {
        name: save_adapter(random_adapter(seed), tmp_path / name) for seed, name in enumerate("ab")
    }
    model = gemma_multi.load(base, backend=backend, precision=precision, adapter=paths)
    assert model.active_adapter == "a"
    ids = np.random.default_rng(1).integers(3, 4096, 20)

    def logits(m: gemma_multi.Model) -> np.ndarray:
        return m.engine.session().read(ids, ALL)

    for name in ("a", "b", "a"):
        alone = to_precision(merge(base, read_adapter(paths[name], base.config)), precision)
        expected = logits(gemma_multi.load(alone, backend=backend, precision=precision))
        np.testing.assert_allclose(logits(model.switch_adapter(name)), expected, rtol=0, atol=1e-5)
        assert model.describe()["adapter"] == name
    plain = logits(gemma_multi.load(base, backend=backend, precision=precision))
    np.testing.assert_array_equal(logits(model.switch_adapter(None)), plain)
    assert "adapter" not in model.describe()


def test_a_merge_goes_through_our_grid(tmp_path: Path) -> None:
    base, _ = quantize_checkpoint(tiny_checkpoint(vocab_size=4096))
    adapter = random_adapter(0)
    merged = merge(base, adapter)
    assert merged.grid == "portable"
    name = next(iter(adapter.tensors))
    a, b = adapter.tensors[name]
    exact = base.weight(name) + 2.0 * (b @ a)  # alpha 8 over rank 4
    tensor = merged.tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    assert np.abs(tensor.dequantize() - exact).max() < 0.2 * np.abs(exact).max()
    untouched = "model.layers.0.mlp.down_proj.weight"
    assert merged.tensors[untouched] is base.tensors[untouched]
    save(base, tmp_path / "base")
    save_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "merge",
                str(tmp_path / "base"),
                str(tmp_path / "adapter"),
                "-o",
                str(tmp_path / "out"),
            ]
        )
    assert ended.value.code == 0
    assert open_checkpoint(tmp_path / "out").digest() == merged.digest()
    assert "LoRA adapter of rank 4 merged" in (tmp_path / "out" / "NOTICE").read_text()


def test_a_saved_or_exported_model_has_its_adapter(tmp_path: Path) -> None:
    path = save_adapter(random_adapter(1), tmp_path / "a")
    model = gemma_multi.load(
        tiny_checkpoint(vocab_size=4096), backend="keras", precision="float32", adapter=path
    )
    expected = model.generate("hello", temperature=0.0, max_tokens=8).tokens
    saved = gemma_multi.load(model.save(tmp_path / "saved"), backend="keras", precision="float32")
    assert saved.generate("hello", temperature=0.0, max_tokens=8).tokens == expected
    exported = model.export(tmp_path / "m.tflite", context_length=64, precision="float32")
    phone = gemma_multi.load(exported.path)
    assert phone.generate("hello", temperature=0.0, max_tokens=8).tokens == expected


def test_a_chat_reads_its_conversation_anew_after_a_switch(tmp_path: Path) -> None:
    base = tiny_checkpoint(vocab_size=4096)
    path = save_adapter(random_adapter(1), tmp_path / "a")
    model = gemma_multi.load(base, backend="keras", precision="float32", adapter={"a": path})
    chat = model.switch_adapter(None).chat()
    chat.send("hello", max_tokens=4, temperature=0.0)
    model.switch_adapter("a")
    answer = chat.send("again", max_tokens=6, temperature=0.0)
    assert answer.tokens
    fresh = model.engine.session()
    fresh.read(chat._session.ids)
    np.testing.assert_allclose(fresh.read([5]), chat._session.fork().read([5]), rtol=0, atol=1e-4)


def break_adapter(path: Path, what: str) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    first = next(iter(tensors))
    if what == "another model":
        tensors[first.replace("layers.0", "layers.99")] = tensors.pop(first)
    elif what == "another size":
        tensors[first] = np.zeros((2, 640), np.float32)
    elif what == "half":
        del tensors[next(n for n in tensors if "lora_B" in n)]
    elif what == "nan":
        tensors[first] = np.full_like(tensors[first], np.nan)
    save_file(tensors, path / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another model", "is the adapter for another model"),
        ("another size", r"has shape \[2, 640\], but this model needs"),
        ("half", "has shape none"),
        ("nan", "holds NaN or infinity"),
    ],
)
def test_an_adapter_that_does_not_fit(tmp_path: Path, what: str, message: str) -> None:
    path = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    break_adapter(path, what)
    with pytest.raises(CheckpointError, match=message):
        gemma_multi.load(BASE, backend="keras", adapter=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_an_adapter_of_another_kind(tmp_path: Path, changes: dict, message: str) -> None:
    path = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    edit_json(path / CONFIG_FILE, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(path, CONFIG)


def test_names_of_adapters(tmp_path: Path) -> None:
    model = gemma_multi.load(tiny_checkpoint(vocab_size=4096), backend="keras")
    with pytest.raises(OptionError, match="no adapter is called 'x'; there are: none"):
        model.switch_adapter("x")
    with pytest.raises(CheckpointError, match="no adapter there"):
        model.add_adapter("x", tmp_path)


def test_an_adapter_trained_on_one_engine_runs_on_the_others(tmp_path: Path) -> None:
    base = tiny_checkpoint(vocab_size=4096)
    result = gemma_multi.finetune(
        base, ROWS, output=tmp_path / "run", method="lora", targets="q_proj,down_proj", qat=False,
        rank=4, alpha=8, epochs=1, learning_rate=1e-2, backend="keras", progress=False,
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"adapter", "curves.png"}
    answers = {
        gemma_multi.load(base, backend=backend, precision="float32", adapter=result.path())
        .generate("What is 2 plus 2?", temperature=0.0, max_tokens=10).tokens
        for backend in ("keras", "mlx", "litert")
    }  # fmt: skip
    assert len(answers) == 1


def test_an_adapter_on_a_grid_of_other_groups(tmp_path: Path) -> None:
    """mlx-lm's 4-bit models have groups of 64; what an adapter changes goes on ours, of 32."""
    import mlx.core as mx

    base = tiny_checkpoint(vocab_size=4096, hidden_size=192)
    tensors = dict(base.tensors)
    for name, shape in base.config.tensor_shapes().items():
        if len(shape) == 2:
            parts = mx.quantize(mx.array(base.weight(name)), group_size=64, bits=4)
            tensors[name] = QuantizedTensor(*(np.array(part) for part in parts), 4, 64)
    base = base.with_tensors(tensors)
    rng = np.random.default_rng(0)
    name = "model.layers.2.mlp.up_proj.weight"
    pair = (rng.standard_normal((2, 192)).astype(np.float32) * 0.2,
            rng.standard_normal((128, 2)).astype(np.float32) * 0.2)  # fmt: skip
    path = save_adapter(Adapter(2, 4.0, {name: pair}), tmp_path / "adapter")
    model = gemma_multi.load(base, backend="mlx", adapter=path)
    ids = rng.integers(3, 4096, 12)
    merged = merge(base, read_adapter(path, base.config))
    expected = create_engine(merged, "keras", "float32").session().read(ids, ALL)
    np.testing.assert_allclose(model.engine.session().read(ids, ALL), expected, rtol=0, atol=2e-4)


def test_adapters_and_grids_that_do_not_go_together(tmp_path: Path) -> None:
    dense = tiny_checkpoint(vocab_size=4096)
    int4, _ = quantize_checkpoint(dense)
    gate = "model.layers.0.mlp.gate_proj.weight"
    mixed = int4.with_tensors({gate: dense.tensors[gate]})
    with pytest.raises(OptionError, match="qat is for int4, but the model is mixed"):
        gemma_multi.finetune(mixed, ROWS, output=tmp_path / "run", method="lora", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match="int4 already"):
        to_precision(merge(int4, random_adapter(0)), "int8")
