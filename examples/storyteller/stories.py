"""The storyteller's bedtime stories: a small grammar with five controls.

Design choices:
- A story is drawn from a `random.Random`, so (seed, index) names one story for ever.
- What the controls promise the text keeps: every story says the hero's name, the setting
  and the twist in the words of the prompt, which is what `mentions` checks.
- A twist carries its own foreshadowing and its own aftermath. The twist is where a generated
  story most easily stops making sense, so it is never assembled from unrelated parts.
- Some combinations of hero, setting and twist are held out of training by a hash
  (`is_held_out`), never by a list, so that training needs no memory of what it has seen.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from world import (
    BOYS,
    CLOSINGS,
    EVENINGS,
    FEATURES,
    FEELINGS,
    GIRLS,
    KINDS,
    OPENINGS,
    REVEALS,
    SCENES,
    SETTINGS,
    THEMES,
    TRAITS,
    TWISTS,
)

LENGTHS = ("short", "medium", "long")
HELD_OUT_SHARE = 12  # one combination of hero, setting and twist in this many


@dataclass(frozen=True)
class Controls:
    """The five things a listener chooses."""

    hero: str  # "Pip the hedgehog"
    setting: str  # "an old lighthouse by the sea"
    twist: str  # "the monster was a hungry kitten"
    theme: str
    length: str

    @property
    def name(self) -> str:
        return self.hero.split(" the ")[0]

    def prompt(self, style: int = 0) -> str:
        """The user's turn. `style` picks one of the phrasings the model was trained on."""
        lines = (
            f"Hero: {self.hero}\nSetting: {self.setting}\nTwist: {self.twist}\n"
            f"Theme: {self.theme}\nLength: {self.length}"
        )
        return f"{PROMPT_OPENINGS[style]}\n{lines}"


PROMPT_OPENINGS = (
    "Tell me a bedtime story.",
    "Tell a bedtime story.",
    "Please tell a bedtime story.",
    "Write a bedtime story.",
    "I would like a bedtime story.",
)


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def tell(controls: Controls, rng: random.Random) -> str:
    """One story for these controls; 5 to 7 sentences when short, 15 to 17 when long."""
    kind = controls.hero.split(" the ")[1]
    feature, moved = KINDS[kind]
    preposition, *details = SETTINGS[controls.setting]
    omens, aftermaths = TWISTS[controls.twist]
    wants, middles, lessons = THEMES[controls.theme]
    details = rng.sample(details, 3)
    first_middle, second_middle = rng.sample(middles, 2)
    scenes = rng.sample(SCENES, 3)
    pick = rng.choice

    opening, want, omen, reveal = pick(OPENINGS), pick(wants), pick(omens), pick(REVEALS)
    after, lesson, closing = pick(aftermaths), pick(lessons), pick(CLOSINGS)
    if controls.length == "short":
        paragraphs = [[opening, omen], [first_middle, reveal, after], [lesson, closing]]
    elif controls.length == "medium":
        paragraphs = [
            [opening, details[0], want],
            [omen, first_middle, scenes[0]],
            [reveal, pick(FEELINGS), after],
            [lesson, closing],
        ]
    else:
        paragraphs = [
            [opening, pick(FEATURES), details[0], details[1], want],
            [omen, first_middle, scenes[0], scenes[1]],
            [second_middle, reveal, pick(FEELINGS), after],
            [pick(EVENINGS), lesson, closing],
        ]
    words = {
        "name": controls.name,
        "kind": kind,
        "a_trait": article(pick(TRAITS)),
        "feature": feature,
        "moved": moved,
        "setting": controls.setting,
        "prep": preposition,
        "Prep": preposition.capitalize(),
        "twist": controls.twist,
    }
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs).format(**words)


def draw_controls(rng: random.Random) -> Controls:
    """Any five controls. Two names in five are made up, so that names are copied, not recalled."""
    name = rng.choice(GIRLS + BOYS) if rng.random() < 0.6 else _made_up_name(rng)
    return Controls(
        hero=f"{name} the {rng.choice(list(KINDS))}",
        setting=rng.choice(list(SETTINGS)),
        twist=rng.choice(list(TWISTS)),
        theme=rng.choice(list(THEMES)),
        length=rng.choice(LENGTHS),
    )


def _made_up_name(rng: random.Random) -> str:
    onsets = "b br d dr f g gr h j k l m n p r s sh t tr v w z".split()
    nuclei, codas = "a e i o u oo".split(), "l m n r x b sh".split()
    syllables = [rng.choice(onsets) + rng.choice(nuclei) for _ in range(rng.choice((1, 2, 2)))]
    return ("".join(syllables) + rng.choice(codas)).capitalize()


def is_held_out(controls: Controls) -> bool:
    key = f"{controls.hero}|{controls.setting}|{controls.twist}".encode()
    return hashlib.sha256(key).digest()[0] % HELD_OUT_SHARE == 0


def held_out_controls(count: int, seed: int = 0) -> list[Controls]:
    """`count` different held-out combinations, the same for a seed on every machine."""
    rng, found = random.Random(f"held out {seed}"), dict[Controls, None]()
    while len(found) < count:
        controls = draw_controls(rng)
        if is_held_out(controls):
            found[controls] = None
    return list(found)


def mentions(controls: Controls, story: str) -> dict[str, bool]:
    """Whether the story names what its controls asked for."""
    text = story.lower()
    return {
        "hero": controls.name.lower() in text,
        "setting": controls.setting.lower() in text,
        "twist": controls.twist.lower() in text,
    }


FOLLOW_UPS = (
    ("Who was the hero?", "{hero}."),
    ("What was the hero called?", "{name}."),
    ("Where did it happen?", "{Prep} {setting}."),
    ("What was the twist?", "That {twist}."),
    ("What was the story about?", "{Theme}."),
    ("Thank you!", "You are welcome. Sleep well!"),
    ("Good night.", "Good night, and sweet dreams."),
)


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """A story, now and then followed by a question about it."""
    controls = draw_controls(rng)
    while is_held_out(controls):
        controls = draw_controls(rng)
    style = rng.choice((0, 0, 1, 2, 3, 4))
    turns = [
        {"role": "user", "content": controls.prompt(style)},
        {"role": "model", "content": tell(controls, rng)},
    ]
    if rng.random() < 0.3:
        question, answer = rng.choice(FOLLOW_UPS)
        answer = answer.format(
            hero=controls.hero,
            name=controls.name,
            setting=controls.setting,
            Prep=SETTINGS[controls.setting][0].capitalize(),
            twist=controls.twist,
            Theme=controls.theme.capitalize(),
        )
        turns += [{"role": "user", "content": question}, {"role": "model", "content": answer}]
    return turns
