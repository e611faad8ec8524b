"""Text to structure: a sentence about a party becomes a card.

python examples/specialists/structure.py
"""

from __future__ import annotations

import random

import specialist
from entities import DAYS, NAMES

PLACES = (
    "the garden",
    "the old lighthouse",
    "the harbour",
    "the library",
    "the bakery",
    "the park",
)
BRINGS = ("a cake", "a song", "three candles", "a story", "warm socks", "two pies", "some tea")
FORMS = (
    "{name} has a party in {place} on {day}. Everybody brings {bring}.",
    "On {day} there is a party for {name}. Bring {bring} and come to {place}.",
    "Come to {place} with {bring}: {name} has a party on {day}.",
    "Bring {bring}! {name} waits for you in {place} on {day}.",
)


def draw(rng: random.Random) -> specialist.Row:
    found = {"name": rng.choice(NAMES), "day": rng.choice(DAYS), "place": rng.choice(PLACES),
             "bring": rng.choice(BRINGS)}  # fmt: skip
    card = "\n".join(f"* {key.upper()}: {found[key]}" for key in ("day", "place", "name", "bring"))
    return {"prompt": f"Party card.\n{rng.choice(FORMS).format(**found)}", "completion": card}


if __name__ == "__main__":
    specialist.run("text to structure", *specialist.split(draw, 400, 60))
