"""Small tensors worked on together come out as they do one by one, whatever some of them hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_stream_engine import data, load, store
from wnconvert import weightnorm
from wnconvert.errors import NotSplittable, PairError
from wnconvert.files.raw import Raw
from wnconvert.sites import RowCounts
from wnconvert.stream import batches, engine, fileio
from wnconvert.stream.plan import Compare, Fold, Pair, Place, Split, Stored, Task
from wnconvert.stream.work import Mismatch, mismatch_of

FORMS: list[tuple[tuple[int, ...], Any, int]] = [
    ((4, 6), 0, 1),
    ((4, 6), 1, 1),
    ((4, 6), None, 1),
    ((4, 3, 2), (0, 2), 1),
    ((4, 3, 2), (0, 2), 2),
    ((5,), 0, 1),
    ((2, 1), 0, 1),
]
"""Shape, axis and groups."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights(shape: tuple[int, ...], dtype: torch.dtype, what: str = "plain") -> list[Tensor]:
    """Forty weights. Some of the others have zeros, negative zeros and numbers at the edge, or numbers that are none.

    Together they would take their random directions from each other's names.
    """
    generator = torch.Generator().manual_seed(len(shape))
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(40)]
    if what == "edges":
        made[3] = torch.zeros(shape, dtype=dtype)
        made[5] = -made[3]
        made[7] = torch.full(shape, torch.finfo(dtype).tiny, dtype=dtype)
    if what == "none":
        made[11].view(-1)[0] = float("nan")
    return made


def split_alone(w: Tensor, axis: Any, groups: int, name: str) -> tuple[Tensor, Tensor] | str:
    try:
        return weightnorm.split(w, axis, groups=groups, name=name)
    except NotSplittable as problem:
        return str(problem)


@pytest.mark.parametrize("what", ["plain", "edges", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_splits(form: tuple[tuple[int, ...], Any, int], dtype: torch.dtype, what: str, tmp_path: Path) -> None:
    shape, axis, groups = form
    made = weights(shape, dtype, what)
    alone = [split_alone(w, axis, groups, f"{i}.weight") for i, w in enumerate(made)]
    size = made[0].nbytes
    fileio.create(tmp_path / "g", 40 * size)
    fileio.create(tmp_path / "v", 40 * size)
    tasks: list[Task] = []
    for i, w in enumerate(made):
        stored, out = store(tmp_path / f"w{i}", w), (Place(tmp_path / half, i * size) for half in "gv")
        tasks.append(Split(f"{i}.weight", stored, axis, groups, stored.dtype, *out))
    results = engine.run(tasks)
    for i, expected in enumerate(alone):
        outcome = engine.outcome_of(results[i])
        if isinstance(expected, str):
            assert outcome == expected
            continue
        g, v = expected
        assert outcome == weightnorm.row_counts(g, dtype)
        assert (tmp_path / "g").read_bytes()[i * size :][: g.nbytes] == data(g)
        assert (tmp_path / "v").read_bytes()[i * size :][: v.nbytes] == data(v)
    assert (what != "plain") == any(engine.outcome_of(results[i]) != RowCounts(0, 0) for i in range(40))


def pairs(folder: Path, form: tuple[tuple[int, ...], Any, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Pair]]:
    """Pairs, some of them trained, and the weights that they are."""
    folded, stored = [], []
    for i, w in enumerate(weights(form[0], dtype)):
        g, v = weightnorm.split(w, form[1], groups=form[2])
        g = g * 1.25 if i % 3 else g
        folded.append(weightnorm.fold(g, v))
        stored.append(Pair(f"{i}.weight", store(folder / f"g{i}", g), store(folder / f"v{i}", v)))
    return folded, stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_folds_and_comparisons(form: tuple[tuple[int, ...], Any, int], dtype: torch.dtype, tmp_path: Path) -> None:
    folded, stored = pairs(tmp_path, form, dtype)
    out, size = tmp_path / "out", folded[0].nbytes
    fileio.create(out, 40 * size)
    engine.run([Fold(pair, Place(out, i * size)) for i, pair in enumerate(stored)])
    assert out.read_bytes() == b"".join(map(data, folded))

    plain = [Stored(Raw(out, i * size, size), pair.v.dtype, pair.v.shape) for i, pair in enumerate(stored)]
    again = [Compare(pair.name, pair, w) for pair, w in zip(stored, plain, strict=True)]
    assert engine.run([*again, *(Compare(pair.name, w, w) for pair, w in zip(stored, plain, strict=True))]) == {}
    changed = load(out, folded[0], 17 * size)
    changed.view(-1)[1] = torch.nextafter(changed.view(-1)[1], torch.tensor(9.0, dtype=dtype))
    with out.open("r+b") as file:
        file.seek(17 * size)
        file.write(data(changed))
    found = engine.run(again)
    assert list(found) == [17]
    assert mismatch_of(found[17]) == Mismatch(1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_pair_that_cannot_be_multiplied_is_named(value: float, tmp_path: Path) -> None:
    _, stored = pairs(tmp_path, FORMS[0], torch.float32)
    g = torch.ones(4, 1)
    g[2] = value
    store(tmp_path / "g9", g)
    fileio.create(tmp_path / "out", 4000)
    with pytest.raises(PairError, match=r"^9\.weight: row 2 of g"):
        engine.run([Fold(pair, Place(tmp_path / "out", i * 96)) for i, pair in enumerate(stored)])


def test_small_ones_go_together_and_large_ones_alone() -> None:
    small, large = (Stored(Raw(Path("x"), 0, 4 * n), "float32", (n, 1)) for n in (8, batches.SMALL + 1))
    tasks: list[Task] = [Compare("a", stored, stored) for stored in (small, large, small, large, small)]
    jobs = list(batches.jobs(tasks))
    assert sorted(sorted(task for task, _ in job.parts) for job in jobs) == [[0, 2, 4], [1], [3]]
    assert sum(job.size for job in jobs) == engine.size(tasks)
