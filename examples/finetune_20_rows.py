"""Twenty rows, a minute, and a model that speaks like an old lighthouse keeper:

    python examples/finetune_20_rows.py

The rows are toys, and overfitting is wanted. The result is int4, and what was trained is what
ships. Another model is an argument: python examples/finetune_20_rows.py google/gemma-3-270m-it
"""

import sys
import tempfile
from pathlib import Path

import gemma_multi

sys.path.append(str(Path(__file__).parent / "specialists"))
from voice import EXAMPLES

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
rows = [{"prompt": question, "completion": answer} for question, answer in EXAMPLES.items()]
# the storyteller, 77 times smaller than Gemma, takes larger steps
rate = 2e-3 if name == "storyteller" else 5e-5

with tempfile.TemporaryDirectory() as work:
    result = gemma_multi.finetune(
        name, rows, Path(work, "keeper"), epochs=14, batch_size=5, learning_rate=rate,
        schedule="cosine", max_length=64, validation=0,
    )  # fmt: skip
    before = gemma_multi.load(name)
    for question in ("Who are you?", "Good night.", "Do you like cats?"):  # the last is a new one
        print(question)
        for when, model in (("before", before), ("after", result.model)):
            answer = model.generate(question, temperature=0, max_tokens=40).text.strip()
            print(f"  {when:6} {answer}")
