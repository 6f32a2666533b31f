"""Split the weights of an ONNX file, run it, and fold it back to the same bytes.

Without an argument it exports a small file, which needs onnxscript (in the `test` extra):

    python samples/onnx_file.py [MODEL.onnx]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import wnconvert


def small_model(folder: Path) -> Path:
    """Export two layers."""
    torch.manual_seed(0)
    path = folder / "small.onnx"
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 5))
    torch.onnx.export(model, (torch.randn(1, 4, 16),), path, dynamo=True, verbose=False, external_data=False)
    return path


def main(path: Path, folder: Path) -> None:
    """Split and fold `path`, with the results in `folder`."""
    split = wnconvert.convert_file(path, folder / "split.onnx", "apply")
    print(f"split {split.count('split')} weights of {path.name}")
    print(f"outputs: largest difference {split.outputs.largest:.1e}, tolerance {split.outputs.tolerance:.1e}")
    assert split.outputs.equal

    wnconvert.convert_file(folder / "split.onnx", folder / "folded.onnx", "fold")
    same = (folder / "folded.onnx").read_bytes() == path.read_bytes()
    print(f"folded again: {'the same' if same else 'other'} bytes as the original")
    assert same


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else small_model(Path(scratch)), Path(scratch))
