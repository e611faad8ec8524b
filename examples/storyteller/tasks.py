"""The storyteller's short tasks: five small jobs with one right answer each.

Sentiment, entity extraction to JSON, query routing, text to structure and compliance check:
the jobs the Gemma 3 270M family is meant to be fine-tuned into. Each draw gives a prompt and
its answer from one grammar, so the answer is right by construction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A kind of task and one drawn example of it."""

    kind: str
    prompt: str
    answer: str

    def conversation(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.prompt},
            {"role": "model", "content": self.answer},
        ]


PEOPLE = (
    "Anna Ben Carla David Emma Frank Grace Helen Ian Julia Kevin Laura Martin Nina Oliver Paula "
    "Robert Sarah Tom Ursula Victor Wendy Maria Peter Lucy Simon Alice James Sofia Daniel"
).split()
SURNAMES = (
    "Miller Brown Novak Garcia Schmidt Rossi Tanaka Kim Silva Jensen Cooper Walsh Moreau Okafor "
    "Patel Berg Young Fischer Lopez Kowalski"
).split()
PLACES = (
    "Paris London Berlin Madrid Rome Vienna Prague Oslo Lisbon Dublin Tokyo Sydney Toronto Boston "
    "Chicago Cairo Nairobi Lima Delhi Seoul"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COMPANIES = (
    "Acme Northwind Globex Initech Umbra Bluebird Redwood Silverline Oakfield Starling"
).split()
PRODUCTS = (
    "headphones camera kettle laptop backpack lamp chair phone printer jacket blender watch "
    "keyboard tent bicycle umbrella"
).split()

GOOD = (
    "works perfectly,looks beautiful,arrived a day early,is worth every penny,made my day,"
    "feels solid,is easy to use,is better than I hoped,never lets me down,is simply great"
).split(",")
BAD = (
    "broke after a week,arrived late and scratched,is a waste of money,stopped working,"
    "feels cheap,is far too loud,never worked,is worse than the old one,smells awful,"
    "let me down"
).split(",")
FLAT = (
    "came in a brown box,is the blue one,was delivered on {day},has two buttons,"
    "is for my sister,comes with a manual,weighs about a kilo,is the same as last year"
).split(",")
LOVE = "I love it.,Highly recommended.,I would buy it again.,Five stars.,I am very happy.".split(
    ","
)
HATE = "I want my money back.,Never again.,Very disappointed.,One star.,I am so angry.".split(",")
SHRUG = (
    "That is all I can say.,I have not tried it yet.,No opinion so far.,It is what it is.".split(
        ","
    )
)


def sentiment(rng: random.Random) -> Task:
    label = rng.choice(("positive", "negative", "neutral"))
    says, ends = {"positive": (GOOD, LOVE), "negative": (BAD, HATE), "neutral": (FLAT, SHRUG)}[
        label
    ]
    item = rng.choice(PRODUCTS)
    subject = rng.choice((f"The {item}", f"My new {item}", f"This {item}", f"The {item} I ordered"))
    first, second = rng.sample(says, 2)
    text = rng.choice(
        (
            f"{subject} {first}.",
            f"{subject} {first}. {rng.choice(ends)}",
            f"{subject} {first} and {second}.",
            f"{rng.choice(ends)} {subject} {first}.",
        )
    ).format(day=rng.choice(DAYS))
    ask = "What is the sentiment? Answer positive, negative or neutral."
    return Task("sentiment", f"{ask}\nText: {text}", label)


def entities(rng: random.Random) -> Task:
    person = rng.choice(PEOPLE) + (f" {rng.choice(SURNAMES)}" if rng.random() < 0.5 else "")
    place, day, company = rng.choice(PLACES), rng.choice(DAYS), rng.choice(COMPANIES)
    verb = rng.choice(("met", "joined", "visited", "called", "left", "signed with"))
    text, found = rng.choice(
        (
            (f"{person} {verb} {company} in {place} on {day}.", (person, company, place, day)),
            (f"On {day}, {person} flew to {place}.", (person, None, place, day)),
            (f"{company} opened an office in {place}.", (None, company, place, None)),
            (f"{person} works for {company}.", (person, company, None, None)),
            (f"{person} will be in {place} until {day}.", (person, None, place, day)),
            (f"On {day} {company} hired {person}.", (person, company, None, day)),
        )
    )
    keys = ("person", "company", "place", "day")
    answer = json.dumps(dict(zip(keys, found, strict=True)))
    ask = "Extract person, company, place and day as JSON."
    return Task("entities", f"{ask}\nText: {text}", answer)


ROUTES = {
    "billing": (
        "I was charged twice for my {item}",
        "Why is my invoice higher this month",
        "My card was declined when I paid for the {item}",
        "Please send me the receipt for the {item}",
        "I do not understand this bill",
    ),
    "shipping": (
        "Where is my {item}",
        "My parcel has not arrived yet",
        "Can you deliver the {item} on {day}",
        "The tracking number does not work",
        "How long does delivery to {place} take",
    ),
    "returns": (
        "I want to send the {item} back",
        "How do I return my {item}",
        "The {item} does not fit, can I swap it",
        "I would like a refund for the {item}",
        "Can I exchange the {item} for another colour",
    ),
    "technical": (
        "The {item} does not turn on",
        "The app crashes when I open it",
        "How do I connect my {item} to the internet",
        "The screen of my {item} stays black",
        "I get an error when I start the {item}",
    ),
    "account": (
        "I forgot my password",
        "How do I change my email address",
        "Please delete my account",
        "I cannot log in any more",
        "Somebody else is using my account",
    ),
}


def routing(rng: random.Random) -> Task:
    route = rng.choice(list(ROUTES))
    words = {"item": rng.choice(PRODUCTS), "day": rng.choice(DAYS), "place": rng.choice(PLACES)}
    text = rng.choice(ROUTES[route]).format(**words)
    lead = rng.choice(("", "", "Hello, ", "Hi there. ", "Excuse me, "))
    tail = rng.choice((".", "?", "!", ". Thanks.", ", please help."))
    ask = f"Route the message to one of: {', '.join(ROUTES)}."
    return Task("routing", f"{ask}\nMessage: {lead}{text}{tail}", route)


NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
GOODS = (
    "apple pear plum lemon onion carrot egg loaf pie bun cake cookie pencil candle button brick "
    "ticket bottle cup plate"
).split()


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else ("loaves" if noun == "loaf" else noun + "s")


def structure(rng: random.Random) -> Task:
    names = rng.sample(GOODS, rng.choice((1, 2, 2, 3)))
    counts = [rng.randint(1, 12) for _ in names]
    said = [
        f"{NUMBERS[n - 1] if rng.random() < 0.5 else n} {_plural(noun, n)}"
        for noun, n in zip(names, counts, strict=True)
    ]
    listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    person = rng.choice(PEOPLE)
    text = rng.choice(
        (
            f"{person} would like {listed}.",
            f"Please send {listed} to {person}.",
            f"{listed.capitalize()} for {person}, please.",
            f"This is {person}. I need {listed}.",
        )
    )
    rows = "\n".join(f"{noun}: {n}" for noun, n in zip(names, counts, strict=True))
    ask = "Turn the order into lines of the form item: count."
    return Task("structure", f"{ask}\nOrder: {text}", f"customer: {person}\n{rows}")


RULES = {
    "no phone numbers": ("Call me at {number}", "My number is {number}", "Text {number} for news"),
    "no email addresses": ("Write to {mail}", "Send the file to {mail}", "My address is {mail}"),
    "no promises of profit": (
        "You will double your money",
        "Profit is guaranteed",
        "You cannot lose with this plan",
    ),
    "no shouting": ("BUY THIS NOW", "THIS IS THE LAST CHANCE", "DO NOT MISS IT"),
    "no names of customers": ("{person} bought the {item}", "We sold the {item} to {person}"),
}
HARMLESS = (
    "Our shop opens at nine",
    "The {item} is back in stock",
    "Thank you for your visit",
    "Delivery takes about three days",
    "The meeting was moved to {day}",
    "We have offices in {place}",
)


def compliance(rng: random.Random) -> Task:
    rule = rng.choice(list(RULES))
    person = rng.choice(PEOPLE)
    words = {
        "number": f"{rng.randint(200, 999)} {rng.randint(1000, 9999)}",
        "mail": f"{person.lower()}@{rng.choice(COMPANIES).lower()}.com",
        "person": f"{person} {rng.choice(SURNAMES)}",
        "item": rng.choice(PRODUCTS),
        "day": rng.choice(DAYS),
        "place": rng.choice(PLACES),
    }
    guilty = rng.random() < 0.5
    sentences = rng.sample(HARMLESS, rng.choice((1, 2)))
    if guilty:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(RULES[rule]))
    elif rng.random() < 0.5:  # breaks a rule, but not the one that was asked about
        other = rng.choice([r for r in RULES if r != rule and "names" not in r])
        if rule != "no names of customers" or other != "no email addresses":
            sentences.append(rng.choice(RULES[other]))
    text = ". ".join(sentences).format(**words) + "."
    answer = f"violation: {rule}" if guilty else "ok"
    ask = f"Does the text follow the rule? Rule: {rule}."
    return Task("compliance", f"{ask}\nText: {text}", answer)


TASKS: tuple[Callable[[random.Random], Task], ...] = (
    sentiment,
    entities,
    routing,
    structure,
    compliance,
)


def draw_task(rng: random.Random) -> Task:
    """Any task; `structure`, whose answers are the longest to get right, twice as often."""
    return rng.choice((*TASKS, structure))(rng)
