"""The command line as a user meets it: real processes, pipes, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "gemma_multi"]
STORY = (
    "Tell me a bedtime story.\nHero: Leo the bat\nSetting: a quiet forest\n"
    "Twist: the star was a lost firefly\nTheme: patience\nLength: short"
)


def run(*arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(
        [*PROGRAM, *arguments], input=given, env=env, capture_output=True, text=True, timeout=300
    )


def assert_refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("gemma-multi: ")
    assert words in done.stderr


def test_generate_from_an_argument_and_from_a_pipe() -> None:
    argument = run("generate", STORY, "--seed", "1", "-b", "mlx")
    assert argument.returncode == 0, argument.stderr
    assert "Leo" in argument.stdout
    piped = run("generate", "--seed", "1", "-b", "mlx", given=STORY)
    assert piped.stdout == argument.stdout
    assert piped.stderr == ""


def test_help_lists_commands_by_what_they_are_for_and_ship_first() -> None:
    said = run("--help").stdout
    assert max(map(len, said.splitlines())) <= 80
    titles = re.findall(r"^(\w+):\n  (\w+) ", said, re.MULTILINE)
    assert titles == [
        ("Ask", "generate"), ("Train", "ship"), ("Files", "quantize"),
        ("Serve", "serve"), ("Check", "parity"),
    ]  # fmt: skip


def test_generate_json_is_one_object() -> None:
    done = run("generate", STORY, "--seed", "1", "-b", "keras", "--json")
    result = json.loads(done.stdout)
    assert result["finish_reason"] == "stop"
    assert result["generated_tokens"] == len(result["tokens"])
    assert (result["seed"], result["backend"]) == (1, "keras")
    text = run("generate", STORY, "--seed", "1", "-b", "keras").stdout
    assert text.strip() == result["text"].strip()


def test_options_reach_the_model() -> None:
    common = ("generate", STORY, "-b", "mlx", "--temperature", "0", "--json")
    short = json.loads(run(*common, "--max-tokens", "7").stdout)
    assert (short["generated_tokens"], short["finish_reason"]) == (7, "length")
    stopped = json.loads(run(*common, "--stop", "Leo").stdout)
    assert "Leo" not in stopped["text"]
    raw = json.loads(run("generate", "--raw", "Once upon", "-b", "mlx", "--max-tokens", "3",
                         "--json").stdout)  # fmt: skip
    assert raw["prompt_tokens"] < 5


def test_chat_takes_a_turn_a_line_when_piped() -> None:
    turns = "Thank you!\n\nGood night.\n/reset\nThank you!\n"
    done = run("chat", "-b", "mlx", "--temperature", "0", given=turns)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[2]


def test_chat_json_is_an_object_a_line() -> None:
    done = run(
        "chat", "-b", "mlx", "--temperature", "0", "--json", given="Thank you!\nGood night.\n"
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert all(answer["text"] and answer["backend"] == "mlx" for answer in answers)
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


def test_demo_json_has_every_story() -> None:
    done = run("demo", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["same"] is True
    assert [telling["teller"] for telling in outcome["tellings"]] == ["MLX", "Keras", "LiteRT"]
    assert len({tuple(telling["tokens"]) for telling in outcome["tellings"]}) == 1
    assert set(outcome["from_the_file"]) == {"Our LiteRT engine", "LiteRT-LM"}


def test_quantize_then_info(tiny_directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    done = run("quantize", str(tiny_directory), "-o", str(target), "--embedding-bits", "8")
    assert done.returncode == 0, done.stderr
    assert "model.embed_tokens.weight" in done.stdout
    assert "calibrated on" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    facts = json.loads(run("info", str(target), "--json").stdout)
    assert (facts["stored_as"], facts["grid"]) == ("int4", "portable")
    assert len(facts["weights_sha256"]) == 64
    table = run("info", str(target)).stdout
    assert facts["weights_sha256"] in table.replace("\n", "").replace(" ", "")
    assert_refused(run("quantize", str(tiny_directory), "-o", str(target)), "exists already")
    as_json = run("quantize", str(tiny_directory), "-o", str(tmp_path / "b"), "--json",
                  "--calibrate", "none")  # fmt: skip
    assert json.loads(as_json.stdout)["tensors"][0]["bits"] == 4


def test_doctor_tries_each_backend() -> None:
    shown = json.loads(run("doctor", "--json").stdout)
    assert shown["machine"]["cores"] >= 1
    assert shown["machine"]["bytes_per_second"] > 1e9
    found = shown["backends"]
    assert all(backend["tokens_per_second"] > 0 for backend in found.values())
    assert found["mlx"]["works"]
    assert found["keras"]["works"]
    assert found["litert"]["works"]
    assert found["keras"]["versions"]["keras-hub"]
    assert found["keras"]["gpu"] == "none" or found["keras"]["device"] == "gpu"
    table = run("doctor").stdout
    assert "pip install" in table
    assert "Gemma 3 270M in int4: at most" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    assert len(table.splitlines()) <= 10


def test_doctor_verifies_a_backend() -> None:
    done = run("doctor", "-b", "litert", "--verify")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "trust" in line)
    assert line.startswith("litert   can be trusted: 7 checks in ")
    assert "\x1b" not in done.stdout
    assert_refused(run("doctor", "-b", "abacus"), "unknown backend 'abacus'")


def test_demo_says_whether_all_agree() -> None:
    done = run("demo", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Pip") >= 8
    assert "MLX, Keras and LiteRT gave the same" in done.stdout
    assert "Our LiteRT engine and LiteRT-LM told the same story" in done.stdout


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
def test_export_then_generate_from_the_file(kind: str, tmp_path: Path) -> None:
    target = tmp_path / f"storyteller.{kind}"
    done = run("export", "storyteller", "-o", str(target), "--context-length", "512",
               "--prefill", "16", "--prefill", "128", "--json")  # fmt: skip
    facts = json.loads(done.stdout)
    assert facts["bytes"] == target.stat().st_size
    assert (facts["format"], facts["precision"], facts["context_length"]) == (kind, "int4", 512)
    answers = [run("generate", STORY, "--temperature", "0", "-m", model, "--threads", "1",
                   "-b", "litert") for model in (str(target), "storyteller")]  # fmt: skip
    assert answers[0].stdout == answers[1].stdout != ""
    again = run("generate", STORY, "--temperature", "0", "-m", str(target))
    assert again.stdout == answers[0].stdout
    assert again.stderr == ""  # the runtime's own reports stay out of sight
    shown = json.loads(run("info", str(target), "--json").stdout)
    assert shown["stored_as"] == "int4"
    assert_refused(run("export", "storyteller", "-o", str(target)), "exists already")
    assert_refused(run("generate", "hi", "-m", str(target), "--context-length", "513"),
                   "was exported with 512")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate"], "the prompt is empty"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", "hi", "--max-tokens", "many"], "'many' is not a valid integer"),
        (["generate", "hi", "--temperature", "nan"], "temperature is nan"),
        (["generate", "hi", "--colour"], "No such option"),
        (["generate", "hi", "-b", "torch"], "unknown backend 'torch'"),
        (["generate", "hi", "-b", "litert", "--precision", "float16"], "not in float16"),
        (["generate", "hi", "--context-length", "5", "-b", "mlx"], "the context holds 5"),
        (["generate", "hi", "-m", "/no/such/dir"], "no such directory"),
        (["generate", "hi", "--raw", "--system", "x"], "takes no --system"),
        (
            ["info", "pyproject.toml"],
            "is none of what can be opened: a .gguf file",
        ),
        (
            ["export", "storyteller", "-o", "model.gguf2"],
            "must end in .gguf, .litertlm, .sbs or .tflite",
        ),
        (["export", "storyteller", "-o", "x.tflite", "--prefill", "0"], "prefill size is 0"),
        (
            ["export", "storyteller", "-o", "x.tflite", "--context-length", "4096"],
            "expected 1 to 2048",
        ),
        (["export", "storyteller", "-o", "/proc/x.litertlm"], "cannot be written"),
        (
            ["generate", "hi", "-b", "mlx", "--threads", "2"],
            "backend 'mlx' takes no option 'threads'",
        ),
        (
            ["generate", "hi", "-b", "litert", "--precision", "bfloat16"],
            "computes in float32, int4, int8, not in bfloat16",
        ),
        (["info", "tests"], "config.json: not found"),
        (["quantize", "storyteller", "-o", "x"], "int4 already"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


def test_saving_where_nothing_can_be_written(tiny_directory: Path) -> None:
    assert_refused(run("quantize", str(tiny_directory), "-o", "/proc/x/y"), "cannot be written")


def test_streams_that_are_closed_full_or_of_another_encoding() -> None:
    program = f"{sys.executable} -m gemma_multi generate -b mlx --max-tokens 4"

    def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        env = {**os.environ, **environment}
        return subprocess.run(["bash", "-c", command], capture_output=True, env=env)

    for command, code in (
        (f"printf 'caf\\xff' | {program}", 0),
        (f"{program} hello >&-", 0),
        (f"{program} <&-", 2),
        (f"PYTHONIOENCODING=ascii {program} hello", 0),
    ):
        done = shell(command, LC_ALL="C.UTF-8")
        assert done.returncode == code, (command, done.stderr)
        assert b"Traceback" not in done.stderr
    if Path("/dev/full").exists():
        full = shell(f"{program} hello > /dev/full")
        assert full.returncode == 2
        assert full.stderr.decode().strip() == "gemma-multi: No space left on device"


def test_names_with_brackets_are_shown_as_they_are(tiny_directory: Path, tmp_path: Path) -> None:
    odd = tmp_path / "m[b]x[/y]"
    done = run("quantize", str(tiny_directory), "-o", str(odd), "--calibrate", "none")
    assert done.returncode == 0, done.stderr
    assert str(odd) in done.stderr.replace("\n", "")
    assert odd.name in run("info", str(odd)).stdout.replace("\n", "").replace(" ", "")


def test_text_without_spaces_is_shown_as_it_comes() -> None:
    import io

    from gemma_multi.terminal import WordWrap

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain = io.StringIO()
    wrap = WordWrap(plain)
    wrap.write("我能吞下")
    assert plain.getvalue() == "我能吞下"
    shown = Terminal()
    wrap = WordWrap(shown)
    wrap.write("我能吞下玻璃而不傷身體" * 12)
    assert len(shown.getvalue()) > 60  # most of it, before any space has come
    wrap.finish()
    assert shown.getvalue().replace("\n", "") == "我能吞下玻璃而不傷身體" * 12


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m gemma_multi info storyteller | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_terminal_gets_lines_broken_at_words() -> None:
    """In a pseudo-terminal of 40 columns no word is cut and nothing is lost."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "generate", STORY, "--seed", "1", "-b", "mlx"],
        stdin=follower, stdout=follower, stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "40", "LINES": "20"},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:
        pass  # Linux ends a pseudo-terminal with an error
    assert process.wait() == 0
    lines = shown.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) < 40
    plain = run("generate", STORY, "--seed", "1", "-b", "mlx").stdout
    assert " ".join(lines).split() == plain.split()


def test_help_fits_and_names_every_command() -> None:
    shown = run("--help").stdout
    for command in ("generate", "chat", "quantize", "export", "info", "doctor", "demo"):
        assert command in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
