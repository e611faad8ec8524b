"""Classes with their probabilities, read from logits and not parsed from a text:

    python examples/classify.py

The storyteller learned this task in these words, on toy rows. Another model is an argument, and
wants `examples=` or a fine-tune on some rows of yours: python examples/classify.py MODEL
"""

import sys

import gemma_multi

model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
reviews = [
    "The kettle broke after a week.",
    "My new lamp works perfectly. I love it.",
    "The parcel came on Tuesday.",
]
labels = ["positive", "negative", "neutral"]
asked = "What is the sentiment? Answer positive, negative or neutral."

# the instruction is read once for all texts
for review, found in zip(reviews, model.classify(reviews, labels, asked), strict=True):
    print(f"{review:42} {found.label:9} {found.probability:.3f}")

# rows without end, in order; one that fails is an error, and the others go on
for row in model.batch([reviews[0], "", reviews[1]], "classify", labels=labels, instruction=asked):
    print(row.index, row.error or row.value.label)
