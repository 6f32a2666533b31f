"""Write a large ONNX model with little memory, as a process: scripts/bench/onnx_model_files.py --help."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from onnx import TensorProto, helper

_PAGE = 4096


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--nodes", default=10, show_default=True, help="Layers, each a MatMul and a Relu.")
@click.option("--width", default=2048, show_default=True, help="Rows and columns of each weight, in float32.")
@click.option("--external/--inline", default=True, help="Weights in PATH.data, or in the model itself.")
def main(path: Path, nodes: int, width: int, external: bool) -> None:
    """Write a chain of layers to PATH. All weights show parts of one block of random numbers."""
    numbers = np.random.default_rng(0).standard_normal(width * width + _PAGE, np.float32) * np.float32(width**-0.5)
    made, weights = [], []
    data = path.with_name(f"{path.name}.data")
    for i in range(nodes):
        weights.append(TensorProto(name=f"w{i}", dims=[width, width], data_type=TensorProto.FLOAT))
        made.append(helper.make_node("MatMul", [f"r{i}" if i else "x", f"w{i}"], [f"h{i}"], name=f"layer {i}"))
        made.append(helper.make_node("Relu", [f"h{i}"], [f"r{i + 1}"]))
    for i, weight in enumerate(weights):
        if not external:
            weight.raw_data = _values(numbers, i, width)
            continue
        weight.data_location = TensorProto.EXTERNAL
        size = 4 * width * width
        for key, value in (("location", data.name), ("offset", i * _padded(size)), ("length", size)):
            weight.external_data.add(key=key, value=str(value))
    if external:
        with data.open("wb") as file:
            for i in range(nodes):
                file.seek(i * _padded(4 * width * width))
                file.write(_values(numbers, i, width))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", f"r{nodes}")]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def _values(numbers: np.ndarray, i: int, width: int) -> bytes:
    start = 13 * i % _PAGE
    return numbers[start : start + width * width].tobytes()


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


if __name__ == "__main__":
    main()
