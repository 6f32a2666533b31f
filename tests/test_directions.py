"""Directions for rows that cannot be their own: the same in any cut, and as fast for many rows as for few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference
from wnconvert import directions, weightnorm
from wnconvert.directions import Directions
from wnconvert.errors import NotSplittable


def rows_of_every_sort(count: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows of zeros, of tiny and of huge values in turn, and their norms."""
    w = torch.randn(count, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = (w * torch.tensor([0.0, 2.0**-100, 2.0**100], dtype=torch.float64).repeat(count)[:count, None]).float()
    return w, reference.norm(w, (0,)).flatten()


def test_random_numbers_are_those_of_splitmix64() -> None:
    # The first three of its sequence from the seed 0, as its authors' own program prints them.
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    found = directions._mixed(states)

    assert [hex(word) for word in found.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("step", [50, 777, 70_000])
def test_columns_come_in_any_ranges(step: int) -> None:
    w, lengths = rows_of_every_sort(5, 150_000)
    made = Directions("x", torch.arange(5), lengths, 150_000)

    whole = made.of(w)
    parts = [made.of(w[:, start : start + step], start) for start in range(0, 150_000, step)]

    assert reference.same_bits(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("chosen", [[0], [3, 4], [5, 0], list(range(12))])
def test_rows_do_not_depend_on_one_another(chosen: list[int]) -> None:
    w, lengths = rows_of_every_sort(12, 40)
    whole = Directions("x", torch.arange(12) + 7, lengths, 40).of(w)

    some = Directions("x", torch.tensor(chosen) + 7, lengths[chosen], 40).of(w[chosen])

    assert reference.same_bits(some, whole[chosen])


def test_random_directions_are_unit_vectors_that_differ_by_name_and_row() -> None:
    zeros, lengths = torch.zeros(50, 300, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)

    here = Directions("x", torch.arange(50), lengths, 300).of(zeros)
    there = Directions("y", torch.arange(50), lengths, 300).of(zeros)
    values = torch.cat([here, there]) * 10

    assert torch.allclose(here.square().sum(1), torch.ones(50, dtype=torch.float64), rtol=1e-14)
    assert len({tuple(row) for row in values.tolist()}) == 100
    # Uniform: sqrt(300 / 3) is about their norm before it is taken off.
    assert abs(float(values.mean()) - 0.5) < 0.01
    assert abs(float(values.var()) - 1 / 12) < 0.005
    assert float(torch.corrcoef(values).fill_diagonal_(0).abs().max()) < 0.3
    assert float(here.min()) > 0


class Calls(TorchDispatchMode):
    """Counts calls into torch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("turn", range(3), ids=["zero", "tiny", "huge"])
def test_many_rows_take_no_more_calls_than_few(turn: int) -> None:
    counts = []
    for count in (6, 6000):
        w = rows_of_every_sort(count, 8)[0][turn::3]
        with Calls() as calls:
            weightnorm.split(w, 0)
        counts.append(calls.count)

    assert counts[0] < 150
    # Few rows are added up a column fewer at a time.
    assert counts[1] <= counts[0] + 10


def test_a_row_that_cannot_be_scaled_is_named_among_those_that_can() -> None:
    w, _ = rows_of_every_sort(9000, 8)
    w[8123, :2] = torch.tensor([1e38, 1e-38])

    with pytest.raises(NotSplittable, match="row 8123 spans more than the exponent range"):
        weightnorm.split(w, 0)


def test_long_rows_are_made_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = rows_of_every_sort(3, 1000)
    expected = weightnorm.split(w, 0)
    sizes: list[int] = []
    of = Directions.of

    def counted(made: Directions, values: Tensor, start: int = 0) -> Tensor:
        sizes.append(values.numel())
        return of(made, values, start)

    monkeypatch.setattr(directions, "PIECE", 128)
    monkeypatch.setattr(Directions, "of", counted)
    found = weightnorm.split(w, 0)

    assert max(sizes) == 128
    assert sum(sizes) == w.numel()
    assert all(map(reference.same_bits, found, expected))


@pytest.mark.parametrize("turn", range(3), ids=["zero", "tiny", "huge"])
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (1, 1), (3, 4), (4, 3, 2)])
def test_rows_of_any_memory_layout_come_to_the_same(
    shape: tuple[int, ...], axis: Any, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = rows_of_every_sort(3, 24)[0][turn][: torch.Size(shape).numel()].reshape(shape)
    expected = weightnorm.split(w, axis)
    turned = w.permute(*reversed(range(w.dim()))).contiguous().permute(*reversed(range(w.dim())))

    # An axis of one element may have any stride.
    odd = w.as_strided(shape, [2 * n + 1 if size == 1 else n for size, n in zip(shape, w.stride(), strict=True)])

    for piece in (1, 2, 1 << 15):
        monkeypatch.setattr(directions, "PIECE", piece)
        for same in (w, turned, odd):
            for overwrite in (False, True):
                copy = same.clone().as_strided(shape, same.stride())
                found = weightnorm.split(copy, axis, overwrite=overwrite)
                assert all(map(reference.same_bits, found, expected))
    assert reference.same_bits(weightnorm.fold(*expected), w)
