"""One model on two backends: python examples/same_answer_twice.py

Loads a model on MLX and on Keras and generates with one seed. Where the texts part, it shows how
close the two best tokens were: a tie is told from a bug.
"""

import sys

import numpy as np

import gemma_multi

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
prompt = """Extract person, company, place and day as JSON.
Text: Emma joined Globex in Oslo on Friday."""
mlx, keras = (gemma_multi.load(name, backend=b, precision="float32") for b in ("mlx", "keras"))
a, b = (m.generate(prompt, temperature=0, max_tokens=60) for m in (mlx, keras))
print(f"MLX:   {a.text}\nKeras: {b.text}")

same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
if a.tokens == b.tokens:
    print(f"the same {len(a.tokens)} tokens")
elif same is None:
    print("one text is the beginning of the other")
else:
    ids = [2, *a.tokens[:same]]
    best = np.sort(mlx.engine.session().prefill(ids)[0])[-2:]
    print(f"they part at token {same}, where the two best are {best[1] - best[0]:.1e} apart")
