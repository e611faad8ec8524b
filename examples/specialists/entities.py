"""Entity extraction: who comes when, and for what?

python examples/specialists/entities.py
"""

from __future__ import annotations

import json
import random

import specialist

NAMES = (
    "Anna Ben Carla David Emma Frank Grace Helen Ian Julia Kevin Laura Martin Nina Oliver Paula "
    "Robert Sarah Tom Ursula Victor Wendy Maria Peter Lucy Simon Alice James Sofia Daniel"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NEEDS = ("a haircut", "a new key", "a lamp", "two tickets", "a table", "a bicycle", "a coat")
FORMS = (
    "Hello, {name} here. I need {need} on {day} at {hour}.",
    "Please keep {need} for {name}, {day} at {hour}.",
    "{name} will come for {need} at {hour} on {day}.",
    "On {day} at {hour}, {name} wants {need}.",
    "Can {name} have {need} on {day}? At {hour}, please.",
)


def draw(rng: random.Random) -> specialist.Row:
    found = {
        "name": rng.choice(NAMES), "need": rng.choice(NEEDS), "day": rng.choice(DAYS),
        "hour": str(rng.randint(8, 18)),
    }  # fmt: skip
    text = rng.choice(FORMS).format(**found)
    return {"prompt": f"Note the appointment.\n{text}", "completion": json.dumps(found)}


if __name__ == "__main__":
    specialist.run("entity extraction", *specialist.split(draw, 400, 60))
