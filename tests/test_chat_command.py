"""`gemma-multi chat` as somebody meets it who sits at a terminal, and as a script does."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from screen import Terminal

import gemma_multi
from gemma_multi import OptionError
from gemma_multi.rows import read_rows

CHAT = [sys.executable, "-m", "gemma_multi", "chat", "-b", "mlx", "--temperature", "0"]
STORY = (
    "Tell me a bedtime story.\nHero: Leo the bat\nSetting: a quiet forest\n"
    "Twist: the star was a lost firefly\nTheme: patience\nLength: long"
)
READY = "leaves.\n>"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
ALT_ENTER, CTRL_C, CTRL_D, UP = "\x1b\r", "\x03", "\x04", "\x1b[A"


def test_an_evening_at_a_terminal_of_forty_columns(tmp_path: Path) -> None:
    """Lines edited, answers stopped, mistakes forgiven, and all of it remembered."""
    saved = tmp_path / "evening.jsonl"
    with Terminal(CHAT, columns=40, XDG_DATA_HOME=str(tmp_path)) as screen:
        screen.wait_for(READY)
        screen.say(STORY.replace("\n", ALT_ENTER))
        screen.wait_for("a second\n>")
        asked = [f"  {line}" for line in STORY.splitlines()[1:]]
        assert screen.lines[3:8] == asked
        assert "Leo the bat" not in "\n".join(screen.lines[8:])  # nothing is echoed twice

        screen.say(PASTE + STORY + PASTED)  # is one turn, whatever its lines
        screen.wait_for("  Length: long", 2)
        screen.wait_for("quiet forest", 4)  # it was asked twice, and answers the second time
        screen.send(CTRL_C)
        screen.wait_for(", stopped\n>")
        screen.say("/system")
        screen.wait_for("there is no system text")
        screen.say(f"/save {saved}")
        screen.wait_for("as a row\n>")
        screen.say("/sing")
        screen.wait_for("there is no command /sing")
        screen.send(f"never mind{CTRL_C}/res\t")
        screen.wait_for("> /reset")
        screen.send("\r")
        screen.wait_for("> /reset\n>")
        screen.say("/load /no/such/file")
        screen.wait_for("/no/such/file: cannot be read: No such")
        screen.say(f"/load {saved}")
        screen.wait_for("4 messages")
        screen.say("/backend litert")
        screen.wait_for("on litert (cpu)")
        screen.say("/backend abacus")
        screen.wait_for("unknown backend 'abacus'")
        screen.say("Who was the hero?")
        screen.wait_for("a second\n>", 2)
        screen.say("/help")
        screen.wait_for("Leave.\n>")
        screen.send(CTRL_D)
        assert screen.ends() == 0
        assert "Traceback" not in screen.text
        assert max(map(len, screen.lines)) <= 40
    (row,) = read_rows(saved)  # training reads it
    assert row.turns[0] == ("user", STORY)
    whole, part = row.turns[1][1], row.turns[3][1]
    assert whole.endswith("Good night.")
    assert 0 < len(part) < len(whole)

    history = tmp_path / "gemma_multi" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with Terminal(CHAT, XDG_DATA_HOME=str(tmp_path)) as screen:
        screen.wait_for(READY)
        screen.send(UP + UP)
        screen.wait_for("> Who was the hero?")
        screen.send(CTRL_C + CTRL_D)
        assert screen.ends() == 0


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour(environment: dict[str, str], tmp_path: Path) -> None:
    with Terminal([*CHAT, "--no-history"], XDG_DATA_HOME=str(tmp_path), **environment) as screen:
        screen.wait_for(READY)
        screen.say("Thank you!")
        screen.wait_for("\nok\n")
        screen.say("/help")
        screen.wait_for("Leave.\n>")
        screen.send(CTRL_D)
        assert screen.ends() == 0
        styles = {int(code) for part in re.findall(rb"\x1b\[([0-9;]*)m", screen.raw)
                  for code in part.split(b";") if code}  # fmt: skip
    assert not [code for code in styles if 30 <= code < 50 or 90 <= code < 110]
    assert not styles or "TERM" not in environment
    assert not list(tmp_path.rglob("chat_history"))


def test_where_no_history_can_be_kept_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "gemma_multi").write_text("in the way")
    with Terminal(CHAT, XDG_DATA_HOME=str(tmp_path)) as screen:
        screen.wait_for(READY)
        screen.say("Thank you!")
        screen.wait_for("\nok\n")
        screen.send(CTRL_D)
        assert screen.ends() == 0


def piped(turns: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(CHAT, input=turns, capture_output=True, text=True, timeout=300)


def test_through_a_pipe_there_are_answers_and_nothing_else(tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    turns = f"Thank you!\n/save {saved}\n/system Be brief.\nThank you!\n/load {saved}\nThank you!\n"
    done = piped(turns)
    assert done.returncode == 0
    first, _, third = done.stdout.splitlines()  # the second has a system text
    assert first == third == "ok"
    assert "\x1b" not in done.stderr
    assert ">" not in done.stderr
    said = [{"role": "user", "content": "Thank you!"}, {"role": "model", "content": "ok"}]
    assert json.loads(saved.read_text()) == {"messages": said}


@pytest.mark.parametrize(
    ("line", "words"),
    [("/sing", "no command /sing"), ("/save", "/save needs the name of a file"),
     ("/save x", "nothing was said yet"), ("/reset now", "/reset takes nothing after it"),
     ("/load pyproject.toml", "pyproject.toml: not valid JSON"),
     ("/backend mlx2", "unknown backend 'mlx2'")],
)  # fmt: skip
def test_a_bad_command_in_a_pipe_is_one_line_and_exit_2(line: str, words: str) -> None:
    done = piped(line + "\nThank you!\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_a_conversation_that_was_taken_up_reads_what_the_first_one_read() -> None:
    model = gemma_multi.load("storyteller", backend="mlx", progress=False)
    first = model.chat("You are brief.")
    first.send(STORY, seed=1, max_tokens=40)
    front = {"role": "system", "content": first.system}
    second = model.chat(messages=[front, *first.messages])
    assert (second.messages, second.system) == (first.messages, first.system)
    question = "Who was the hero?"
    answers = [c.send(question, temperature=0, max_tokens=8) for c in (first, second)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].prompt_tokens == answers[1].prompt_tokens
    second.reset()
    assert second.messages == []
    assert second.system == "You are brief."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be a list"),
        ([{"role": "user", "content": "hi"}], "ends with a user's turn"),
        ([{"role": "model", "content": "hi"}], "message 0 has role 'model'"),
        ([{"role": "user"}], "expected the keys 'role' and 'content'"),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "a"},
          {"role": "model", "content": "b"}], "begin with another"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages: object, words: str) -> None:
    model = gemma_multi.load("storyteller", backend="mlx", progress=False)
    with pytest.raises(OptionError, match=words):
        model.chat("You are brief.", messages=messages)
