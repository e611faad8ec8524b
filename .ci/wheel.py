"""Whether the wheel works where no source is: python .ci/wheel.py DIST [EXTRA ...]

Makes a new environment, installs the one wheel in DIST with the extras, and in an empty folder
tells a story, exports it for phones, runs that file, and has every backend verified. Of Python's
own library alone, so that nothing needs to be installed first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

WHERE = "import gemma_multi; print(gemma_multi.__file__)"
STORY = "Tell me a bedtime story.\nHero: Luna the owl\nLength: short"
KERAS_HUB = "keras-hub==0.32.0"  # from Python 3.14 on by itself, see pyproject.toml


def check(dist: Path, extras: list[str]) -> None:
    (wheel,) = dist.resolve().glob("gemma_multi-*.whl")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        folder = Path(work).resolve()
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

        def run(*arguments: str) -> str:
            print("+", *arguments, flush=True)
            command = [str(python), *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
            said = done.stdout.decode("utf-8", "replace")
            print(said, flush=True)
            if done.returncode:
                raise SystemExit(f"{arguments[-1]}: exit status {done.returncode}")
            return said

        def gemma(*arguments: str) -> str:
            return run("-m", "gemma_multi", *arguments)

        run("-m", "pip", "install", "--quiet", f"{wheel}[{','.join(extras)}]")
        if "keras" in extras and sys.version_info >= (3, 14):
            run("-m", "pip", "install", "--quiet", "--no-deps", KERAS_HUB)
        assert str(folder) in run("-c", WHERE), "this is not the wheel's"
        assert "Luna" in gemma("generate", STORY, "--seed", "1")
        if "litert" in extras:
            gemma("export", "storyteller", "-o", "story.litertlm", "--context-length", "512")
            assert "Luna" in gemma("generate", STORY, "--seed", "1", "-m", "story.litertlm")
        backends = ",".join(extra for extra in extras if extra in ("mlx", "keras", "litert"))
        gemma("doctor", "-b", backends, "--verify")


if __name__ == "__main__":
    check(Path(sys.argv[1]), sys.argv[2:])
