"""What others do instead, each as a process: scripts/bench/peers.py PEER INPUT OUTPUT.

`apply` and `fold` are the straightforward use of torch: load the file, compute, save the file. The rest load and save
an ONNX model with another library, as a measure of what reading and writing it costs there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def apply(source: Path, target: Path) -> None:
    """Split with torch's own norm."""
    import torch

    state = _load(source)
    for name in [name for name, w in state.items() if name.endswith(".weight") and w.dim() > 1 and "embed" not in name]:
        weight = state.pop(name)
        state[f"{name}_g"] = torch.norm_except_dim(weight, 2, 0)  # noqa: TID251 - this is the peer
        state[f"{name}_v"] = weight
    _save(state, target)


def fold(source: Path, target: Path) -> None:
    """Fold with torch's own operator."""
    import torch

    state = _load(source)
    for name in [name.removesuffix("_g") for name in state if name.endswith("_g")]:
        pair = state.pop(f"{name}_v"), state.pop(f"{name}_g")
        state[name] = torch._weight_norm(*pair, 0)  # noqa: TID251 - this is the peer
    _save(state, target)


def onnx(source: Path, target: Path) -> None:
    """The onnx package."""
    import onnx as package

    package.save(package.load(source), target, save_as_external_data=True, location=f"{target.name}.data")


def onnx_ir(source: Path, target: Path) -> None:
    """The onnx-ir package."""
    import onnx_ir as package

    package.save(package.load(source), target, external_data=f"{target.name}.data")


def onnxsim(source: Path, target: Path) -> None:
    """The onnxsim package, told to do nothing."""
    import onnx as package
    from onnxsim import simplify

    same, _ = simplify(
        package.load(source), perform_optimization=False, skip_constant_folding=True, skip_shape_inference=True
    )
    package.save(same, target, save_as_external_data=True, location=f"{target.name}.data")


def onnxslim(source: Path, target: Path) -> None:
    """The onnxslim package, told to do nothing."""
    from onnxslim import slim

    skipped = ["constant_folding", "dead_node_elimination", "graph_fusion", "subexpression_elimination"]
    slim(
        str(source),
        str(target),
        no_shape_infer=True,
        skip_optimizations=[*skipped, "weight_tying"],
        save_as_external_data=True,
    )


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return dict(torch.load(path, weights_only=True))


def _save(state: dict[str, Any], path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
        return
    import torch

    torch.save(state, path)


PEERS = {function.__name__: function for function in (apply, fold, onnx, onnx_ir, onnxsim, onnxslim)}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
