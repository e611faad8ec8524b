"""Which team should answer? A route with its probability, and what to do where it is low:

    python examples/route.py

The storyteller learned these teams in these words, on toy rows. Another model is an argument:
python examples/route.py MODEL
"""

import sys

import gemma_multi

model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
teams = {
    "billing": "invoices, charges and refunds",
    "shipping": "parcels and deliveries",
    "technical": "things that do not work",
    "sales": "prices and orders",
}
messages = [
    "I was charged twice for my lamp.",
    "Where is my parcel? It should be in Oslo.",
    "The app does not start.",
]
asked = "Which team should answer: billing, shipping, technical or sales?"
for message, found in zip(messages, model.route(messages, teams, asked), strict=True):
    to = found.label if found.probability > 0.6 else "a person"
    print(f"{message:44} {to:10} {found.probability:.3f}")
