"""A text as it comes, stopped after two sentences:

    python examples/stream.py

Another model is an argument: python examples/stream.py MODEL
"""

import sys

import gemma_multi

model = gemma_multi.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller")
stream = model.stream("Tell me a bedtime story.\nHero: Leo the bat\nLength: long", temperature=0)
sentences = 0
for piece in stream:
    print(piece, end="", flush=True)
    sentences += piece.count(".")
    if sentences >= 2:
        stream.close()  # from another thread: stream.cancelled.set()
        break

result = stream.result
print(f"\n\n[{result.finish_reason} after {result.generated_tokens} tokens]")
