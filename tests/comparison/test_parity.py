"""`gemma_multi.parity` and its report: what goes in, what is refused, what people get to see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import edit_json, tiny_checkpoint, tokenizer

import gemma_multi
from gemma_multi import BackendError, ContextError, OptionError, ParityReport, parity
from gemma_multi.comparison.prompts import Prompt, choose_prompts, shipped_prompts
from gemma_multi.comparison.tolerances import TOLERANCES
from gemma_multi.sources import BUNDLED

SHORT: dict[str, Any] = {"prompts": ["What is the sentiment?\nText: Good."], "max_tokens": 4}


def test_the_shipped_prompts_are_many_and_varied() -> None:
    prompts = shipped_prompts()
    assert len(prompts) >= 60
    assert len({p.language for p in prompts} - {"und", "mul", "zxx"}) >= 20
    kinds = {p.kind for p in prompts}
    assert {"code", "numbers", "emoji", "empty", "long", "past the window", "forged"} <= kinds
    assert len({p.name for p in prompts}) == len(prompts)


def test_long_prompts_pass_a_window_of_512_of_gemmas_own_tokens(
    gemma_tokenizer_directory: Path,
) -> None:
    from gemma_multi.chat_template import encode_prompt
    from gemma_multi.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(gemma_tokenizer_directory)
    lengths = [
        len(tokenizer.encode(p.content)) if isinstance(p.content, str)
        else len(encode_prompt(tokenizer, p.content))
        for p in shipped_prompts() if p.kind == "past the window"
    ]  # fmt: skip
    assert len(lengths) >= 4
    assert min(lengths) > 512


def test_a_report_says_what_was_compared_and_passes(report: ParityReport) -> None:
    assert report.passed
    assert report.failures == []
    text = str(report)
    assert "litert (int4 weights, int8 activations) against keras (int4 weights, float32" in text
    for level in ("weights", "tokens", "logits", "text", "layers"):
        assert f"  {level:<8} ok " in text
    assert "litert" in report.headline


def test_a_report_as_json_has_every_level_and_only_plain_numbers(report: ParityReport) -> None:
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    (comparison,) = data["comparisons"]
    assert data["passed"] is comparison["passed"] is True
    levels = comparison["levels"]
    assert set(levels) == {"weights", "tokens", "logits", "text", "layers"}
    assert levels["weights"]["sha256"][0] == levels["weights"]["sha256"][1]
    regions = levels["logits"]["by_region"]
    assert set(regions) == {"short", "at the window's edge", "past the window"}
    assert sum(region["positions"] for region in regions.values()) == levels["logits"]["positions"]
    assert comparison["allowed"]["logit"] is None  # any
    assert comparison["other"]["activations"] == "int8"
    assert len(levels["logits"]["by_prompt"]) == data["prompts"]
    assert list(levels["layers"]["drift"])[:2] == ["embedding", "layer 0 (sliding)"]


def test_an_exported_file_is_compared_with_its_source(tmp_path: Path) -> None:
    for name in ("phone.tflite", "phone.litertlm"):
        file = tmp_path / name
        gemma_multi.export("storyteller", file, context_length=256)
        found = parity("storyteller", ["keras"], against=file, **SHORT)
        (comparison,) = found.comparisons
        assert comparison.reference.name == name
        assert comparison.weights.passed
        assert not comparison.weights.different
        assert found.passed, found


def test_another_file_of_the_same_shape_is_told_by_its_weights(tmp_path: Path) -> None:
    """The wrong fine-tune under the right name."""
    gemma_multi.export(tiny_checkpoint(seed=1, vocab_size=4096), tmp_path / "other.tflite")
    found = parity(
        tiny_checkpoint(seed=0, vocab_size=4096), ["keras"], against=tmp_path / "other.tflite",
        precision="float32", prompts=["hi"], max_tokens=4,
    )  # fmt: skip
    assert not found.passed
    assert len(found.comparisons[0].weights.different) > 50
    assert any("weights" in failure for failure in found.failures)


def test_bfloat16_is_compared_as_bfloat16() -> None:
    found = parity("storyteller", ["keras", "keras:bfloat16"], precision="float32", **SHORT)
    (comparison,) = found.comparisons
    assert comparison.weights.compared_as == "bfloat16"
    assert not comparison.weights.different
    assert found.passed, found


def test_float32_weights_are_the_same_once_rounded() -> None:
    """Norms too, whose 1 + w is rounded twice on one side."""
    found = parity(
        tiny_checkpoint(vocab_size=4096), ["mlx", "mlx:bfloat16", "keras:bfloat16"],
        precision="float32", **SHORT,
    )  # fmt: skip
    for comparison in found.comparisons:
        assert comparison.weights.passed, comparison.weights.summary
        assert comparison.weights.compared_as == "bfloat16"


def test_what_a_model_only_reads_may_be_left_out() -> None:
    whole, answer = (
        parity("storyteller", ["keras", "mlx"], max_tokens=8, progress=False,
               prompts=[Prompt("it", "Once upon a time", only_answer=only)])
        for only in (False, True)
    )  # fmt: skip
    read = len(tokenizer().encode("Once upon a time")) + 1
    at = [report.comparisons[0].logits.positions for report in (whole, answer)]
    np.testing.assert_array_equal(at[1], at[0][read - 1 :])
    assert at[1][0] == read - 1
    assert answer.passed


def test_prompts_may_come_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufeffone\n\ntwo \u2028 still two\n")
    assert [p.content[0]["content"] for p in choose_prompts(lines)] == [
        "one",
        "two \u2028 still two",
    ]  # type: ignore[index]
    entries = tmp_path / "prompts.jsonl"
    entries.write_text(
        '{"text": "raw", "name": "r"}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    first, second = choose_prompts(entries)
    assert (first.name, first.raw, second.name, second.raw) == ("r", True, "prompt-2", False)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "the prompt set is empty"),
        (["a", " "], "prompt 1 is empty"),
        (["a", 5], "messages must be a list"),
        (7, "prompts is a int"),
        ("absent.jsonl", "absent.jsonl: prompts cannot be read: No such file"),
        ("prompts.csv", "come as .jsonl or .txt"),
        ("a\0.txt", "prompts cannot be read"),
        ([Prompt("a", "x"), Prompt("a", "y")], "two prompts are called 'a'"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parity("storyteller", prompts=prompts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[]", "line 2: expected an object with either 'messages' or 'text'"),
        ('{"text": ""}', "expected some text"),
        ('{"text": "a", "messages": []}', "either 'messages' or 'text'"),
        ('{"prompt": "a", "text": "b"}', "unknown key 'prompt'"),
        ('{"messages": [{"role": "model", "content": "a"}]}', "it is the turn of 'user'"),
        ('{"text": "a", "name": 3}', "3 is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(OptionError, match=r"p\.jsonl, line 2") as raised:
        parity("storyteller", prompts=file)
    assert words in str(raised.value)


def test_an_empty_file_is_never_a_pass(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(OptionError, match="the prompt set is empty"):
        parity("storyteller", prompts=tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backends": ["keras"]}, OptionError, "keras alone has nothing to be compared with"),
        ({"backends": []}, OptionError, "nothing alone has nothing"),
        ({"backends": ["keras", "keras"]}, OptionError, "'keras' is named twice"),
        ({"backends": ["keras", "tpu"]}, BackendError, "unknown backend 'tpu'"),
        ({"backends": ["keras", "mlx:int3"]}, OptionError, "unknown precision 'int3'"),
        ({"backends": ["auto", "mlx"]}, OptionError, "backends is 'auto', or a list of names"),
        ({"backends": "keras"}, OptionError, "expected 'auto' or a list"),
        ({"backends": None}, OptionError, "backends is None, expected 'auto' or a list"),
        ({"backends": ["keras", "keras:"]}, OptionError, "unknown precision ''"),
        ({"max_tokens": 0}, OptionError, "max_tokens is 0"),
        ({"prompts": ["word " * 3000]}, ContextError, "'prompt-1' is .* tokens long"),
        ({"against": "absent.tflite"}, gemma_multi.CheckpointError, "absent.tflite: no such file"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parity("storyteller", **options)


def test_a_backend_that_is_not_installed_is_passed_over_by_auto_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gemma_multi.engines import Backend

    missing = Backend.missing
    monkeypatch.setattr(
        Backend, "missing", lambda self: ["mlx.core"] if self.name == "mlx" else missing(self)
    )
    found = parity("storyteller", **SHORT)
    assert found.skipped == ("mlx",)
    assert "not installed: mlx" in str(found)
    with pytest.raises(BackendError, match=r"backend 'mlx' needs mlx\.core, not installed"):
        parity("storyteller", ["keras", "mlx"], **SHORT)


def test_different_models_are_told_apart_by_name(tiny_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"are different models: vocab_size is 4096 .* and 320"):
        parity("storyteller", ["keras"], against=tiny_copy, **SHORT)
    edit_json(tiny_copy / "config.json", sliding_window=17)
    with pytest.raises(OptionError, match="sliding_window is 16 in one and 17 in the other"):
        parity(tiny_checkpoint(), ["keras"], against=tiny_copy, **SHORT)


def test_different_stop_tokens_are_told_apart(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLED["storyteller"], tmp_path / "copy"))
    edit_json(copy / "generation_config.json", eos_token_id=[1, 106, 300])
    with pytest.raises(OptionError, match=r"stop at different tokens: \[1, 106\] and \[1, 106, 3"):
        parity("storyteller", ["keras"], against=copy, **SHORT)


def test_a_model_with_a_shorter_context_limits_both(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLED["storyteller"], tmp_path / "copy"))
    edit_json(copy / "config.json", max_position_embeddings=32)
    found = parity("storyteller", ["keras"], against=copy, prompts=["Hello there."], max_tokens=60)
    assert found.passed, found
    assert found.comparisons[0].logits.positions.max() <= 31


def test_the_hub_is_not_asked_for_what_is_compared_with_either() -> None:
    with pytest.raises(gemma_multi.HubError, match="nobody/nothing-here"):
        parity("storyteller", ["keras"], against="nobody/nothing-here", local_files_only=True)


def test_different_tokenizers_are_told_apart_by_piece(tiny_copy: Path) -> None:
    model = (tiny_copy / "tokenizer.model").read_bytes()
    old, new = b"\x0a\x04\xe2\x96\x81t", b"\x0a\x04\xe2\x96\x81Q"
    assert old in model
    (tiny_copy / "tokenizer.model").write_bytes(model.replace(old, new, 1))
    with pytest.raises(
        OptionError, match=r"different tokenizers: token .* is '▁t' in one and '▁Q'"
    ):
        parity(tiny_checkpoint(), ["keras"], against=tiny_copy, **SHORT)


def test_shipped_prompts_too_long_for_a_model_are_reported() -> None:
    found = parity(tiny_checkpoint(vocab_size=4096), ["keras", "mlx"], max_tokens=2)  # context 256
    assert "log-past" in found.left_out
    assert len(found.left_out) + len(found.prompts) == len(shipped_prompts())
    assert f"{len(found.left_out)} prompts are too long for this model" in str(found)
    assert found.passed, found


def test_every_tolerance_has_a_reason_and_bounds_that_can_be_missed() -> None:
    for pair, allowed in TOLERANCES.items():
        assert len(allowed.reason) > 40, pair
        assert 0 < allowed.divergence < 0.1
        assert 0.9 < allowed.top1 < 1
        assert np.isfinite([allowed.tie, allowed.hidden, allowed.weight]).all()
