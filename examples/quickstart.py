"""The whole API in a minute, offline, on the bundled model: python examples/quickstart.py

Pass another model, such as google/gemma-3-270m-it, as an argument.
"""

import sys

import gemma_multi

model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
print(f"{model.config.num_parameters:,} parameters on {model.backend}\n")

# One prompt, one answer. The same seed gives the same text on every backend.
prompt = """Tell me a bedtime story.
Hero: Luna the owl
Setting: a library with a thousand doors
Twist: the voice was an echo
Theme: friendship
Length: short"""
result = model.generate(prompt, seed=1)
print(result.text)
print(f"\n[{result.generated_tokens} tokens, stopped by: {result.finish_reason}]\n")

# The same as it is generated; closing the stream would stop it.
for piece in model.stream("What is the sentiment? Answer positive, negative or neutral.\n"
                          "Text: The lamp works perfectly. I love it.", temperature=0):  # fmt: skip
    print(piece, end="", flush=True)
print("\n")

# A conversation keeps its turns, and reads each of them once.
chat = model.chat()
chat.send(prompt, seed=1)
print(chat.send("Who was the hero?", temperature=0).text)

# How likely does the model find a text?
for text in ("Once upon a time, there lived an owl.", "Owl a lived there time, a upon once."):
    print(f"perplexity {model.score(text).perplexity:8.1f}  {text}")
