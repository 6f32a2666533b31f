"""Loads TorchScript archives with torch, and runs traced ones on random inputs of the shapes they were traced with."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wnconvert.carriers.torchscript import pickled
from wnconvert.carriers.torchscript.archive import DAMAGE, Archive, StoredTensor, first_line
from wnconvert.carriers.torchscript.code import dotted
from wnconvert.report.model import OutputCheck
from wnconvert.walk.recipe import parts

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest magnitude of an output. torch's own weight norm rounds in another order."""

_TOUCHES_FILES = frozenset({"torch.save", "torch.load", "torch.from_file", "torch.sleep"})
_OWN = ("aten", "prim", "quantized", "prepacked")


def cannot_load(path: Path) -> str | None:
    """Why torch cannot load an archive and compile all its methods, or None if it can or must not try."""
    if _foreign(path) is not None:
        return None
    try:
        module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        for part in module.modules():
            for name in part._c._method_names():
                _ = part._c._get_method(name).graph
    except DAMAGE as error:
        return first_line(error)
    return None


def compare(a: Path, b: Path) -> OutputCheck:
    """Run two archives on random inputs like those that the first was traced with."""
    foreign = _foreign(a) or _foreign(b)
    if foreign is not None:
        return OutputCheck(None, note=f"not run: it calls {foreign}")
    inputs = _inputs(a)
    if inputs is None:
        return OutputCheck(None, note="not run: nothing says what its inputs are (it was scripted, not traced)")
    try:
        left, right = (_outputs(path, inputs) for path in (a, b))
    except DAMAGE as error:
        return OutputCheck(None, note=f"not run: {first_line(error)}")
    return _difference(left, right)


def _outputs(path: Path, inputs: tuple[Any, ...]) -> list[Tensor]:
    module = torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [part for part in parts(module(*inputs)) if isinstance(part, Tensor)]


def _difference(left: list[Tensor], right: list[Tensor]) -> OutputCheck:
    if [(t.shape, t.dtype) for t in left] != [(t.shape, t.dtype) for t in right]:
        return OutputCheck(False, note="outputs differ in number, shape or dtype")
    largest, allowed, equal = 0.0, 0.0, True
    for x, y in zip(left, right, strict=True):
        tolerance = _TOLERANCE.get(x.dtype, 0.0)
        wide = torch.complex128 if x.is_complex() else torch.float64
        near = torch.isclose(x.to(wide), y.to(wide), rtol=0, atol=0, equal_nan=True)
        gap = (x.to(wide) - y.to(wide)).abs()[~near]
        scale = float(x.to(wide).abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0
        relative = float(gap.max()) / (scale or 1.0) if gap.numel() else 0.0
        largest, allowed = max(largest, relative), max(allowed, tolerance)
        equal = equal and relative <= tolerance
    return OutputCheck(equal, largest, allowed)


def _inputs(path: Path) -> tuple[Any, ...] | None:
    """Random inputs of the shapes and types that torch.jit.trace was given. Their values are not in the archive."""
    archive = Archive(path, str(path))
    if "traced_inputs.pkl" not in archive.records():
        return None
    try:
        generator = torch.Generator().manual_seed(0)
        return tuple(_drawn(pickled.load(archive.read("traced_inputs.pkl")), generator)["forward"])
    except DAMAGE:
        return None


def _drawn(value: Any, generator: torch.Generator) -> Any:
    stored = StoredTensor.of(value)
    if stored is not None:
        if stored.dtype.is_floating_point or stored.dtype.is_complex:
            return torch.randn(stored.shape, generator=generator, dtype=torch.float64).to(stored.dtype)
        return torch.zeros(stored.shape, dtype=stored.dtype)  # an index of anything
    if isinstance(value, pickled.Call):
        return _drawn(value.args[0], generator)
    if isinstance(value, dict):
        return {key: _drawn(item, generator) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_drawn(item, generator) for item in value)
    return value


@functools.lru_cache(maxsize=8)
def _foreign(path: Path) -> str | None:
    """An operator in the code of an archive that writes files or is not torch's own."""
    for text in Archive(path, str(path)).code.values():
        for node in ast.walk(ast.parse(text)):
            name = dotted(node) if isinstance(node, ast.Attribute) else None
            if name is None:
                continue
            if name in _TOUCHES_FILES or name.replace("ops.aten.", "torch.") in _TOUCHES_FILES:
                return name
            parts = name.split(".")
            if parts[0] == "ops" and len(parts) == 3 and parts[1] not in _OWN:
                return name
            if name.startswith("__torch__.torch.classes."):
                return name
    return None
