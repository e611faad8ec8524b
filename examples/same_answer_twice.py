"""One model on every installed backend, compared: python examples/same_answer_twice.py [MODEL]

Compares weights, token ids, logits and texts on three prompts. Where texts part, it says how close
the two tokens were: a tie is told from a bug. Without `prompts` it takes a set of 69.
"""

import sys

import gemma_multi

report = gemma_multi.parity(
    sys.argv[1] if len(sys.argv) > 1 else "storyteller",
    precision="float32",
    prompts=[
        "Extract person, company, place and day as JSON.\nText: Emma joined Globex in Oslo.",
        "What is the sentiment? Answer positive, negative or neutral.\nText: 悪くない。",
        "Tell me a bedtime story.\nHero: Leo the bat\nSetting: a quiet forest\n"
        "Twist: the star was a lost firefly\nTheme: patience\nLength: short",
    ],
    max_tokens=100,
)
print(report)
sys.exit(not report.passed)
