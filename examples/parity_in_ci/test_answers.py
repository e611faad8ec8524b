"""The same answers on both backends, as a test of yours: pytest examples/parity_in_ci

`gemma_parity` comes with the package. Put your own model, your backends and the prompts that your
application sends in their place; without `prompts` it takes the 69 that come along.
"""

from pathlib import Path
from typing import Any

MODEL = "storyteller"
PROMPTS = Path(__file__).with_name("prompts.txt")


def test_what_was_trained_is_what_ships(gemma_parity: Any) -> None:
    gemma_parity(MODEL, ["keras", "litert"], prompts=PROMPTS, max_tokens=100)
