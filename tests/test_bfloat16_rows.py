"""Rows of bfloat16 come to what float64 makes of them, for every value that there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import same_bits
from wnconvert import bfloat16_rows, products, rows, weightnorm
from wnconvert.rounding import once

EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
EVERY = EVERY.where(EVERY.isfinite(), 0)

factors = st.floats(2.0**-39, 2.0**39).flatmap(lambda x: st.sampled_from([x, -x]))


@st.composite
def near_the_middle(draw: st.DrawFn) -> float:
    """A factor whose product with some value comes close to the middle between two values of some exponent."""
    significand, kept = draw(st.integers(128, 255)), draw(st.integers(0, 8))
    middle = (2 * draw(st.integers(0, 2**kept - 1)) + 1 + 2 ** (kept + 1)) / 2 ** (kept + 1)
    off = draw(st.integers(-40, 40)) * 2.0**-28
    return middle * (1 + off) / significand * 2.0 ** draw(st.integers(-20, 20))


def undecided(factor: Tensor) -> Tensor:
    return bfloat16_rows.undecided(factor, torch.empty(rows.SEGMENT, dtype=torch.float64))


def products_in_float32(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    bfloat16_rows.multiply(x, factor, out)
    return out


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(factors, near_the_middle(), st.sampled_from([1.0, -0.25, 0.0, -0.0])), min_size=1, max_size=6)
)
def test_decided_rows_are_those_of_float64_for_every_value(chosen: list[float]) -> None:
    factor = torch.tensor(chosen, dtype=torch.float64)
    x = EVERY.repeat(len(chosen), 1)

    decided = ~undecided(factor)
    found = products_in_float32(x, factor)

    assert same_bits(found[decided], once(x.double() * factor.unsqueeze(1), torch.bfloat16)[decided])


def test_rows_that_float32_gets_wrong_are_left_also_for_subnormal_products() -> None:
    # Products near middles, of normal and of all subnormal exponents, by less than float32 tells.
    significands = torch.arange(129, 256, 14, dtype=torch.float64)
    middles = torch.tensor([1 + (2 * 37 % 2**kept + 1) / 2 ** (kept + 1) for kept in range(8)], dtype=torch.float64)
    off = 1 + torch.tensor([-1, 1], dtype=torch.float64) * 2.0**-27
    factor = (middles[:, None, None] * off[:, None] / significands).flatten()
    x = EVERY.repeat(factor.numel(), 1)
    exact = once(x.double() * factor.unsqueeze(1), torch.bfloat16)

    wrong = products_in_float32(x, factor).view(torch.int16) != exact.view(torch.int16)

    assert bool(undecided(factor)[wrong.any(1)].all())
    normal = exact.abs() >= 2.0**-126
    assert bool((wrong & normal).any())
    assert bool((wrong & ~normal).any())


def test_most_rows_are_decided() -> None:
    factor = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5

    share = float(undecided(factor).double().mean())

    assert 0.02 < share < 0.06
    assert not undecided(torch.tensor([1.0, -1.0, 2.0**-30, 0.0, -0.0], dtype=torch.float64)).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(factors, near_the_middle()), min_size=4, max_size=40), st.integers(0, 1 << 30))
def test_rows_of_either_sort_come_to_their_places(chosen: list[float], seed: int) -> None:
    factor = torch.tensor(chosen, dtype=torch.float64)
    order = torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(seed))
    v = EVERY[order].view(-1, 1024)[: len(chosen)].clone()
    # As magnitudes and norms that make these factors: what is asked for here is the product.
    g, norm = torch.ones(len(chosen), dtype=torch.float64), 1 / factor
    expected = once(v.double() * (g / norm).unsqueeze(1), torch.bfloat16)
    for out in (torch.empty_like(v), v):
        products.fold_rows(g, v, norm, out, kept=1, block=2048, scratch=torch.empty(weightnorm.SCRATCH).double())
        assert same_bits(out, expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    v = torch.randn(40, 2049, generator=torch.Generator().manual_seed(0)).bfloat16()
    g = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = weightnorm.fold(g, v)
    before = torch.get_default_dtype()
    bfloat16_rows._exact.cache_clear()
    try:
        torch.set_default_dtype(default)
        found = weightnorm.fold(g, v)
        assert bfloat16_rows._exact()
    finally:
        torch.set_default_dtype(before)
    assert same_bits(found, expected)


@pytest.mark.parametrize("problem", ["other", "missing"])
def test_a_torch_that_multiplies_in_another_way_is_not_asked(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: object, out: tuple[Tensor, ...], **_: object) -> None:
        if problem == "missing":
            raise TypeError("no such argument")
        out[0].zero_()

    v = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    g = torch.tensor([[1.5], [2.5], [3.5]]).bfloat16()
    expected = weightnorm.fold(g, v)
    bfloat16_rows._exact.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "native_batch_norm", other)
        assert not bfloat16_rows._exact()
        assert same_bits(weightnorm.fold(g, v), expected)
    bfloat16_rows._exact.cache_clear()
    assert bfloat16_rows._exact()
