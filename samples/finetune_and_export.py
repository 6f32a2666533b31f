"""Split a network, fine-tune it in that form, fold it, export it to ONNX, and get the same outputs there.

python samples/finetune_and_export.py

The export needs onnxscript, which is in the `test` extra.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

import wnconvert


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value."""
    return difference.detach().abs().max().item()


def main(folder: Path) -> None:
    """Run the whole way from a plain network to ONNX Runtime."""
    torch.manual_seed(0)
    head = (nn.Flatten(), nn.Linear(16 * 7 * 7, 10))
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), *head)
    images, labels = torch.randn(64, 1, 16, 16), torch.randint(10, (64,))
    before = model(images)

    split = wnconvert.apply(model)
    print(f"split {split.report.count('split')} weights, outputs equal: {torch.equal(before, split.model(images))}")
    assert torch.equal(before, split.model(images))

    # The parameters are new, so the optimizer comes after apply.
    optimizer = torch.optim.SGD(split.model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(split.model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]

    trained = split.model(images).detach()
    folded = wnconvert.fold(split.model).model.eval()
    print(f"folded, largest difference {largest(folded(images) - trained):.1e}")
    torch.testing.assert_close(folded(images), trained)

    torch.onnx.export(folded, (images,), folder / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    operators = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    print(f"in ONNX Runtime, largest difference {largest(torch.from_numpy(result) - trained):.1e}")
    torch.testing.assert_close(torch.from_numpy(result), trained, rtol=1e-4, atol=1e-5)
    assert not operators & {"ReduceL2", "Div"}, "the weights are plain: no norm is left in the graph"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
