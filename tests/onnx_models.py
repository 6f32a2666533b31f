"""Small ONNX models: one layer, its weight held in every way that the table of the tests names."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from wnconvert import convert
from wnconvert.carriers.onnx import OnnxCarrier

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
OPSETS = (7, 13, 17, 18, 21, 26)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer: which operand is the weight, what is kept, and the shape of the other operand."""

    name: str
    op_type: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    kept: tuple[int, ...]
    out: tuple[int, ...] | None = None
    groups: int = 1
    left: bool = False
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case("conv1d", "Conv", (4, 3, 3), (2, 3, 9), (0,)),
    Case("conv2d", "Conv", (4, 3, 3, 2), (2, 3, 8, 8), (0,)),
    Case("conv2d-grouped", "Conv", (4, 2, 3, 3), (1, 4, 8, 8), (0,), attributes={"group": 2}),
    Case("conv3d", "Conv", (2, 3, 2, 2, 2), (1, 3, 4, 4, 4), (0,)),
    Case("deconv1d", "ConvTranspose", (3, 4, 3), (2, 3, 7), (0,), out=(1,)),
    Case("deconv2d", "ConvTranspose", (3, 5, 3, 2), (2, 3, 6, 6), (0,), out=(1,)),
    Case(
        "deconv2d-grouped",
        "ConvTranspose",
        (6, 2, 3, 3),
        (1, 6, 5, 5),
        (0,),
        out=(0, 2),
        groups=3,
        attributes={"group": 3},
    ),
    Case("gemm", "Gemm", (5, 4), (3, 5), (1,)),
    Case("gemm-transB", "Gemm", (4, 5), (3, 5), (0,), attributes={"transB": 1}),
    Case("gemm-A", "Gemm", (4, 5), (5, 3), (0,), left=True),
    Case("gemm-transA", "Gemm", (5, 4), (5, 3), (1,), left=True, attributes={"transA": 1}),
    Case("matmul", "MatMul", (5, 4), (2, 3, 5), (1,)),
    Case("matmul-left", "MatMul", (4, 5), (5, 3), (0,), left=True),
    Case("matmul-batched", "MatMul", (2, 5, 4), (2, 3, 5), (0, 2)),
    Case("matmul-batched-left", "MatMul", (2, 4, 5), (2, 5, 3), (0, 1), left=True),
)


def weight(case: Case, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(case.weight).astype(np.float32)


def tensor(name: str, values: np.ndarray, dtype: str = "float32", typed: bool = False) -> TensorProto:
    """A tensor in raw_data, or in the typed field of its dtype."""
    kind = TYPES[dtype]
    if typed:
        return helper.make_tensor(name, kind, values.shape, values.astype(np.float64).flatten().tolist())
    data = torch.from_numpy(values.astype(np.float64)).to(getattr(torch, dtype)).contiguous()
    raw = data.flatten().view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, kind, values.shape, raw, raw=True)


def constant(t: TensorProto) -> NodeProto:
    return helper.make_node("Constant", [], [t.name], name=f"hold {t.name}", value=t)


def value(name: str, dtype: str, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES.get(dtype, TensorProto.INT64), shape)


def model(graph: onnx.GraphProto, opset: int, ir: int | None = None) -> ModelProto:
    imports = [helper.make_opsetid("", opset)]
    ir = ir or helper.find_min_ir_version_for(imports)
    made = helper.make_model(graph, opset_imports=imports, ir_version=ir, producer_name="tests")
    made.doc_string = "kept"
    helper.set_model_props(made, {"origin": "tests"})
    return made


