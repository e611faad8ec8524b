"""`gemma-multi demo`: one bedtime story on every installed backend, and then from the phone's file.

The first part samples with one seed in float32, so that what differs can only be a bug. The
second exports a `.litertlm` and runs it twice, greedily: on the LiteRT engine here, and on
LiteRT-LM, the engine that Android apps use.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from gemma_multi import export, load
from gemma_multi.engines import missing_packages
from gemma_multi.errors import OptionError
from gemma_multi.model import Model
from gemma_multi.terminal import notes, show_stream

STORY = (
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea\n"
    "Twist: the monster was a hungry kitten\nTheme: courage\nLength: medium"
)
_TITLES = {"mlx": "MLX", "keras": "Keras", "litert": "LiteRT"}


def run(seed: int) -> bool:
    """Whether every engine told the same story."""
    told: dict[str, tuple[int, ...]] = {}
    for name, title in _TITLES.items():
        if missing := missing_packages(name):
            notes.print(f"[dim]{title}: {', '.join(missing)} not installed, passed over[/dim]")
            continue
        model = load("storyteller", backend=name, precision="float32")
        told[title] = _tell(model, title, temperature=None, seed=seed)
    if not told:
        raise OptionError("no backend is installed; see gemma-multi doctor")
    click.echo()
    same = _compare(told)
    if "LiteRT" in told:
        same = _from_the_bundle() and same
    return same


def _tell(model: Model, title: str, temperature: float | None, seed: int) -> tuple[int, ...]:
    click.secho(f"\n{title} ({model.engine.device}) tells:\n", bold=True)
    stream = model.stream(STORY, seed=seed, temperature=temperature)
    show_stream(stream, indent="  ")
    result = stream.result
    speed = f"{result.generated_tokens} tokens, {result.tokens_per_second:.0f} a second"
    click.secho(f"\n  {speed}", dim=True)
    return result.tokens


def _compare(told: dict[str, tuple[int, ...]]) -> bool:
    (first, tokens), *others = told.items()
    if not others:
        click.echo(f"Only {first} is installed here, so there is nothing to compare.")
    differ = False
    for name, other in others:
        pairs = enumerate(zip(tokens, other, strict=False))
        at = next((i for i, (x, y) in pairs if x != y), min(len(tokens), len(other)))
        if tokens != other:
            click.secho(f"{first} and {name} differ from token {at} on.", fg="red")
            differ = True
    if others and not differ:
        *most, last = told
        names = f"{', '.join(most)} and {last}"
        click.secho(f"{names} gave the same {len(tokens)} tokens.", fg="green")
    return not differ


def _from_the_bundle() -> bool:
    """Exports, then compares our LiteRT engine with Google's on the same file."""
    try:
        from litert_lm_builder import litertlm_builder as _  # noqa: F401  needed to export
    except ImportError:
        notes.print("[dim].litertlm: litert-lm-builder not installed, passed over[/dim]")
        return True
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "storyteller.litertlm"
        report = export("storyteller", path)
        click.echo(f"\nExported {path.name}: {report.nbytes / 1e6:.1f} MB of {report.precision}.")
        ours = load(path).generate(STORY, temperature=0).text.strip()
        try:
            theirs = ask_litert_lm(path, STORY).strip()
        except ImportError:
            notes.print("[dim]LiteRT-LM: litert-lm-api not installed, passed over[/dim]")
            return True
        click.secho("\nLiteRT-LM, which runs it on Android, tells:\n", bold=True)
        show_stream([theirs], indent="  ")
    click.echo()
    if ours == theirs:
        click.secho("Our LiteRT engine and LiteRT-LM told the same story from it.", fg="green")
    else:
        click.secho("Our LiteRT engine and LiteRT-LM told different stories from it.", fg="red")
    return ours == theirs


def ask_litert_lm(path: Path, prompt: str) -> str:
    """LiteRT-LM's greedy answer to one user's turn."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with litert_lm.Engine(str(path)) as engine:
        conversation = engine.create_conversation(sampler_config=greedy)
        answer = conversation.send_message(prompt)
        return "".join(part.get("text", "") for part in answer["content"])
