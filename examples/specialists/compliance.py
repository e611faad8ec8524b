"""Compliance check: which sentence of an advert promises too much?

python examples/specialists/compliance.py
"""

from __future__ import annotations

import random

import specialist

GOODS = ("tea", "lamp", "soap", "bread", "coat", "chair", "clock", "honey", "pillow", "candle")
FINE = (
    "Our {thing} is made by hand.", "The {thing} comes in a brown box.", "Ask for the {thing}.",
    "The {thing} is back in the shop.", "You will find the {thing} near the door.",
    "The {thing} is new this week.",
)  # fmt: skip
TOO_MUCH = {
    "health": ("The {thing} heals a cold.", "With this {thing} you will never be ill.",
               "The {thing} makes you young again."),
    "money": ("The {thing} will make you rich.", "You get your money back twice.",
              "Sell the {thing} and double your money."),
    "hurry": ("Only today!", "Tomorrow it is too late.", "This is the last {thing} in the world."),
}  # fmt: skip


def draw(rng: random.Random) -> specialist.Row:
    thing = rng.choice(GOODS)
    sentences = rng.sample(FINE, rng.choice((2, 3)))
    kind = rng.choice((*TOO_MUCH, "fine"))
    answer = "may be printed"
    if kind != "fine":
        bad = rng.choice(TOO_MUCH[kind])
        sentences.insert(rng.randint(0, len(sentences)), bad)
        answer = f"stop ({kind}): {bad}"
    return {
        "prompt": f"Check the advert.\n{' '.join(sentences)}".format(thing=thing),
        "completion": answer.format(thing=thing),
    }


if __name__ == "__main__":
    specialist.run("compliance check", *specialist.split(draw, 400, 60))
