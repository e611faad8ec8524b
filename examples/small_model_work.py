"""Classes, routes, facts and calls in one pass each, offline, on the bundled model.

    python examples/small_model_work.py

The storyteller learned these tasks, in these words. With another model, give it examples or
fine-tune it on some rows of yours.
"""

from typing import Literal

from pydantic import BaseModel

import gemma_multi

model = gemma_multi.load("storyteller")

# A class, and how likely each is: read from logits, not parsed from an answer. The instruction
# is read once for all texts.
reviews = ["The kettle broke after a week.", "My new lamp works perfectly. I love it.",
           "The parcel came on Tuesday."]  # fmt: skip
labels = ["positive", "negative", "neutral"]
asked = "What is the sentiment? Answer positive, negative or neutral."
for review, found in zip(reviews, model.classify(reviews, labels, asked), strict=True):
    print(f"{review:42} {found.label:9} {found.probability:.3f}")

# Rows without end, in order; one that fails is an error, and the others go on.
for row in model.batch([reviews[0], "", reviews[1]], "classify", labels=labels, instruction=asked):
    print(row.index, row.error or row.value.label)


# Facts out of a text, as an object of your own type. What comes out always fits it.
class Visit(BaseModel):
    person: str | None
    company: str | None
    place: str | None
    day: (
        Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"] | None
    )


visit = model.extract(
    "On Friday, Anna flew to Rome.", Visit,
    "Extract person, company, place and day as JSON.",
)  # fmt: skip
print(visit)

# Text of a shape: a choice, a regular expression, a grammar, a JSON Schema.
print(model.generate("Does it rain?", choices=["yes", "no", "nobody knows"], seed=1).text)
print(model.generate("When?", regex=r"(Mon|Tues|Fri)day, [1-9] o'clock", seed=1).text)


# A call of a function, with arguments of its types.
def set_timer(minutes: Literal[1, 5, 10], loud: bool) -> str:
    """Sets a timer.

    Args:
        minutes: How long it runs.
    """
    return f"a timer of {minutes} minutes, {'loud' if loud else 'quiet'}"


(call,) = model.generate("Wake me soon.", tools=[set_timer], tool_choice="set_timer", seed=2).calls
print(call.name, call.arguments, "->", set_timer(**call.arguments))

# Only the words that these texts need: the same answers from a smaller file.
small = gemma_multi.trim(model, [*reviews, asked, *labels], progress=False)
print(f"{model.config.vocab_size:,} pieces, or {small.config.vocab_size:,}:",
      gemma_multi.load(small).classify(reviews[0], labels, asked))  # fmt: skip
