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
    """A function that may be called with a weight, outside the layers of the table above.

    One row stands for the torch function, the tensor method and the ATen operator of that name, whose arguments are in
    the same order.

    Attributes:
        name: of the function.
        operands: each argument that may be a weight, with its kept axis and its output axis.
        batched: leading axes of a weight of more than two axes are kept too.
        groups: position of the number of groups of a transposed convolution.
        transposed: position of a flag that makes a convolution a transposed one.
        kind: as shown in reports, if not the name.
    """

    name: str
    operands: tuple[Operand, ...]
    batched: bool = False
    groups: int | None = None
    transposed: int | None = None
    kind: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """One argument of a function: where it stands, and its axes if it is the weight.

    `fixed` arguments are always weights, also where the input too is made of parameters alone. A `listed` one is a list
    of weights and biases.
    """

    position: int
    keyword: str
    axis: int
    out_axis: int
    fixed: bool = True
    listed: bool = False


def _weight(position: int, axis: int, out_axis: int | None = None, keyword: str = "weight") -> tuple[Operand, ...]:
    return (Operand(position, keyword, axis, axis if out_axis is None else out_axis),)


def _product(left: int, left_name: str, right: int, right_name: str) -> tuple[Operand, ...]:
    """The right operand of a product indexes its outputs by the last axis, the left one by the last but one."""
    return Operand(right, right_name, -1, -1, fixed=False), Operand(left, left_name, -2, -2, fixed=False)


_MATMUL = _product(0, "input", 1, "other")
_TRANSPOSED = _weight(1, 0, 1)
_ATTENTION = (
    Operand(5, "in_proj_weight", 0, 0),
    Operand(11, "out_proj_weight", 0, 0),
    Operand(18, "q_proj_weight", 0, 0),
    Operand(19, "k_proj_weight", 0, 0),
    Operand(20, "v_proj_weight", 0, 0),
)
# torch.nn.functional takes the indices first, ATen the table.
_TABLE = (Operand(1, "weight", 0, 0, fixed=False), Operand(0, "weight", 0, 0, fixed=False))

# Packed sequences come with one argument more.
_RECURRENT = (Operand(2, "params", 0, 0, listed=True), Operand(3, "params", 0, 0, listed=True))
_CELL = (Operand(2, "w_ih", 0, 0), Operand(3, "w_hh", 0, 0))

FUNCTIONS: tuple[FunctionKind, ...] = (
    FunctionKind("linear", _weight(1, 0)),
    FunctionKind("bilinear", _weight(2, 0)),
    FunctionKind("conv1d", _weight(1, 0)),
    FunctionKind("conv2d", _weight(1, 0)),
    FunctionKind("conv3d", _weight(1, 0)),
    FunctionKind("conv_transpose1d", _TRANSPOSED, groups=6),
    FunctionKind("conv_transpose2d", _TRANSPOSED, groups=6),
    FunctionKind("conv_transpose3d", _TRANSPOSED, groups=6),
    FunctionKind("convolution", _weight(1, 0), groups=8, transposed=6),
    FunctionKind("_convolution", _weight(1, 0), groups=8, transposed=6, kind="convolution"),
    FunctionKind("matmul", _MATMUL, batched=True),
    FunctionKind("mm", _product(0, "input", 1, "mat2"), kind="matmul"),
    FunctionKind("bmm", _product(0, "input", 1, "mat2"), batched=True),
    FunctionKind("addmm", _product(1, "mat1", 2, "mat2")),
    FunctionKind("baddbmm", _product(1, "batch1", 2, "batch2"), batched=True),
    FunctionKind("_grouped_mm", _product(0, "input", 1, "mat2"), batched=True, kind="grouped_mm"),
    FunctionKind("grouped_mm_fallback", _product(0, "input", 1, "weight"), batched=True, kind="grouped_mm"),
    FunctionKind("grouped_mm", _product(0, "mat_a", 1, "mat_b"), batched=True),
    FunctionKind("multi_head_attention_forward", _ATTENTION, kind="MultiheadAttention"),
    FunctionKind("embedding", _TABLE, kind="Embedding"),
    FunctionKind("lstm", _RECURRENT, kind="RNN"),
    FunctionKind("gru", _RECURRENT, kind="RNN"),
    FunctionKind("rnn_tanh", _RECURRENT, kind="RNN"),
    FunctionKind("rnn_relu", _RECURRENT, kind="RNN"),
    FunctionKind("lstm_cell", _CELL, kind="RNNCell"),
    FunctionKind("gru_cell", _CELL, kind="RNNCell"),
    FunctionKind("rnn_tanh_cell", _CELL, kind="RNNCell"),
    FunctionKind("rnn_relu_cell", _CELL, kind="RNNCell"),
)
"""Einsum is not here: its equation says which axes are which."""


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
