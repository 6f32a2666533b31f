"""The table of layer kinds: which modules, functions and ONNX operators consume a weight, and on which axis.

A new layer kind is one row. Classes and functions are named by their import path, so that reading the table imports
nothing. An axis counts from the end if negative.

- `axis` is the one that `torch.nn.utils.weight_norm` keeps by default, so that results load into existing code.
- `out_axis` indexes output units. They differ for transposed convolutions only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleKind:
    """A layer class.

    Attributes:
        name: as shown in reports.
        path: import path of the class; its subclasses count too.
        weights: shell globs on the names of its own parameters.
        axis: kept axis, as torch.nn.utils would choose.
        out_axis: axis of the output units.
        rank: rank of the weight, or None if it varies.
    """

    name: str
    path: str
    weights: tuple[str, ...] = ("weight",)
    axis: int = 0
    out_axis: int = 0
    rank: int | None = None


MODULES: tuple[ModuleKind, ...] = (
    ModuleKind("Linear", "torch.nn.Linear", rank=2),
    ModuleKind("Bilinear", "torch.nn.Bilinear", rank=3),
    ModuleKind("Conv1d", "torch.nn.Conv1d", rank=3),
    ModuleKind("Conv2d", "torch.nn.Conv2d", rank=4),
    ModuleKind("Conv3d", "torch.nn.Conv3d", rank=5),
    ModuleKind("ConvTranspose1d", "torch.nn.ConvTranspose1d", out_axis=1, rank=3),
    ModuleKind("ConvTranspose2d", "torch.nn.ConvTranspose2d", out_axis=1, rank=4),
    ModuleKind("ConvTranspose3d", "torch.nn.ConvTranspose3d", out_axis=1, rank=5),
    ModuleKind("RNN", "torch.nn.RNNBase", weights=("weight_*",), rank=2),
    ModuleKind("RNNCell", "torch.nn.RNNCellBase", weights=("weight_*",), rank=2),
    ModuleKind(
        "MultiheadAttention",
        "torch.nn.MultiheadAttention",
        weights=("in_proj_weight", "[qkv]_proj_weight"),
        rank=2,
    ),
    ModuleKind("Conv1D", "transformers.pytorch_utils.Conv1D", axis=1, out_axis=1, rank=2),
    ModuleKind("Embedding", "torch.nn.Embedding", rank=2),
    ModuleKind("Embedding", "torch.nn.EmbeddingBag", rank=2),
)


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionKind:
    """A function that may be called with a weight that belongs to no layer of the table above.

    Attributes:
        path: import path of the function, or `method:NAME` for a tensor method.
        operands: position and keyword of each operand that may be a weight, with its kept axis and output axis.
        kind: as shown in reports.
    """

    path: str
    kind: str
    operands: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """One argument of a function: where it stands, and its axes if it is the weight."""

    position: int
    keyword: str
    axis: int
    out_axis: int


def _weight(position: int, axis: int, out_axis: int | None = None, keyword: str = "weight") -> tuple[Operand, ...]:
    return (Operand(position, keyword, axis, axis if out_axis is None else out_axis),)


# The right operand of a product indexes its outputs by the last axis, the left one by the last but one.
_PRODUCT = (Operand(1, "other", -1, -1), Operand(0, "input", -2, -2))
_MATRICES = (Operand(1, "mat2", -1, -1), Operand(0, "input", -2, -2))
_ADDED = (Operand(2, "mat2", -1, -1), Operand(1, "mat1", -2, -2))

FUNCTIONS: tuple[FunctionKind, ...] = (
    FunctionKind("torch.nn.functional.linear", "linear", _weight(1, 0)),
    FunctionKind("torch.nn.functional.bilinear", "bilinear", _weight(2, 0)),
    FunctionKind("torch.nn.functional.conv1d", "conv1d", _weight(1, 0)),
    FunctionKind("torch.nn.functional.conv2d", "conv2d", _weight(1, 0)),
    FunctionKind("torch.nn.functional.conv3d", "conv3d", _weight(1, 0)),
    FunctionKind("torch.nn.functional.conv_transpose1d", "conv_transpose1d", _weight(1, 0, 1)),
    FunctionKind("torch.nn.functional.conv_transpose2d", "conv_transpose2d", _weight(1, 0, 1)),
    FunctionKind("torch.nn.functional.conv_transpose3d", "conv_transpose3d", _weight(1, 0, 1)),
    FunctionKind("torch.matmul", "matmul", _PRODUCT),
    FunctionKind("operator.matmul", "matmul", _PRODUCT),
    FunctionKind("method:matmul", "matmul", _PRODUCT),
    FunctionKind("torch.mm", "matmul", _MATRICES),
    FunctionKind("method:mm", "matmul", _MATRICES),
    FunctionKind("torch.addmm", "addmm", _ADDED),
    FunctionKind("method:addmm", "addmm", _ADDED),
)


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxKind:
    """An ONNX operator.

    Attributes:
        op_type: of the default domain.
        operands: input position and the kept axis and output axis of a weight there.
        transpose: attribute that says, per operand, that it is transposed before use (Gemm).
        batched: leading axes of a weight of more than two axes are kept too.
        name: as shown in reports, if not the operator's own.
    """

    op_type: str
    operands: tuple[Operand, ...]
    transpose: Mapping[int, str] = dataclasses.field(default_factory=dict)
    batched: bool = False
    name: str | None = None


ONNX: tuple[OnnxKind, ...] = (
    OnnxKind("Conv", _weight(1, 0)),
    OnnxKind("ConvTranspose", _weight(1, 0, 1)),
    OnnxKind("Gemm", (Operand(1, "B", 1, 1), Operand(0, "A", 0, 0)), {1: "transB", 0: "transA"}),
    OnnxKind("MatMul", (Operand(1, "B", -1, -1), Operand(0, "A", -2, -2)), batched=True),
    OnnxKind("Gather", (Operand(0, "data", 0, 0),), name="Embedding"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxListed:
    """An ONNX operator whose weights are reported and left alone.

    Attributes:
        positions: inputs that may be a weight.
        reason: why it is not split.
    """

    positions: tuple[int, ...]
    reason: str


_QUANTIZED = "it is quantized"

ONNX_LISTED: Mapping[str, OnnxListed] = {
    "LSTM": OnnxListed((1, 2), "LSTM weights are not split in ONNX files"),
    "GRU": OnnxListed((1, 2), "GRU weights are not split in ONNX files"),
    "RNN": OnnxListed((1, 2), "RNN weights are not split in ONNX files"),
    "Einsum": OnnxListed((0, 1), "Einsum weights are not split in ONNX files"),
    "DeformConv": OnnxListed((1,), "DeformConv weights are not split in ONNX files"),
    "ConvInteger": OnnxListed((1,), _QUANTIZED),
    "QLinearConv": OnnxListed((3,), _QUANTIZED),
    "MatMulInteger": OnnxListed((1, 0), _QUANTIZED),
    "QLinearMatMul": OnnxListed((3, 0), _QUANTIZED),
    "com.microsoft.Attention": OnnxListed((1,), "com.microsoft Attention weights are not split"),
    "com.microsoft.FusedConv": OnnxListed((1,), "com.microsoft FusedConv weights are not split"),
    "com.microsoft.FusedGemm": OnnxListed((1, 0), "com.microsoft FusedGemm weights are not split"),
    "com.microsoft.FusedMatMul": OnnxListed((1, 0), "com.microsoft FusedMatMul weights are not split"),
    "com.microsoft.MoE": OnnxListed((2, 4, 6), "com.microsoft MoE weights are not split"),
    "com.microsoft.QAttention": OnnxListed((1,), _QUANTIZED),
    "com.microsoft.QMoE": OnnxListed((2, 5, 8), _QUANTIZED),
    "com.microsoft.DynamicQuantizeMatMul": OnnxListed((1,), _QUANTIZED),
    "com.microsoft.DynamicQuantizeLSTM": OnnxListed((1, 2), _QUANTIZED),
    "com.microsoft.MatMulIntegerToFloat": OnnxListed((1, 0), _QUANTIZED),
    "com.microsoft.MatMulNBits": OnnxListed((1,), _QUANTIZED),
    "com.microsoft.MatMulBnb4": OnnxListed((1,), _QUANTIZED),
}
"""By operator, with its domain if that is not the default one."""
