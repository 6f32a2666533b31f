"""Every benchmark runs in its smallest size, the soak test for a moment, and both leave nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALLEST = {
    "bench/checkpoints.py": ["--gb", "0", "--dtype", "bfloat16", "--format", "torch", "--case", "trained", "--no-peer"],
    "bench/layers.py": ["--count", "2", "--format", "safetensors", "--verb", "fold"],
    "bench/onnx_files.py": ["--gb", "0", "--unchecked", "--peer", "onnx"],
    "bench/startup.py": [],
}


def run(name: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    words = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=250).stdout


def test_every_benchmark_with_a_command_line_is_run() -> None:
    scripts = {path.name for path in (SCRIPTS / "bench").glob("*.py") if '"--runs"' in path.read_text()}

    assert scripts == {Path(name).name for name in SMALLEST}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark(name: str, tmp_path: Path) -> None:
    printed = run(name, *SMALLEST[name], "--runs", "1", "--folder", tmp_path)

    assert re.search(r"\d\.\d\d", printed)
    assert "seconds" in printed
    assert list(tmp_path.iterdir()) == []


def test_soak(tmp_path: Path) -> None:
    printed = run("soak.py", "--minutes", "0", "--folder", tmp_path, "--seed", "1")

    assert re.search(r"differing bytes +0\n", printed)
    assert list(tmp_path.iterdir()) == []
