"""Facts out of a text, as an object of your own pydantic type. What comes out always fits it:

    python examples/extract.py

The storyteller learned this task in these words, on toy rows. Another model is an argument:
python examples/extract.py MODEL
"""

import sys
from typing import Literal

from pydantic import BaseModel

import gemma_multi


class Visit(BaseModel):
    person: str | None
    company: str | None
    place: str | None
    day: (
        Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"] | None
    )


model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
asked = "Extract person, company, place and day as JSON."
print(model.extract("On Friday, Anna flew to Rome.", Visit, asked))

# other shapes of a text: a choice, a regular expression, a grammar, a JSON Schema
print(model.generate("Does it rain?", choices=["yes", "no", "nobody knows"], seed=1).text)
print(model.generate("When?", regex=r"(Mon|Tues|Fri)day, [1-9] o'clock", seed=1).text)
