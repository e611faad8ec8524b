"""Which models a server has: by name, with their adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from served.servers import serving
from tiny import tiny_checkpoint
from training.test_adapters import random_adapter

import gemma_multi
from gemma_multi import OptionError
from gemma_multi.cli import cli
from gemma_multi.exporters import save
from gemma_multi.exporters.peft import save_adapter


def test_adapters_are_models_of_their_own(tmp_path: Path) -> None:
    """On LiteRT, where other weights need another engine."""
    path = save(tiny_checkpoint(vocab_size=4096), tmp_path / "tiny")
    adapter = save_adapter(random_adapter(0), tmp_path / "a")
    model = gemma_multi.load(path, backend="litert", precision="float32", adapter=adapter)
    with serving(str(path), "--precision", "float32", "--adapter", f"pirate={adapter}") as server:
        client = server.client()
        assert [one.id for one in client.models.list()] == ["tiny", "pirate"]
        for name, own in (("pirate", "a"), ("tiny", None), ("pirate", "a")):
            said = client.completions.create(model=name, prompt="Once upon", temperature=0)
            alone = model.switch_adapter(own).generate(
                "Once upon", raw=True, temperature=0, max_tokens=16
            )
            assert said.choices[0].text == alone.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x=storyteller", "x=storyteller"], "two are called 'x'"),
        (["=storyteller"], "has no name or path"),
        (["storyteller", "--adapter", "pirate"], "expected NAME=DIRECTORY"),
        (["storyteller", "--adapter", "other/pirate=a"], "of one of storyteller"),
        (["storyteller", "--adapter", "storyteller=a"], "another model is called 'storyteller'"),
        (["--port", "70000"], "port is 70000"),
        (["--parallel", "0"], "parallel is 0"),
        (["--seconds", "0"], "seconds is 0"),
        (["--api-key", "schlüssel"], "api_key is empty, or holds more than ASCII"),
        (["--host", "0.0.0.0"], "others can reach: set an API key"),
        (["--host", "example.org"], "others can reach: set an API key"),
        (["--port", "0", "no/such/model"], "no/such/model"),
    ],
)
def test_what_is_refused_before_it_listens(arguments: list[str], message: str) -> None:
    with pytest.raises(gemma_multi.GemmaError, match=message) as refused:
        cli.main(["serve", *arguments], standalone_mode=False)
    assert isinstance(refused.value, OptionError) or "no/such" in message
