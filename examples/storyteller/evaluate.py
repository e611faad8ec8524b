"""How good the storyteller is: python examples/storyteller/evaluate.py [--models DIR,DIR,...]

Stories for 200 combinations of hero, setting and twist that training never saw: does each name
all three and end by itself, and how surprised is the model by such stories? And 40 fresh draws of
each task: is the answer exactly right? (The tasks' grammars are small, so training has seen some
of those draws, though not on purpose.)
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable

import corpus
import stories
import tasks
from rich.progress import track

import gemma_multi


def story_scores(model: gemma_multi.Model, count: int) -> dict[str, float]:
    """The share of held-out stories that name each control and stop, and that do all of it."""
    passed = {"hero": 0, "setting": 0, "twist": 0, "ends": 0, "all": 0}
    for i, controls in enumerate(_track(stories.held_out_controls(count), "stories")):
        result = model.generate(controls.prompt(), seed=i)
        checks = stories.mentions(controls, result.text)
        checks["ends"] = result.finish_reason == "stop"
        checks["all"] = all(checks.values())
        for name, ok in checks.items():
            passed[name] += ok
    return {name: n / count for name, n in passed.items()}


def task_scores(model: gemma_multi.Model, each: int) -> dict[str, float]:
    """The share of exactly right answers, greedily, by kind of task."""
    rng = random.Random("tasks for evaluation")
    scores = {}
    for draw in tasks.TASKS:
        examples = [draw(rng) for _ in range(each)]
        right = sum(
            model.generate(task.prompt, temperature=0.0, max_tokens=64).text == task.answer
            for task in _track(examples, examples[0].kind)
        )
        scores[examples[0].kind] = right / each
    return scores


def _track(items: list, label: str) -> Iterable:
    return track(items, label, transient=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the storyteller.")
    parser.add_argument("--models", default="storyteller", help="separated by commas")
    parser.add_argument("--backend", default="keras")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=40, help="of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    scores = {}
    for name in options.models.split(","):
        model = gemma_multi.load(name, backend=options.backend)
        loss = gemma_multi.validation_loss(model, corpus.held_out(100))
        scores[name] = {
            "perplexity": {"held out": loss.perplexity},
            "stories": story_scores(model, options.stories),
            "tasks": task_scores(model, options.tasks),
        }
    if options.json:
        print(json.dumps(scores))
        return
    for name, groups in scores.items():
        print(name)
        for group, values in groups.items():
            print(f"  {group}")
            for what, value in values.items():
                shown = f"{value:8.4f}" if group == "perplexity" else f"{value:7.1%}"
                print(f"    {what:<12} {shown}")


if __name__ == "__main__":
    main()
