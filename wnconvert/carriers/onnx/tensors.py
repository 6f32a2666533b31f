"""The numbers of a TensorProto that holds its own data, in whichever of its fields they are."""

from __future__ import annotations

import math
import sys

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from wnconvert import bits
from wnconvert.errors import InputError

FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
"""Types a weight can have."""

_KNOWN = frozenset(TensorProto.DataType.values())

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

_TORCH: dict[int, torch.dtype] = FLOATS | {
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}

_SPELLED: dict[str, str] = {"float": "float32", "double": "float64"}
_TYPED: dict[int, str] = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data"}


def dtype_name(tensor: TensorProto) -> str:
    """The dtype as torch and numpy spell it, `float32`."""
    if tensor.data_type not in _KNOWN:
        return f"number {tensor.data_type}"
    spelled = str(TensorProto.DataType.Name(tensor.data_type)).lower()
    return _SPELLED.get(spelled, spelled)


def torch_name(tensor: TensorProto) -> str | None:
    """The name of the torch dtype that its elements are read as, or None if torch has none."""
    return dtype_name(tensor) if tensor.data_type in _TORCH else None


def itemsize(tensor: TensorProto) -> int:
    """Bytes of one element; sub-byte types count as one.

    Raises:
        InputError: see `check`.
    """
    check(tensor)
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def check(tensor: TensorProto) -> None:
    """Look whether a tensor can be read at all.

    Raises:
        InputError: it has a negative size, or a data type that the installed onnx does not know.
    """
    name = tensor.name or "a constant"
    if any(n < 0 for n in tensor.dims):
        raise InputError(f"{name}: damaged: its shape is {list(tensor.dims)}")
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in _KNOWN:
        raise InputError(f"{name}: its data type is {dtype_name(tensor)}, which the installed onnx cannot read")


def from_bytes(tensor: TensorProto, data: bytearray | memoryview, offset: int = 0) -> Tensor:
    """View raw little-endian data, as the tensor's own dtype and shape, without copying it."""
    dtype = _TORCH.get(tensor.data_type, torch.uint8)
    count = -1 if tensor.data_type not in _TORCH else math.prod(tensor.dims)
    if count == 0 or len(data) == offset:
        return torch.zeros(tuple(tensor.dims), dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
    return flat.reshape(tuple(tensor.dims)) if tensor.data_type in _TORCH else flat


def read_inline(tensor: TensorProto) -> Tensor:
    """Return a copy of the data: in the tensor's dtype and shape, or as flat bytes for a type torch does not have.

    Raises:
        InputError: the data does not fill the shape; see also `check`.
    """
    check(tensor)
    raw = _raw(tensor)
    if raw is not None:
        return from_bytes(tensor, bytearray(raw))
    try:
        array = np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(tuple(tensor.dims))
    except ValueError as error:
        raise InputError(f"{tensor.name or 'a constant'}: its data does not fit its shape ({error})") from error
    if array.size == 0:
        return torch.zeros(tuple(tensor.dims), dtype=_TORCH.get(tensor.data_type, torch.uint8))
    return from_bytes(tensor, bytearray(array.tobytes()))


def bytes_of_inline(tensor: TensorProto) -> bytes:
    """The data of a tensor as bytes, little-endian. Raises as `read_inline` does."""
    check(tensor)
    raw = _raw(tensor)
    return to_bytes(read_inline(tensor)) if raw is None else raw


def _raw(tensor: TensorProto) -> bytes | None:
    """The data of a tensor as it is, if it is what torch has in memory."""
    dtype = _TORCH.get(tensor.data_type)
    if dtype is None or not tensor.HasField("raw_data") or sys.byteorder != "little":
        return None
    raw: bytes = tensor.raw_data
    return raw if len(raw) == dtype.itemsize * math.prod(tensor.dims) else None


def write_inline(tensor: TensorProto, data: Tensor) -> None:
    """Replace the elements of a float tensor that differ in any bit, in the field that holds them."""
    data = data.contiguous()
    if tensor.HasField("raw_data"):
        tensor.raw_data = to_bytes(data)
        return
    wanted, present = (bits.as_integers(t).flatten() for t in (data, read_inline(tensor)))
    values, field = data.flatten(), getattr(tensor, _TYPED.get(tensor.data_type, "int32_data"))
    for i in (wanted != present).nonzero().flatten().tolist():
        # The type of a half is stored in an integer field, as its bits without a sign.
        field[i] = values[i].item() if tensor.data_type in _TYPED else int(wanted[i]) & 0xFFFF


def to_bytes(data: Tensor) -> bytes:
    """The elements in row-major order."""
    return data.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def make(name: str, data: Tensor) -> TensorProto:
    """A new tensor with raw data. `data` is float32, float64 or int64."""
    return numpy_helper.from_array(data.contiguous().numpy(), name)
