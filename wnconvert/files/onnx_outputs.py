"""Whether two ONNX models give the same outputs in ONNX Runtime.

The runtime works in a process of its own (`onnx_run`): a model that crashes it must not crash the tool.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from wnconvert.carriers.onnx import OnnxCarrier, external, tensors
from wnconvert.carriers.onnx.graphs import Constant, GraphIndex, all_tensors, is_op
from wnconvert.files.outputs import Outputs, judge
from wnconvert.report.model import OutputCheck

TOLERANCE: dict[int, float] = {
    TensorProto.DOUBLE: 1e-9,
    TensorProto.FLOAT: 1e-3,
    TensorProto.FLOAT16: 1e-2,
    TensorProto.BFLOAT16: 5e-2,
}
"""Largest allowed difference, relative to the largest magnitude of an output, by the narrowest type of the weights.

A deep network turns the last bit of its weights into far more: trained ones reach 5e-4 in float32.
"""

TIMEOUT = 600.0
"""Seconds for one model."""

MOST_NODES = 25_000
"""ONNX Runtime takes a quarter of a minute to load so many, and the square of the time for more."""

_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def compare(a: Path, before: OnnxCarrier, b: Path, after: OnnxCarrier) -> OutputCheck:
    """Run `a` on random inputs that it accepts, `b` on the same, and compare their outputs."""
    nodes = max(sum(len(scope.graph.node) for scope in carrier.index.scopes) for carrier in (before, after))
    if nodes > MOST_NODES:
        return OutputCheck(None, note=f"not run: ONNX Runtime takes minutes to load {nodes:,} nodes")
    tolerance = _tolerance(before)
    with tempfile.TemporaryDirectory(prefix="wnconvert-") as scratch:
        folder = Path(scratch)
        (folder / "hints.json").write_text(json.dumps(_compared_integers(before.index)))
        try:
            with _runnable(a, before) as model:
                problem = _run(model, "search", folder)
            if problem:
                return OutputCheck(None, note=f"{a.name} could not be run: {problem}")
            with _runnable(b, after) as model:
                problem = _run(model, "run", folder)
        except subprocess.TimeoutExpired:
            return OutputCheck(None, note=f"ONNX Runtime took more than {TIMEOUT:.0f} s")
        except OSError as error:
            return OutputCheck(None, note=f"the outputs could not be compared: {error.strerror or error}")
        if problem:
            return OutputCheck(False, math.inf, tolerance, f"{a.name} runs, but {b.name} does not: {problem}")
        return judge(_load(folder, "expected"), _load(folder, "actual"), tolerance)


def _run(model: Path, mode: str, folder: Path) -> str | None:
    """Run a model in a process of its own. Returns what went wrong."""
    command = [sys.executable, "-m", "wnconvert.files.onnx_run", mode, str(model.absolute()), str(folder)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)  # noqa: S603 - our own module
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ONNX Runtime crashed (signal {-done.returncode})"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"


@contextmanager
def _runnable(path: Path, carrier: OnnxCarrier) -> Iterator[Path]:
    """A path from which ONNX Runtime accepts the model: it refuses data behind symbolic links."""
    locations = carrier.data_files()
    if not any((path.parent / location).is_symlink() for location in locations):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=".run-", dir=path.parent) as made:
        folder = Path(made)
        for location in (path.name, *locations):
            link = folder / location
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link((path.parent / location).resolve(), link)
        yield folder / path.name


def _load(folder: Path, kind: str) -> Outputs:
    found = []
    for path in sorted(folder.glob(f"{kind}-*.npz")):
        with np.load(path) as arrays:
            found.append({name: arrays[name] for name in arrays.files})
    return found


def _tolerance(carrier: OnnxCarrier) -> float:
    types = {tensor.data_type for tensor in all_tensors(carrier.model) if len(tensor.dims) > 1}
    return max((TOLERANCE[t] for t in types if t in TOLERANCE), default=TOLERANCE[TensorProto.FLOAT])


def _compared_integers(index: GraphIndex) -> list[int]:
    """Integers that the model compares something with: an input that chooses a branch takes one of them."""
    found: list[int] = []
    for value in index.constants().values():
        tensor = value.tensor
        small = tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and all(n == 1 for n in tensor.dims)
        if not small or external.is_external(tensor):
            continue
        if any(is_op(reader.node, *_COMPARISONS) for reader in _readers(value)):
            found += [int(i) for i in tensors.read_inline(tensor).flatten()]
    return list(dict.fromkeys(found))


def _readers(value: Constant) -> list[Any]:
    readers = []
    for reader in value.consumers:
        readers.append(reader)
        if is_op(reader.node, "Cast", "Identity") and reader.node.output:
            passed = reader.scope.find(reader.node.output[0])
            readers += passed.consumers if passed is not None else []
    return readers
