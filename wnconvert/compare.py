"""Whether two networks are the same function: by their weights, and by their outputs where they can be run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wnconvert import bits, files
from wnconvert.carriers import Carrier
from wnconvert.errors import NothingToDo
from wnconvert.files import ReadOptions
from wnconvert.report.verdict import Comparison, Difference, Verdict
from wnconvert.watch import SILENT, Watcher


def compare_files(a: Path, b: Path, reading: ReadOptions = ReadOptions(), watcher: Watcher = SILENT) -> Verdict:
    """Find out whether two files of any formats hold the same function.

    Names that differ only by a leading prefix on one side (`generator.`) are matched, and the verdict says so.

    Raises:
        InputError: a file cannot be read, or one of its pairs cannot be multiplied back.
        NothingToDo: neither file holds a tensor.
    """
    watcher.stage("reading")
    # Optimizer state is no part of the function.
    reading = dataclasses.replace(reading, drop_optimizer=True)
    left, right = files.read(a, reading), files.read(b, reading)
    watcher.stage("comparing weights")
    weights = compare_weights(left.carrier, right.carrier, match_prefix=True, watcher=watcher)
    if not weights.compared and not weights.differing and weights.same_names:
        raise NothingToDo("no weight to compare in either file")
    verdict = Verdict(str(a), str(b), (left.format, right.format), weights)
    if left.format == right.format:
        watcher.stage("comparing outputs")
        verdict.outputs = left.compare_outputs(right)
    if weights.prefixes != ("", ""):
        taken = [
            f"{prefix!r} off the names of {side}" for prefix, side in zip(weights.prefixes, "AB", strict=True) if prefix
        ]
        verdict.notes.append(f"took {' and '.join(taken)} to make them match")
    return verdict


def compare_weights(a: Carrier, b: Carrier, *, match_prefix: bool = False, watcher: Watcher = SILENT) -> Comparison:
    """Compare every tensor of two networks, split weights multiplied back, one tensor in memory at a time.

    Args:
        a: one network.
        b: the other.
        match_prefix: take a leading prefix that all names of one side share off them where that makes more match.
        watcher: is shown each tensor.
    """
    left, right = a.effective(), b.effective()
    result = Comparison()
    if match_prefix:
        result.prefixes = _prefixes(left, right)
    other = {name.removeprefix(result.prefixes[1]): name for name in right}
    for name in watcher.each(left):
        match = other.pop(name.removeprefix(result.prefixes[0]), None)
        if match is None:
            result.only_a.append(name)
            continue
        x, y = left[name](), right[match]()
        if x.shape != y.shape or x.dtype != y.dtype:
            result.differing.append(Difference(name, 0, None))
            continue
        result.compared += 1
        count = differing_bits(x, y)
        if count:
            result.differing.append(Difference(name, count, ulp_distance(x, y)))
    result.only_b = list(other.values())
    return result


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of elements of two tensors of one shape and dtype that differ in any bit (NaN equals the same NaN)."""
    return int((_as_bits(a) != _as_bits(b)).sum())


def ulp_distance(a: Tensor, b: Tensor) -> int | None:
    """The largest number of representable values between two elements.

    None for tensors that are not floating, and where one side has NaN or infinity and the other has not.
    """
    if not a.is_floating_point() or a.element_size() < 2 or bool((a.isfinite() != b.isfinite()).any()):
        return None
    return int((_ordered(a) - _ordered(b)).abs().max())


def _prefixes(left: Mapping[str, object], right: Mapping[str, object]) -> tuple[str, str]:
    """What to take off the names of each side so that most match: nothing, or all that they share."""
    shared = (_shared_prefix(left), _shared_prefix(right))
    choices = [("", ""), (shared[0], ""), ("", shared[1]), shared]
    return max(choices, key=lambda choice: _matches(left, right, choice))


def _matches(left: Iterable[str], right: Iterable[str], prefixes: tuple[str, str]) -> int:
    return len({n.removeprefix(prefixes[0]) for n in left} & {n.removeprefix(prefixes[1]) for n in right})


def _shared_prefix(names: Iterable[str]) -> str:
    """The leading components that all names share, with the dot; never the last component of a name."""
    heads = [name.split(".")[:-1] for name in names]
    if not heads:
        return ""
    low, high = min(heads), max(heads)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return "".join(f"{part}." for part, _ in shared)


def _as_bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    if t.is_complex():
        t = torch.view_as_real(t).contiguous()
    return t if t.dtype == torch.bool else bits.as_integers(t)


def _ordered(t: Tensor) -> Tensor:
    """Integers in the order of the floats: -0.0 and 0.0 both become 0."""
    integers = _as_bits(t)
    low = torch.iinfo(integers.dtype).min
    return torch.where(integers < 0, low - integers.long(), integers.long())
