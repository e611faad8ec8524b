"""A model, a prompt, a text:

    python examples/hello.py

The bundled storyteller knows bedtime stories and little else. Another model, such as
google/gemma-3-270m-it, is an argument: python examples/hello.py MODEL
"""

import sys

import gemma_multi

model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
print(f"{model.config.num_parameters:,} parameters on {model.backend}\n")

prompt = """Tell me a bedtime story.
Hero: Luna the owl
Setting: a library with a thousand doors
Twist: the voice was an echo
Theme: friendship
Length: short"""
# the same seed gives the same text on every backend
result = model.generate(prompt, seed=1)
print(result.text)
print(f"\n[{result.generated_tokens} tokens, stopped by: {result.finish_reason}]")

# how likely does the model find a text?
for text in ("Once upon a time, there lived an owl.", "Owl a lived there time, a upon once."):
    print(f"perplexity {model.score(text).perplexity:8.1f}  {text}")
