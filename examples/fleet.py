"""Three specialists behind one router: adapters of one model, a few hundred kilobytes each.

    python examples/fleet.py

The base, which is loaded once, chooses a team, and that team's adapter answers. The rows are toys:
each team learns one answer by heart. Another model is an argument: python examples/fleet.py MODEL
"""

import sys
import tempfile
from pathlib import Path

import gemma_multi

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
rate = 5e-3 if name == "storyteller" else 2e-4
teams = {
    "billing": "invoices, charges and refunds",
    "shipping": "parcels and deliveries",
    "technical": "things that do not work",
}
learned = {
    "billing": (["I need my invoice.", "The refund is missing.", "I paid too much for a chair."],
                "Good morning. A letter is on the way."),
    "shipping": (["My parcel is late.", "The parcel came open.", "When will my table arrive?"],
                 "Good evening. The boat is late."),
    "technical": (["The screen stays dark.", "The app stopped.", "My lamp does not turn on."],
                  "Hello. Turn the key, and wait."),
}  # fmt: skip
messages = [
    "I was charged twice for my lamp.",
    "Where is my parcel? It should be in Oslo.",
    "The app does not start.",
]
asked = "Which team should answer: billing, shipping, technical or sales?"

with tempfile.TemporaryDirectory() as work:
    adapters = {}
    for team, (said, answer) in learned.items():
        rows = [{"prompt": message, "completion": answer} for message in said]
        run = gemma_multi.finetune(
            name, rows, Path(work, team), backend="keras", method="lora", epochs=25, batch_size=3,
            learning_rate=rate, max_length=64, validation=0,
        )  # fmt: skip
        adapters[team] = run.path()

    model = gemma_multi.load(name, backend="keras", adapter=adapters)
    for message in messages:
        model.switch_adapter(None)
        team = model.route(message, teams, asked).label
        model.switch_adapter(team)
        print(f"{message:42} {team:10} {model.generate(message, temperature=0).text}")
