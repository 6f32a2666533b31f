"""One checkpoint there and back."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
from torch import Tensor

import wnconvert
from soak import formats
from wnconvert.errors import NothingToDo, WnconvertError

_OUTPUTS_TOO = 0.1
"""Share of ONNX models that are also run, which takes a process for each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it.

    Attributes:
        weights: split and folded again.
        tensors: compared bit for bit.
        differing: values that are not the same at the end, or whose tensor is missing.
        problem: the first thing that went wrong.
        idle: why there was nothing to convert.
    """

    weights: int = 0
    tensors: int = 0
    differing: int = 0
    problem: str | None = None
    idle: str | None = None


def there_and_back(source: Path, folder: Path, rng: random.Random) -> Outcome:
    """Split a checkpoint, compare all weights, fold it, and compare every bit with the original."""
    check = source.suffix != ".onnx" or rng.random() < _OUTPUTS_TOO
    tail = "".join(source.suffixes[-2:]) if source.suffix == ".tar" else source.suffix
    split, back = folder / f"split{tail}", folder / f"back{tail}"
    names = "legacy" if source.suffix == ".onnx" else rng.choice(["legacy", "parametrized"])
    dim = rng.choice(["torch", "torch", "out", None])
    try:
        applied = wnconvert.convert_file(source, split, "apply", names=names, dim=dim, check=check)
        if check:
            verdict = wnconvert.verify(source, split)
            if not verdict.weights.identical:
                return Outcome(problem=f"split differs: {verdict.weights.first_difference}")
        wnconvert.convert_file(split, back, "fold", check=check)
    except NothingToDo as nothing:
        return Outcome(idle=str(nothing))
    except WnconvertError as error:
        return Outcome(problem=f"{type(error).__name__}: {error}")
    weights = sum(row.action == "split" for row in applied.rows)
    before, after = formats.contents(source), formats.contents(back)
    found = {name: differing(before.get(name), after.get(name)) for name in {**before, **after}}
    wrong = [name for name, count in found.items() if count]
    problem = f"{wrong[0]} differs in {found[wrong[0]]} values" if wrong else None
    return Outcome(weights, len(found), sum(found.values()), problem)


def plain(source: Path, folder: Path) -> Path:
    """A file whose weights are all plain: the file itself, or what `fold` makes of it.

    Raises:
        WnconvertError: it is no file that can be converted.
    """
    target = folder / f"plain{''.join(source.suffixes[-2:]) if source.suffix == '.tar' else source.suffix}"
    try:
        wnconvert.convert_file(source, target, "fold")
    except NothingToDo:
        return source
    return target


def differing(a: Tensor | None, b: Tensor | None) -> int:
    """Number of bytes that differ, at least one where shapes or dtypes do."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return 1
    return int((_bytes(a) != _bytes(b)).sum())


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
