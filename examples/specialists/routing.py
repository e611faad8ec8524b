"""Query routing: which part of the house is meant?

python examples/specialists/routing.py
"""

from __future__ import annotations

import random

import specialist

ROUTES = {
    "light": ("make it brighter", "it is too dark here", "I want to read", "turn the lamp on"),
    "heating": ("I am cold", "it is too warm", "make it warmer", "it is like winter in here"),
    "music": ("play a song", "I want to dance", "sing me something", "it is too quiet"),
    "door": ("somebody is knocking", "is the door open", "let my friend in", "I am home"),
    "kitchen": ("I am hungry", "make some tea", "the soup is boiling", "bake the bread"),
}
PLACES = ("in the kitchen", "in the garden", "upstairs", "in my room", "down here", "in the hall")
LEADS = ("", "", "Please, ", "Hello, ", "Now, ", "Listen, ", "Oh dear, ", "My friend, ")


def draw(rng: random.Random) -> specialist.Row:
    route = rng.choice(list(ROUTES))
    said = rng.choice(ROUTES[route])
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.6 else ""
    text = f"{rng.choice(LEADS)}{said}{place}"
    return {"prompt": f"House: {text[0].upper()}{text[1:]}.", "completion": f"-> {route}"}


if __name__ == "__main__":
    specialist.run("query routing", *specialist.split(draw, 400, 60))
