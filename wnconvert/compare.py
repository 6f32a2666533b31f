"""Whether two networks are the same function: by their weights, and by their outputs where they can be run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wnconvert import files
from wnconvert.bits import differing_bits, ulp_distance
from wnconvert.carriers import Carrier
from wnconvert.errors import NothingToDo
from wnconvert.files import ReadOptions
from wnconvert.ranks import ALONE, Ranks, shares
from wnconvert.report.verdict import Comparison, Difference, Verdict
from wnconvert.stream.plan import Checksum, Compare, InFile, Pair, Stored
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from torch import Tensor

    from wnconvert.stream.receipts import Receipts
    from wnconvert.stream.work import Result

_Side: TypeAlias = "Callable[[], Tensor]"


def compare_files(
    a: Path, b: Path, reading: ReadOptions = ReadOptions(), watcher: Watcher = SILENT, crew: Ranks = ALONE
) -> Verdict:
    """Find out whether two files of any formats hold the same function.

    Names that differ only by a leading prefix on one side (`generator.`) are matched, and the verdict says so.

    Args:
        a: a file.
        b: another.
        reading: how to open them.
        watcher: is told how far it is.
        crew: the processes that all call this. They divide folders of several files; anything else is for rank 0.

    Raises:
        InputError: a file cannot be read, or one of its pairs cannot be multiplied back.
        NothingToDo: neither file holds a tensor.
    """
    # Optimizer state is no part of the function.
    reading = dataclasses.replace(reading, drop_optimizer=True)
    if not crew.agreed(lambda: files.recognise(a).folders and files.recognise(b).folders):
        return crew.first(lambda: _compare_files(a, b, reading, watcher, ALONE))
    return _compare_files(a, b, reading, watcher, crew)


def _compare_files(a: Path, b: Path, reading: ReadOptions, watcher: Watcher, crew: Ranks) -> Verdict:
    watcher.stage("reading")
    left, right = crew.agreed(lambda: (files.read(a, reading), files.read(b, reading)))
    watcher.stage("comparing weights")
    weights = compare_weights(left.carrier, right.carrier, match_prefix=True, watcher=watcher, crew=crew)
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


def compare_weights(
    a: Carrier,
    b: Carrier,
    *,
    match_prefix: bool = False,
    receipts: Receipts | None = None,
    watcher: Watcher = SILENT,
    crew: Ranks = ALONE,
) -> Comparison:
    """Compare every tensor of two networks, split weights multiplied back, one tensor in memory at a time,
    or a piece of one where both sides lie in files.

    Args:
        a: one network.
        b: the other.
        match_prefix: take a leading prefix that all names of one side share off them where that makes more match.
        receipts: where `b` was made of `a` just now, what was computed for it. What has a receipt is only read back.
        watcher: is shown each tensor.
        crew: the processes that all call this with the same networks, and each look at some of the tensors.
    """
    left, right = a.effective(), b.effective()
    result = Comparison()
    if match_prefix:
        result.prefixes = _prefixes(left, right)
    other = {name.removeprefix(result.prefixes[1]): name for name in right}
    matches = {name: other.pop(name.removeprefix(result.prefixes[0]), None) for name in left}
    result.only_a = [name for name, match in matches.items() if match is None]
    result.only_b = list(other.values())
    pairs = {name: (left[name], right[match]) for name, match in matches.items() if match is not None}
    sizes = {name: x.size() if isinstance(x, InFile) else 0 for name, (x, _) in pairs.items()}
    mine = set(shares(sizes, crew.count)[crew.rank])
    share = {name: sides for name, sides in pairs.items() if name in mine}
    compared: dict[str, Difference | None] = {}
    for found in crew.together(lambda: _compare_each(share, watcher, receipts)):
        compared |= found
    result.differing = [difference for name in pairs if (difference := compared[name]) is not None]
    result.compared = len(compared) - sum(not difference.comparable for difference in result.differing)
    return result


def _compare_each(
    pairs: Mapping[str, tuple[_Side, _Side]], watcher: Watcher, receipts: Receipts | None
) -> dict[str, Difference | None]:
    stored = [Compare(name, *found) for name, sides in pairs.items() if (found := _in_files(*sides)) is not None]
    compared = _compare_stored(stored, watcher, receipts) if stored else {}
    for name in watcher.each([name for name in pairs if name not in compared]):
        x, y = pairs[name]
        compared[name] = _compare_loaded(name, x(), y())
    return compared


def _in_files(a: object, b: object) -> tuple[Stored | Pair, Stored | Pair] | None:
    """Both sides where they lie in files and can be compared a piece at a time."""
    x, y = (side.source() if isinstance(side, InFile) else None for side in (a, b))
    if x is None or y is None or _form(x) != _form(y):
        return None
    same_rows = not isinstance(x, Pair) or not isinstance(y, Pair) or x.g.shape == y.g.shape
    return (x, y) if same_rows else None


def _form(side: Stored | Pair) -> tuple[str, tuple[int, ...], int]:
    stored = side.v if isinstance(side, Pair) else side
    return stored.dtype, stored.shape, stored.raw.size


def _compare_stored(tasks: list[Compare], watcher: Watcher, receipts: Receipts | None) -> dict[str, Difference | None]:
    """Compare what lies in files: by bytes and checksums at first, then by values where these differ."""
    from wnconvert.stream import engine

    found: dict[str, Difference | None] = {task.name: None for task in tasks}
    proofs = {task.name: receipts.proof(task.a, task.b) if receipts else None for task in tasks}
    parts = [part for task in tasks if proofs[task.name] is None for part in _parts(task)]
    written = [(name, receipt) for name, proof in proofs.items() for receipt in proof or ()]
    results = engine.run([*parts, *(Checksum(receipt.raw) for _, receipt in written)], watcher)
    unknown = {
        name
        for i, (name, receipt) in enumerate(written, len(parts))
        if engine.sum_of(results.get(i, [])).crc != receipt.crc
    }
    for i, part in enumerate(parts):
        difference = _difference(part.name, results.get(i, []))
        if difference is not None and part.whether:
            unknown.add(part.name)
        elif difference is not None:
            found[part.name] = difference
    return found | _compare_values([task for task in tasks if task.name in unknown], watcher)


def _parts(task: Compare) -> list[Compare]:
    """The halves of two pairs: if their bytes are equal, they need not be multiplied, and some pairs cannot be."""
    a, b = task.a, task.b
    if not isinstance(a, Pair) or not isinstance(b, Pair) or _form(a.g) != _form(b.g):
        return [task]
    return [Compare(task.name, a.g, b.g, whether=True), Compare(task.name, a.v, b.v, whether=True)]


def _compare_values(tasks: list[Compare], watcher: Watcher) -> dict[str, Difference | None]:
    if not tasks:
        return {}
    from wnconvert.stream import engine

    results = engine.run(tasks, watcher)
    return {task.name: _difference(task.name, results.get(i, [])) for i, task in enumerate(tasks)}


def _difference(name: str, parts: Iterable[Result]) -> Difference | None:
    from wnconvert.stream import work

    mismatch = work.mismatch_of(parts)
    return None if mismatch is None else Difference(name, mismatch.values, mismatch.ulp)


def _compare_loaded(name: str, x: Tensor, y: Tensor) -> Difference | None:
    if x.shape != y.shape or x.dtype != y.dtype:
        return Difference(name, 0, None)
    count = differing_bits(x, y)
    return Difference(name, count, ulp_distance(x, y)) if count else None


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
