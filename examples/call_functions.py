"""A call of a Python function, with arguments of its types, and what it gave told to the model:

    python examples/call_functions.py

The storyteller never learned to call anything: its calls are valid, and drawn by lot, so it is
told which. FunctionGemma chooses by itself, with tool_choice="auto". Another model is an argument:
python examples/call_functions.py google/functiongemma-270m-it
"""

import sys
from typing import Literal

import gemma_multi


def set_timer(minutes: Literal[1, 5, 10], loud: bool) -> str:
    """Sets a timer.

    Args:
        minutes: How long it runs.
        loud: Whether it rings.
    """
    return f"a timer of {minutes} minutes, {'loud' if loud else 'quiet'}"


def turn_off_the_light(room: Literal["kitchen", "bedroom"]) -> str:
    """Turns off the light in a room."""
    return f"the {room} is dark"


functions = {f.__name__: f for f in (set_timer, turn_off_the_light)}
model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
chat = model.chat(tools=list(functions.values()))
said = chat.send("Wake me in five minutes, please.", tool_choice="set_timer", seed=2)
results = [functions[call.name](**call.arguments) for call in said.calls]
for call, result in zip(said.calls, results, strict=True):
    print(call.name, call.arguments, "->", result)
print("the model:", chat.reply(results, tool_choice="none", seed=2, max_tokens=5).text)
