"""Sentiment: what did a guest think of each side of a hotel?

python examples/specialists/sentiment.py
"""

from __future__ import annotations

import random

import specialist

SAYS = {
    "room": {
        "good": "the room was quiet,the bed was soft,the room was warm and clean",
        "bad": "the room was cold,the bed was hard,the room was dark and small",
    },
    "food": {
        "good": "the soup was hot and good,the bread was fresh,breakfast was very good",
        "bad": "the soup was cold,the bread was old,breakfast was very bad",
    },
    "staff": {
        "good": "everybody was kind to us,they helped us with the bags,they laughed with us",
        "bad": "nobody was kind to us,they forgot our bags,they did not say a word",
    },
}
OPENINGS = ("We stayed for two nights:", "Well,", "Last week", "I will say this:", "As for us,")


def draw(rng: random.Random) -> specialist.Row:
    chosen = rng.sample(list(SAYS), rng.choice((1, 2, 3)))
    moods = {side: rng.choice(("good", "bad")) for side in chosen}
    said = [rng.choice(SAYS[side][mood].split(",")) for side, mood in moods.items()]
    answer = ", ".join(f"{side} {moods.get(side, 'not said')}" for side in SAYS)
    return {
        "prompt": f"Room, food, staff?\nGuest: {rng.choice(OPENINGS)} {' and '.join(said)}.",
        "completion": answer,
    }


if __name__ == "__main__":
    specialist.run("sentiment", *specialist.split(draw, 400, 60))
