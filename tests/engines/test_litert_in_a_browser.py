"""A file for GPUs in a browser: Google's LiteRT for the web, on WebGPU and in WebAssembly."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import WEBGPU, in_a_browser
from other_peoples_files import litert_js

import gemma_multi
from gemma_multi.chat_template import encode_turn, open_turn

PROMPT = "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea"
COUNT = 16


@pytest.mark.parametrize("accelerator", ["webgpu", "wasm"])
def test_the_same_file_gives_the_same_tokens(tmp_path: Path, accelerator: str) -> None:
    file = tmp_path / "model.tflite"
    gemma_multi.export("storyteller", file, target="gpu", context_length=256)
    model = gemma_multi.load("storyteller", backend="keras")
    expected = model.chat().send(PROMPT, temperature=0, max_tokens=COUNT).tokens
    turn = encode_turn(model.tokenizer, "user", PROMPT)
    prompt = [model.tokenizer.bos_id, *turn, *open_turn(model.tokenizer, "model")]
    job = {"accelerator": accelerator, "prompt": prompt, "count": COUNT}
    (tmp_path / "litert").symlink_to(litert_js())
    told = in_a_browser(tmp_path, Path(__file__).with_name("in_a_browser.html"), job, *WEBGPU)
    assert tuple(told["tokens"]) == expected
    assert told["whole"] or accelerator == "wasm"
