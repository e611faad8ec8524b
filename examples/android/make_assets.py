"""Writes `app/src/main/assets/assistant.json`: all that the app says to the model, how the model
may answer, and how answers are sampled.

    python examples/android/make_assets.py

The app reads that file, and so do the tests, which ask LiteRT-LM the same on a desktop: the two
cannot drift apart. Change functions, labels or words here, run this, and give each function that
is new its code in `Functions.kt`.

Design choices:
- Functions are declared in the words of `model.chat(tools=...)`, so a model that was fine-tuned
  on calls with this package knows them.
- Calls and labels are constrained, so that even a model which never learned to call gives valid
  ones. JSON comes without spaces: LiteRT-LM 0.18 hands its grammar tokens as they are spelled, with
  `▁` for a space, so constrained text can hold none, and neither may a label or an argument.
"""

import json
from pathlib import Path
from typing import Literal

from gemma_multi.tools import read_tools
from gemma_multi.tools.json_calls import calls_schema, declaration

ASSETS = Path(__file__).parent / "app/src/main/assets/assistant.json"


def set_timer(minutes: Literal[1, 5, 10, 30]) -> None:
    """Starts the timer of the phone.

    Args:
        minutes: How long it runs.
    """


def set_flashlight(on: bool) -> None:
    """Switches the light of the camera on or off.

    Args:
        on: Whether it shines.
    """


LABELS = ["billing", "shipping", "returns", "technical", "account"]
FUNCTIONS = read_tools([set_timer, set_flashlight])
# LiteRT-LM has no greedy sampler; one candidate is the same
GREEDY = {"top_k": 1, "top_p": 1.0, "temperature": 1.0, "seed": 0}


def assistant() -> dict[str, object]:
    return {
        "chat": {
            "sampler": {"top_k": 64, "top_p": 0.95, "temperature": 0.7, "seed": 3},
            "max_tokens": 256,
            "suggestion": "Tell me a bedtime story.\nHero: Pip the hedgehog",
        },
        "functions": {
            "sampler": GREEDY,
            "max_tokens": 64,
            "system": declaration(FUNCTIONS),
            "schema": {**calls_schema(FUNCTIONS, 1), "x-guidance": {"whitespace_flexible": False}},
            "results": 'Results: [{"name": %name, "result": %result}]',
            "suggestion": "Wake me in five minutes, please.",
        },
        "classify": {
            "sampler": GREEDY,
            "max_tokens": 8,
            "prompt": f"Route the message to one of: {', '.join(LABELS)}.\nMessage: %text",
            "pattern": "|".join(LABELS),
            "suggestion": "Your parcel could not be delivered today.",
        },
    }


if __name__ == "__main__":
    ASSETS.write_text(json.dumps(assistant(), indent=2, ensure_ascii=False) + "\n", "utf-8")
