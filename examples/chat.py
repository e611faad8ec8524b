"""A conversation that keeps its turns, reads each of them once, and can be taken up again:

    python examples/chat.py

Another model is an argument: python examples/chat.py MODEL. To talk yourself: gemma-multi chat
"""

import sys

import gemma_multi

name = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
chat = gemma_multi.load(name).chat()
print(chat.send("Tell me a bedtime story.\nHero: Luna the owl\nLength: short", seed=1).text)

# the storyteller was taught to be asked about its stories
answer = chat.send("Who was the hero?", temperature=0)
print(
    f"\n{answer.text}\n[{answer.reused_tokens} of {answer.prompt_tokens} tokens were read before]"
)

# messages are plain values: what was said can be kept, and goes on elsewhere
later = gemma_multi.load(name).chat(messages=chat.messages)
print("\n" + later.send("Thank you!", temperature=0).text)