def layer(
    case: Case,
    *,
    dtype: str = "float32",
    opset: int = 17,
    holder: str = "initializer",
    behind: str = "",
    values: np.ndarray | None = None,
    typed: bool = False,
) -> ModelProto:
    """A model of one layer, its weight called `w`, behind nothing, "Identity", "Transpose" or "Cast"."""
    values = weight(case) if values is None else values
    held, nodes, operand = dtype, [], "w"
    rank = values.ndim
    if behind == "Transpose":
        values = values.transpose(root_order(rank))
        nodes.append(helper.make_node("Transpose", ["w"], ["seen"], perm=list(operand_order(rank))))
        operand = "seen"
    elif behind == "Cast":
        held = "float32" if dtype == "float16" else "float16"
        nodes.append(helper.make_node("Cast", ["w"], ["seen"], to=TYPES[dtype]))
        operand = "seen"
    elif behind:
        nodes.append(helper.make_node(behind, ["w"], ["seen"]))
        operand = "seen"
    w = tensor("w", values, held, typed)
    inputs = [operand, "x"] if case.left else ["x", operand]
    if case.op_type == "Gemm":
        # Optional from opset 11 on.
        nodes.append(constant(tensor("c", np.ones(1, np.float32), dtype)))
        inputs.append("c")
    nodes.append(helper.make_node(case.op_type, inputs, ["y"], name="layer", **case.attributes))
    initializers = [w] if holder == "initializer" else []
    if holder == "Constant":
        nodes.insert(0, constant(w))
    inputs = [value("x", dtype, case.x)]
    made = model(helper.make_graph(nodes, "g", inputs, [value("y", dtype, [None] * len(case.x))], initializers), opset)
    if made.ir_version < 4 and initializers:
        made.graph.input.append(value("w", held, values.shape))
    return made


def operand_order(rank: int) -> tuple[int, ...]:
    """The order of a Transpose before the layer: a rotation, which is not its own inverse above rank 2."""
    return (*range(1, rank), 0)


def root_order(rank: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(operand_order(rank)))


def serialized(m: ModelProto) -> bytes:
    return bytes(m.SerializeToString(deterministic=True))


def copy(m: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(m)
    return made


def carrier(m: ModelProto, folder: Path = Path()) -> OnnxCarrier:
    return OnnxCarrier(copy(m), folder)


def applied(m: ModelProto, **options: Any) -> ModelProto:
    held = carrier(m)
    convert.apply(held, **options)
    return held.model


def folded(m: ModelProto) -> ModelProto:
    held = carrier(m)
    convert.fold(held)
    return held.model


def is_valid(m: ModelProto) -> bool:
    try:
        onnx.checker.check_model(m, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def run(m: ModelProto, optimize: bool = True, **given: Any) -> list[np.ndarray] | None:
    """The outputs on seeded inputs, or None where ONNX Runtime has no kernel for the model."""
    runtime = importlib.import_module("onnxruntime")
    errors = runtime.capi.onnxruntime_pybind11_state
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(serialized(m), options, providers=["CPUExecutionProvider"])
    except (errors.NotImplemented, errors.Fail, errors.InvalidGraph):
        return None
    rng = np.random.default_rng(1)
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    feed = {
        i.name: rng.standard_normal(i.shape).astype(types[i.type]) for i in session.get_inputs() if i.name not in given
    }
    return list(session.run(None, feed | given))


def initializer(m: ModelProto, name: str) -> torch.Tensor:
    """A tensor of the main graph by name, read by the onnx package."""
    found = next((t for t in m.graph.initializer if t.name == name), None)
    if found is None:
        node = next(n for n in m.graph.node if n.op_type == "Constant" and n.output[0] == name)
        found = node.attribute[0].t
    return to_torch(found)


def to_torch(t: TensorProto) -> torch.Tensor:
    array = numpy_helper.to_array(t)
    if t.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def make_external(m: ModelProto, folder: Path, split: bool = False) -> Path:
    """Save a model with every raw tensor in one data file, or each in its own inside a subfolder."""
    made = copy(m)
    for i, t in enumerate(t for t in made.graph.initializer if t.raw_data):
        location = f"data/{i}.bin" if split else "weights.bin"
        path = folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"\xab" * (-file.tell() % 64))
            offset, length = file.tell(), len(t.raw_data)
            file.write(t.raw_data)
        t.ClearField("raw_data")
        t.data_location = TensorProto.EXTERNAL
        for key, held in (("location", location), ("offset", offset), ("length", length)):
            t.external_data.add(key=key, value=str(held))
    path = folder / "model.onnx"
    path.write_bytes(serialized(made))
    return path


def scratch() -> Path:
    return Path(tempfile.mkdtemp())


def expected_g(w: torch.Tensor, kept: Sequence[int] | None, groups: int = 1) -> torch.Tensor:
    """Float64 norms, rounded once to the dtype that the graph needs."""
    w64 = w.double()
    if groups > 1:
        w64 = w64.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    if kept is None:
        g = torch.tensor(math.sqrt(float(w64.square().sum())), dtype=torch.float64)
    else:
        reduced = [i for i in range(w64.dim()) if i not in kept]
        g = w64.square().sum(reduced, keepdim=True).sqrt()
    return g.to(torch.float32 if w.element_size() == 2 else w.dtype)
