"""Reading and saving model directories: what is accepted, and what each refusal says."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzzing import fuzz
from safetensors.numpy import load_file, save_file
from tiny import edit_json, random_tensors, tiny_checkpoint, tiny_config

from gemma_multi.errors import CheckpointError, ConfigError, GemmaError, OptionError
from gemma_multi.exporters import save
from gemma_multi.quantizing import quantize
from gemma_multi.sources import open_checkpoint

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def rewrite(directory: Path, **changes: np.ndarray | None) -> None:
    """Replaces tensors of model.safetensors (dots spelled as double underscores)."""
    tensors = load_file(directory / "model.safetensors")
    for name, array in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    save_file(tensors, directory / "model.safetensors")


class TestReading:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_each_stored_type_is_read_as_it_is(self, tmp_path: Path, dtype: type) -> None:
        name = np.dtype(dtype).name
        config = tiny_config(dtype=name)
        tensors = {k: v.astype(dtype) for k, v in random_tensors(config).items()}
        path = save(tiny_checkpoint().replace(config=config, tensors=tensors), tmp_path / "m")
        checkpoint = open_checkpoint(path)
        assert checkpoint.precision == name
        for key, expected in tensors.items():
            assert checkpoint.tensors[key].dtype == dtype
            np.testing.assert_array_equal(checkpoint.weight(key), expected)

    def test_tensors_are_views_of_the_file(self, tiny_directory: Path) -> None:
        checkpoint = open_checkpoint(tiny_directory)
        for tensor in checkpoint.tensors.values():
            base = tensor
            while isinstance(base.base, np.ndarray):
                base = base.base
            assert isinstance(base, np.memmap)
            assert not tensor.flags.writeable

    def test_opening_270m_in_bfloat16_copies_nothing(self, tmp_path: Path) -> None:
        """536 MB of weights; private memory grows by what NumPy and a header need."""
        script = (
            "import sys, numpy as np, json\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from tiny import gemma_270m_config, tiny_checkpoint\n"
            "from gemma_multi.exporters import save\n"
            "from gemma_multi.sources import open_checkpoint\n"
            "import ml_dtypes\n"
            "config = gemma_270m_config()\n"
            "assert config.num_parameters == 268_098_176\n"
            "path = sys.argv[1]\n"
            "if len(sys.argv) > 3:\n"
            "    shapes, bf16 = config.tensor_shapes(), ml_dtypes.bfloat16\n"
            "    t = {n: np.zeros(s, bf16) for n, s in shapes.items()}\n"
            "    save(tiny_checkpoint().replace(config=config, tensors=t), path)\n"
            "    raise SystemExit\n"
            "def private():\n"
            "    lines = open('/proc/self/status').read().splitlines()\n"
            "    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon')) / 1024\n"
            "before = private()\n"
            "checkpoint = open_checkpoint(path)\n"
            "print(checkpoint.nbytes, private() - before)\n"
        )
        if not Path("/proc/self/status").exists():
            pytest.skip("private memory is read from /proc, which this system does not have")
        run = [sys.executable, "-c", script, str(tmp_path / "m"), str(Path(__file__).parent)]
        subprocess.run([*run, "write"], check=True)
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        nbytes, private_mb = done.stdout.split()
        assert int(nbytes) == 2 * 268_098_176
        assert float(private_mb) < 30

    def test_shards_are_read_through_their_index(self, tiny_copy: Path) -> None:
        expected = load_file(tiny_copy / "model.safetensors")
        names = sorted(expected)
        weight_map = {}
        for i in range(3):
            file = f"model-{i + 1:05}-of-00003.safetensors"
            save_file({n: expected[n] for n in names[i::3]}, tiny_copy / file)
            weight_map |= dict.fromkeys(names[i::3], file)
        (tiny_copy / "model.safetensors").unlink()
        index = tiny_copy / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        checkpoint = open_checkpoint(tiny_copy)
        for name, array in expected.items():
            np.testing.assert_array_equal(checkpoint.weight(name), array)

        index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: weight_map[names[1]]}}))
        with pytest.raises(CheckpointError, match=f"'{names[0]}' is not where"):
            open_checkpoint(tiny_copy)

    def test_a_vision_models_text_part_is_read(self, tiny_copy: Path) -> None:
        expected = load_file(tiny_copy / "model.safetensors")
        text_config = json.loads((tiny_copy / "config.json").read_text())
        vision = {"vision_tower.encoder.weight": np.zeros((2, 3), np.float32)}
        for prefix in ("language_model.", "model.language_model."):
            old = {f"{prefix}{n}": a for n, a in expected.items()}
            new = {f"{prefix}{n.removeprefix('model.')}": a for n, a in expected.items()}
            save_file({**(old if prefix[0] == "l" else new), **vision},
                      tiny_copy / "model.safetensors")  # fmt: skip
            (tiny_copy / "config.json").write_text(
                json.dumps({"model_type": "gemma3", "text_config": text_config})
            )
            checkpoint = open_checkpoint(tiny_copy)
            np.testing.assert_array_equal(checkpoint.weight(NORM), expected[NORM])

    def test_a_head_that_copies_the_embedding_is_dropped_and_another_refused(
        self, tiny_copy: Path
    ) -> None:
        embedding = load_file(tiny_copy / "model.safetensors")[EMBEDDING]
        rewrite(tiny_copy, lm_head__weight=embedding)
        assert "lm_head.weight" not in open_checkpoint(tiny_copy).tensors
        rewrite(tiny_copy, lm_head__weight=embedding + 1)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight' differs.*ties the two"):
            open_checkpoint(tiny_copy)

    def test_a_head_said_to_be_untied_is_folded_where_it_is_the_embedding(
        self, tiny_copy: Path
    ) -> None:
        expected = open_checkpoint(tiny_copy)
        edit_json(tiny_copy / "config.json", tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match="tie_word_embeddings False, but there is no"):
            open_checkpoint(tiny_copy)
        rewrite(tiny_copy, lm_head__weight=load_file(tiny_copy / "model.safetensors")[EMBEDDING])
        assert open_checkpoint(tiny_copy) == expected


class TestRefusals:
    def test_no_directory_a_file_or_no_weights(self, tmp_path: Path, tiny_copy: Path) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            open_checkpoint(tmp_path / "absent")
        with pytest.raises(
            CheckpointError, match=r"is none of what can be opened: a \.gguf file, a Hugging Face"
        ):
            open_checkpoint(tiny_copy / "config.json")
        (tiny_copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="has no weights"):
            open_checkpoint(tiny_copy)
        with pytest.raises(ConfigError, match=r"config\.json: not found"):
            open_checkpoint(tmp_path)

    def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(self, tiny_copy: Path) -> None:
        for change, message in (
            ({"model__norm__weight": None}, "tensor 'model.norm.weight' is missing"),
            ({"model__extra__weight": np.zeros(3, np.float32)}, "'model.extra.weight' does not"),
            ({"model__norm__weight": np.zeros(7, np.float32)}, r"shape \[7\].*implies \[96\]"),
            ({"model__norm__weight": np.zeros(96, np.uint32)}, "dtype U32, expected floats"),
            ({"model__norm__weight": np.zeros(96, np.int64)}, "dtype 'I64'"),
        ):
            original = load_file(tiny_copy / "model.safetensors")
            rewrite(tiny_copy, **change)
            with pytest.raises(CheckpointError, match=message) as caught:
                open_checkpoint(tiny_copy)
            assert str(tiny_copy) in str(caught.value)
            save_file(original, tiny_copy / "model.safetensors")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_weights_that_are_not_finite_are_named(
        self, tiny_copy: Path, value: float, dtype: type
    ) -> None:
        tensors = load_file(tiny_copy / "model.safetensors")
        tensors = {n: a.astype(dtype) for n, a in tensors.items()}
        tensors[EMBEDDING][300, 17] = value
        save_file(tensors, tiny_copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"'{EMBEDDING}' holds NaN or infinity"):
            open_checkpoint(tiny_copy)

    def test_an_index_may_not_leave_the_directory(self, tiny_copy: Path) -> None:
        (tiny_copy / "model.safetensors").rename(tiny_copy.parent / "outside.safetensors")
        for name in ("../outside.safetensors", str(tiny_copy.parent / "outside.safetensors"),
                     "a/../../outside.safetensors", "..", "", "x\0y"):  # fmt: skip
            index = {"weight_map": {NORM: name}}
            (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index))
            with pytest.raises(CheckpointError, match="plain name of a file"):
                open_checkpoint(tiny_copy)

    def test_a_packed_weight_needs_its_parts(self, tiny_directory: Path, tmp_path: Path) -> None:
        quantize(tiny_directory, tmp_path / "q", calibrate=None)
        gate = "model__layers__0__mlp__gate_proj"
        for change, message in (
            ({f"{gate}__scales": None}, r"gate_proj\.scales' is missing"),
            ({f"{gate}__biases": np.zeros((1, 3), np.float32)}, r"gate_proj\.biases' has shape"),
            ({f"{gate}__weight": np.zeros((128, 5), np.uint32)}, "expected .* words of 4-bit"),
        ):
            original = load_file(tmp_path / "q" / "model.safetensors")
            rewrite(tmp_path / "q", **change)
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(tmp_path / "q")
            save_file(original, tmp_path / "q" / "model.safetensors")
        for entry, message in (
            (None, "no quantization entry"),
            ({"group_size": 32, "bits": 3}, "3 bits"),
            ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mxfp4"),
            ({"group_size": 7, "bits": 4}, "group_size 7"),
        ):
            edit_json(tmp_path / "q" / "config.json", quantization=entry)
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(tmp_path / "q")

    def test_a_tensor_under_two_names_is_refused(self, tiny_copy: Path) -> None:
        norm = load_file(tiny_copy / "model.safetensors")[NORM]
        rewrite(tiny_copy, language_model__model__norm__weight=norm)
        with pytest.raises(CheckpointError, match="is there twice"):
            open_checkpoint(tiny_copy)

    def test_stop_ids_that_are_no_ids_are_refused(self, tiny_copy: Path) -> None:
        for value in ({}, [[1]], "1", [1.0]):
            (tiny_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
            with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
                open_checkpoint(tiny_copy)


class TestSaving:
    def test_what_is_saved_opens_as_the_same(self, tiny_directory: Path, tmp_path: Path) -> None:
        first = open_checkpoint(tiny_directory)
        second = open_checkpoint(save(first, tmp_path / "again"))
        assert second.digest() == first.digest()
        assert second.config == first.config
        assert second.tokenizer.model == first.tokenizer.model
        assert (tmp_path / "again" / "model.safetensors").stat().st_mode & 0o777 == 0o644

    def test_gemmas_terms_go_along_and_changes_are_listed(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        quantize(tiny_directory, tmp_path / "q", calibrate=None)
        notice = (tmp_path / "q" / "NOTICE").read_text()
        assert "Gemma Terms of Use" in notice
        assert "https://ai.google.dev/gemma/terms" in notice
        assert "- quantised to int4 in groups of 32, embedding int4" in notice
        again = save(open_checkpoint(tmp_path / "q"), tmp_path / "again")
        assert (again / "NOTICE").read_text() == notice

    def test_a_notice_that_came_with_the_weights_goes_on(
        self, tiny_copy: Path, tmp_path: Path
    ) -> None:
        (tiny_copy / "provenance.json").unlink()
        (tiny_copy / "NOTICE").write_text("Tuned by Example Ltd.")
        for i in range(2):  # and is not repeated
            tiny_copy = save(open_checkpoint(tiny_copy), tmp_path / f"copy{i}")
        notice = (tiny_copy / "NOTICE").read_text()
        assert notice.count("Tuned by Example Ltd.") == 1
        assert "Gemma Terms of Use" in notice

    def test_a_target_in_use_is_refused_and_kept(self, tiny_copy: Path) -> None:
        checkpoint = open_checkpoint(tiny_copy)
        before = sorted((p.name, p.read_bytes()) for p in tiny_copy.iterdir())
        with pytest.raises(OptionError, match="exists already"):
            save(checkpoint, tiny_copy)
        with pytest.raises(OptionError, match="exists already"):
            save(checkpoint, tiny_copy / "config.json")
        assert sorted((p.name, p.read_bytes()) for p in tiny_copy.iterdir()) == before

    def test_no_space_left_leaves_nothing(self, tiny_directory: Path, tmp_path: Path) -> None:
        """A limit on file size fails writes half-way as a full disk does."""
        checkpoint = open_checkpoint(tiny_directory)
        _ = checkpoint.tokenizer
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(CheckpointError, match=r"cannot be written.*nothing was written"):
                save(checkpoint, tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []

    def test_a_target_that_cannot_be_written_is_a_clear_error(self, tiny_directory: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(open_checkpoint(tiny_directory), "/proc/nowhere/model")

    def test_a_killed_save_leaves_no_half_model(self, tiny_directory: Path, tmp_path: Path) -> None:
        script = (
            "import os, signal, sys\n"
            "from gemma_multi.exporters import huggingface, save\n"
            "from gemma_multi.sources import open_checkpoint\n"
            "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
            "huggingface.write_json = die\n"
            "save(open_checkpoint(sys.argv[1]), sys.argv[2])\n"
        )
        target = tmp_path / "model"
        done = subprocess.run([sys.executable, "-c", script, str(tiny_directory), str(target)])
        assert done.returncode == -9
        assert not target.exists()
        open_checkpoint(save(open_checkpoint(tiny_directory), target))


def test_fuzzed_directories_are_refused_by_name_and_never_crash(
    tiny_directory: Path, tmp_path: Path
) -> None:
    """510 mutations of each kind, in processes that report every file they open (see
    fuzz_checkpoint.py)."""
    quantize(tiny_directory, tmp_path / "int4", calibrate=None)
    outcomes: Counter[str] = Counter()
    for i, source in enumerate([tiny_directory, tmp_path / "int4"] * 3):
        outcomes += fuzz("fuzz_checkpoint.py", source, tmp_path / f"work{i}", i, 170, timeout=300,
                         env={"PYTHONHASHSEED": "0"})  # fmt: skip
    assert sum(outcomes.values()) == 1020
    # a flipped bit inside the weights is another valid model; most mutations are not
    assert outcomes["refused"] > 760, outcomes
    assert set(outcomes) == {"refused", "opened"}
    assert issubclass(CheckpointError, GemmaError)
