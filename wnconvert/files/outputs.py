"""Whether two networks gave the same outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wnconvert.report.model import OutputCheck

SMALL = 1e-2
"""An output counts as at least this large: a sigmoid near 0 is rounded as coarsely as one near 1/2."""

Outputs = list[dict[str, NDArray[Any]]]


def judge(expected: Outputs, actual: Outputs, tolerance: float) -> OutputCheck:
    """Compare the outputs of several runs.

    Numbers that are not floating are a choice made on them (a class, a count of boxes), which a rounding may turn, so a
    difference there is told but decides nothing.

    Args:
        expected: per run, the outputs by name.
        actual: the same of the other model.
        tolerance: relative to the largest finite magnitude of an output.
    """
    largest, turned = 0.0, []
    for run, (left, right) in enumerate(zip(expected, actual, strict=True)):
        if left.keys() != right.keys():
            return OutputCheck(False, math.inf, tolerance, "the models have different outputs")
        for name, x in left.items():
            y = right[name]
            if x.dtype != y.dtype:
                return OutputCheck(False, math.inf, tolerance, f"{name} has another type")
            if x.shape != y.shape or not np.issubdtype(x.dtype, np.inexact):
                if x.shape != y.shape or not np.array_equal(x, y):
                    turned.append(f"{name} of run {run + 1}")
                continue
            largest = max(largest, distance(x, y))
    if largest > tolerance:
        return OutputCheck(False, largest, tolerance)
    if turned:
        return OutputCheck(None, largest, tolerance, f"not the same, but not a number to round: {', '.join(turned)}")
    return OutputCheck(True, largest, tolerance)


def distance(x: NDArray[Any], y: NDArray[Any]) -> float:
    """The largest difference relative to the largest finite magnitude of `x`; infinite if only one is finite."""
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    x, y = x.astype(wide), y.astype(wide)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(x[finite]).max()), SMALL)
    return float(np.abs(x[finite] - y[finite]).max()) / scale
