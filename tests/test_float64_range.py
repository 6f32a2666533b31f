"""float64 against decimal numbers without a range: nothing is lost but what the result itself cannot hold."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import reference
from wnconvert import powers, rounding, weightnorm

EXACT = decimal.Context(prec=120, Emin=-99999, Emax=99999)

# Any exponent is as likely as another. The norm of a few stays below the largest float64.
numbers = st.builds(math.ldexp, st.floats(0.5, 1, exclude_max=True), st.integers(-1073, 1020))
signed = st.builds(math.copysign, numbers, st.sampled_from([1.0, -1.0]))
# A norm that is subnormal is rounded as far as all subnormal numbers are.
directions = st.lists(signed, min_size=1, max_size=5).filter(lambda v: max(map(abs, v)) >= 2.0**-1022)


def fold(g: float, v: list[float]) -> torch.Tensor:
    x, square = [decimal.Decimal(value) for value in v], decimal.Decimal(0)
    for value in x:
        square = EXACT.add(square, EXACT.multiply(value, value))
    ratio = EXACT.divide(decimal.Decimal(g), EXACT.sqrt(square))
    return torch.tensor([float(EXACT.multiply(value, ratio)) for value in x], dtype=torch.float64)


@settings(max_examples=1000, deadline=None)
@given(signed, directions)
@example(2.0**-100, [2.0**-200, 1.5 * 2.0**-1000])
@example(2.0**-420, [2.0**-300, 1.5 * 2.0**-700])
@example(1.5 * 2.0**1020, [1.5 * 2.0**-1020, 2.0**-1073])
@example(1.5 * 2.0**-1060, [1.5 * 2.0**1019, 2.0**900, 2.0**-1000])
def test_a_product_leaves_the_range_only_where_the_weight_does(g: float, v: list[float]) -> None:
    pair = torch.tensor([[g]], dtype=torch.float64), torch.tensor([v], dtype=torch.float64)
    # The sum of squares, its root, a product and a ratio are rounded.
    assert reference.ulp(weightnorm.fold(*pair)[0], fold(g, v)) <= 4


def test_rows_of_all_sizes_do_not_change_one_another() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-1000, 1000, (500, 2), generator=generator)
    v = torch.ldexp(torch.randn(500, 7, generator=generator, dtype=torch.float64), exponents[:, :1])
    g = torch.ldexp(torch.rand(500, 1, generator=generator, dtype=torch.float64) + 0.5, exponents[:, 1:])
    alone = torch.cat([weightnorm.fold(g[i : i + 1], v[i : i + 1]) for i in range(500)])
    assert reference.same_bits(weightnorm.fold(g, v), alone)


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=70))
def test_roots_are_the_nearest(values: list[float]) -> None:
    # Long enough for the vector library that some builds of torch have.
    x = torch.tensor(values * 9, dtype=torch.float64)
    for value, found in zip(x.tolist(), rounding.root(x).tolist(), strict=True):
        low, high = (Fraction(found) + Fraction(math.nextafter(found, to)) for to in (0.0, math.inf))
        assert low**2 <= 4 * Fraction(value) <= high**2


def test_powers_of_two_are_exact() -> None:
    exponents = range(-1022, 1024)
    assert powers.power(torch.tensor(exponents)).tolist() == [math.ldexp(1.0, n) for n in exponents]
