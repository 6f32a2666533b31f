"""Whether two exported programs give the same outputs on the example inputs that are stored with one of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from wnconvert.files.outputs import judge
from wnconvert.files.torch_load import first_line
from wnconvert.report.model import OutputCheck

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed difference, relative to the largest magnitude of an output, by the narrowest type of the weights."""

# What running a program on inputs that it does not accept raises.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def compare(a: ExportedProgram, b: ExportedProgram) -> OutputCheck | None:
    """Run both programs on the example inputs of `a`, and on random numbers in their place where `a` accepts these.

    Returns:
        None if `a` has no example inputs.
    """
    if a.example_inputs is None:
        return None
    tolerance = max((TOLERANCE[t.dtype] for t in _matrices(a) if t.dtype in TOLERANCE), default=1e-3)
    try:
        tried, expected = [a.example_inputs], [_run(a, a.example_inputs)]
    except _FAILURES as error:
        return OutputCheck(None, note=f"it fails on its own example inputs: {first_line(error)}")
    random = _randomised(a.example_inputs)
    with contextlib.suppress(*_FAILURES):
        expected.append(_run(a, random))
        tried.append(random)
    try:
        actual = [_run(b, inputs) for inputs in tried]
    except _FAILURES as error:
        note = f"one program runs, but the other does not: {first_line(error)}"
        return OutputCheck(False, math.inf, tolerance, note)
    return judge(expected, actual, tolerance)


def _matrices(program: ExportedProgram) -> Iterable[Tensor]:
    return (held for held in program.state_dict.values() if isinstance(held, Tensor) and held.dim() > 1)


def _randomised(inputs: _Inputs) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)

    found: _Inputs = pytree.tree_map(random, inputs)
    return found


def _run(program: ExportedProgram, inputs: _Inputs) -> dict[str, NDArray[Any]]:
    """The outputs of one run, by where they stand in the result. Neither the program nor the inputs change."""
    module = program.module()
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.clone()
    args, kwargs = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # Dropout in a program exported for training is to drop the same.
        torch.manual_seed(0)
        leaves, _ = pytree.tree_flatten_with_path(module(*args, **kwargs))
    return {pytree.keystr(path): _array(value) for path, value in leaves if isinstance(value, Tensor)}


def _array(value: Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    found: NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return found
