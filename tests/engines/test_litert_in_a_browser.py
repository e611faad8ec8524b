"""A file for GPUs in a browser: Google's LiteRT for the web, on WebGPU and in WebAssembly."""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import Handler, browse, served
from other_peoples_files import litert_js

import gemma_multi
from gemma_multi.chat_template import encode_turn, open_turn

PROMPT = "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea"
COUNT = 16
_WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
           "--use-vulkan=swiftshader", "--ignore-gpu-blocklist")  # fmt: skip


@pytest.mark.parametrize("accelerator", ["webgpu", "wasm"])
def test_the_same_file_gives_the_same_tokens(tmp_path: Path, accelerator: str) -> None:
    file = tmp_path / "model.tflite"
    gemma_multi.export("storyteller", file, target="gpu", context_length=256)
    model = gemma_multi.load("storyteller", backend="keras")
    expected = model.chat().send(PROMPT, temperature=0, max_tokens=COUNT).tokens
    turn = encode_turn(model.tokenizer, "user", PROMPT)
    prompt = [model.tokenizer.bos_id, *turn, *open_turn(model.tokenizer, "model")]
    (tmp_path / "job.json").write_text(
        json.dumps({"accelerator": accelerator, "prompt": prompt, "count": COUNT})
    )
    told = in_a_browser(tmp_path, *_WEBGPU)
    assert "error" not in told, told["error"]
    assert tuple(told["tokens"]) == expected
    assert told["whole"] or accelerator == "wasm"


def in_a_browser(folder: Path, *flags: str) -> dict[str, Any]:
    """What the page tells of the model in this folder."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    shutil.copy(Path(__file__).with_name("in_a_browser.html"), folder / "index.html")
    (folder / "litert").symlink_to(litert_js())

    class Listener(Handler):
        def do_POST(self) -> None:
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with served(folder, Listener) as address, browse(address, folder / "profile", *flags) as page:
        try:
            return told.get(timeout=240)
        except queue.Empty:
            page.kill()
            pytest.fail(f"the page told nothing: {page.communicate()[1][-2000:]}")
        finally:
            page.kill()
