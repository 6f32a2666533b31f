"""Comparing two networks by weights: what counts as the same, and which names match."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import fake_files
from tests.fake_files import FakeCarrier
from wnconvert.cli import main
from wnconvert.compare import compare_files, compare_weights, differing_bits, ulp_distance
from wnconvert.errors import NothingToDo
from wnconvert.report.verdict import Difference


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(4, 3, generator=generator), "a.bias": torch.zeros(4)}
    return base | {"b.weight": torch.randn(2, 3, generator=generator)} | changes


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **settings: bool):
    return compare_weights(FakeCarrier(a), FakeCarrier(b), **settings)


def test_the_same() -> None:
    found = compare(weights(), weights())

    assert (found.compared, found.identical, found.within(0)) == (3, True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_units_in_the_last_place(dtype: torch.dtype, steps: int) -> None:
    x = torch.tensor([1.0, -1.0, 1e-3, 0.0, -0.0, 1.9999], dtype=dtype)
    y = x.clone()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    y.view(integers)[1] += steps

    assert (differing_bits(x, y), ulp_distance(x, y)) == (1, steps)


def test_around_zero() -> None:
    tiny = torch.tensor([2.0**-149])

    assert ulp_distance(tiny, -tiny) == 2
    assert (differing_bits(torch.tensor([0.0]), torch.tensor([-0.0])), ulp_distance(tiny * 0, -tiny * 0)) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_distance_to_infinity_or_nan(value: float) -> None:
    largest, special = torch.tensor([torch.finfo(torch.float32).max]), torch.tensor([value])

    assert ulp_distance(largest, special) is None
    assert not compare({"x": largest}, {"x": special}).within(1)
    assert compare({"x": special}, {"x": special.clone()}).identical


@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]]
)
def test_large_tensors_are_compared_whole_in_any_layout(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.rand(1100, 1000) + 1
    y = x.clone()
    step = torch.finfo(torch.float32).eps
    for place, steps in (((0, 0), 1), ((1099, 999), 5), ((1047, 3), -2), ((512, 77), 3)):
        x[place] = 1.5
        y[place] = 1.5 + steps * step

    assert differing_bits(layout(x), y) == differing_bits(y, layout(x)) == 4
    assert ulp_distance(layout(x), y) == ulp_distance(y, layout(x)) == 5


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (torch.ones(5), Difference("a.bias", 0, None)),
        (torch.zeros(4, dtype=torch.float16), Difference("a.bias", 0, None)),
        (torch.tensor([0.0, 1.0, 0.0, 0.0]), Difference("a.bias", 1, 0x3F800000)),
    ],
)
def test_what_differs(changed: torch.Tensor, difference: Difference) -> None:
    found = compare(weights(), weights(**{"a.bias": changed}))

    assert found.differing == [difference]
    assert not found.identical


def test_integers_and_booleans_have_no_ulp() -> None:
    a, b = (
        {"n": torch.tensor([1, 2]), "m": torch.tensor([True])},
        {"n": torch.tensor([1, 3]), "m": torch.tensor([False])},
    )

    assert compare(a, b).differing == [Difference("n", 1, None), Difference("m", 1, None)]


def test_one_side_only() -> None:
    extra = weights(extra=torch.ones(1))

    assert compare(extra, weights()).only_a == ["extra"]
    assert compare(weights(), extra).only_b == ["extra"]
    assert not compare(weights(), extra).within(1)


@pytest.mark.parametrize(
    ("left", "right", "prefixes"),
    [
        ("generator.", "", ("generator.", "")),
        ("", "state_dict.model.", ("", "state_dict.model.")),
        ("model.", "module.net.", ("model.", "module.net.")),
        ("model.", "model.", ("", "")),
    ],
)
def test_a_shared_prefix_is_taken_off(left: str, right: str, prefixes: tuple[str, str]) -> None:
    a, b = prefixed(left, weights()), prefixed(right, weights())

    found = compare(a, b, match_prefix=True)

    assert (found.identical, found.compared, found.prefixes) == (True, 3, prefixes)
    assert compare(a, b).identical is (left == right)


def test_a_prefix_is_taken_off_although_one_name_is_missing() -> None:
    fewer = weights()
    del fewer["a.bias"]

    found = compare(prefixed("net.", weights()), fewer, match_prefix=True)

    assert (found.compared, found.only_a, found.prefixes) == (2, ["net.a.bias"], ("net.", ""))


def test_files(tmp_path: Path, fake: object, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    fake_files.write(Path("a.fake"), prefixed("net.", weights()))
    fake_files.write(Path("b.fake"), weights())
    fake_files.write(Path("c.fake"), weights(**{"b.weight": torch.ones(2, 3)}))
    fake_files.write(Path("empty.fake"), {})

    assert compare_files(Path("a.fake"), Path("b.fake")).same
    assert main(["verify", "a.fake", "b.fake"]) == 0
    assert "took 'net.' off the names of A" in capsys.readouterr().out
    assert main(["verify", "b.fake", "c.fake"]) == 3
    assert "b.weight  in 6 values" in capsys.readouterr().out
    assert main(["verify", "b.fake", "c.fake", "-q"]) == 3
    assert capsys.readouterr() == ("", "")
    with pytest.raises(NothingToDo):
        compare_files(Path("empty.fake"), Path("empty.fake"))
