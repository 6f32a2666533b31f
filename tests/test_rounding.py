"""Half types are rounded once, also next to the middle between two values."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from wnconvert import bfloat16_rows, half_types, weightnorm
from wnconvert.errors import NotSplittable
from wnconvert.rounding import HALF, once

dtypes = pytest.mark.parametrize("dtype", HALF)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_formula(patch: pytest.MonkeyPatch, g: Tensor, v: Tensor) -> Tensor:
    with patch.context() as without:
        without.setattr(half_types, "suits", lambda _: False)
        return weightnorm.fold(g, v)


class Taken:
    """Counts the parts that float32 decided, and those that it did not, with rows left to `half_types` alone."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = [0, 0]
        multiply = half_types.Products.multiply

        def counted(products: half_types.Products, *args: Any, **options: Any) -> bool:
            done = multiply(products, *args, **options)
            self.counts[not done] += 1
            return done

        patch.setattr(half_types.Products, "multiply", counted)
        patch.setattr(bfloat16_rows, "suits", lambda *_: False)


# --- rounding once ----------------------------------------------------------------------------------------------------


def hard_values(dtype: torch.dtype) -> Tensor:
    """Middles between two values, what lies next to them, and the edges of the format."""
    info = torch.finfo(dtype)
    all_values = torch.arange(0x7FFF, dtype=torch.int16).view(dtype).double()
    finite = all_values[all_values.isfinite()]
    middles = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.tensor([info.max + (info.max - finite[-2].item()) / 2])])
    near = [middles * (1 + sign * 2.0**-k) for k in range(20, 53) for sign in (-1, 1)]
    values = torch.cat([finite, middles, *near, torch.tensor([5e-324, 1e-320, 1e300, math.inf])])
    return torch.cat([values, -values])


@dtypes
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    values = hard_values(dtype)
    assert reference.same_bits(once(values, dtype), reference.once(values, dtype))
    # torch's own goes by way of float32, so this test could not tell it apart if it had no values to do so.
    assert not reference.same_bits(values.to(dtype), reference.once(values, dtype))
    assert once(torch.tensor([math.nan], dtype=torch.float64), dtype).isnan().all()


def test_float64_is_rounded_to_float16_as_numpy_does() -> None:
    values = hard_values(torch.float16)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(values.numpy().astype(np.float16))
    assert reference.same_bits(once(values, torch.float16), expected)


def test_a_trained_float16_weight_is_rounded_as_numpy_does() -> None:
    v = torch.randn(2000, 512, generator=seeded(0)).half()
    g = (v.double().norm(dim=1, keepdim=True) * 1.37).half()
    exact = g.double() * v.double() / v.double().square().sum(1, keepdim=True).sqrt()
    assert reference.same_bits(weightnorm.fold(g, v), torch.from_numpy(exact.numpy().astype(np.float16)))


# --- float32 against the formula --------------------------------------------------------------------------------------


@st.composite
def directions(draw: st.DrawFn) -> tuple[Tensor, int | tuple[int, ...] | None]:
    """Weights of any layout: of ordinary values, of few bits (whose products are often in the middle), with zeros."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    generator = seeded(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(HALF))
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        w = (w * 4).round() / 4
    if draw(st.booleans()):
        w = w * (torch.rand(shape, generator=generator) < 0.3)
    if draw(st.booleans()):
        w = w * torch.pow(2.0, torch.randint(-140, 4, shape, generator=generator).double())
    w = (w * draw(st.sampled_from((1.0, 1e-3, 2.0**-14, 2.0**-60, 1e3)))).to(dtype)
    order = draw(st.permutations(range(len(shape))))
    w = w.permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    axis = draw(st.sampled_from([None, *range(len(shape)), *itertools.combinations(range(len(shape)), 2)]))
    return w, axis


@settings(deadline=None, max_examples=400)
@given(
    directions(),
    st.sampled_from((0.5, 1.0, 1.5, 1.37, -3.0, 1e-6)),
    st.booleans(),
    st.sampled_from((weightnorm.BLOCK, 5000, 700)),
    st.integers(0, 2**20),
)
def test_float32_gives_what_the_formula_gives(
    found: tuple[Tensor, int | tuple[int, ...] | None], factor: float, wider: bool, block: int, seed: int
) -> None:
    w, axis = found
    with pytest.MonkeyPatch.context() as patch:
        try:
            g, v = weightnorm.split(w, axis, g_dtype=torch.float32 if wider else None)
        except NotSplittable:
            return
        trained = torch.rand(g.shape, generator=seeded(seed)) < 0.7
        g = torch.where(trained, g.double() * factor, g.double()).to(g.dtype)
        if not g.isfinite().all() or not g.to(v.dtype).isfinite().all():
            return
        assert reference.same_bits(weightnorm.fold(g, v, block=block), by_formula(patch, g, v))


@pytest.mark.parametrize(("shape", "axis"), [((3, 200_000), (0,)), ((5, 7, 11_111), None), ((4, 90_000, 2), (0, 2))])
@dtypes
def test_rows_longer_than_a_block_are_rounded_once(
    dtype: torch.dtype, shape: tuple[int, ...], axis: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, v = weightnorm.split(torch.randn(shape, generator=seeded(7)).to(dtype), axis)
    g = g * 1.37
    by_rows = weightnorm.fold(g, v, block=80_000)
    counted = Taken(monkeypatch)
    result = weightnorm.fold(g, v, block=80_000)
    assert reference.same_bits(result, by_rows)
    assert counted.counts[0] > 3 and not counted.counts[1]
    assert reference.same_bits(result, by_formula(monkeypatch, g, v))
    assert reference.same_bits(result, reference.fold(g, v, axis))


@pytest.mark.parametrize("across", [False, True])
@dtypes
def test_float32_is_not_trusted_next_to_the_middle(
    dtype: torch.dtype, across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some rows, elements come as near to the middle between two values as their magnitude allows."""
    v = torch.randn(600, 1024, generator=seeded(1), dtype=torch.float64).to(dtype)
    v = v.t().contiguous().t() if across else v
    norm = v.double().square().sum(1, keepdim=True).sqrt()
    step = torch.finfo(dtype).eps * torch.exp2((v[:, :1].double() * 1.3).abs().log2().floor())
    middle = ((v[:, :1].double() * 1.3 / step).floor() + 0.5) * step
    g = (middle * norm / v[:, :1].double()).float()
    g[torch.arange(600) % 8 > 0] *= 1.01
    by_rows = weightnorm.fold(g, v)
    counted = Taken(monkeypatch)
    result = weightnorm.fold(g, v)
    assert reference.same_bits(result, by_rows)
    assert counted.counts == [2, 0]
    assert reference.same_bits(result, by_formula(monkeypatch, g, v))
    assert reference.same_bits(result, reference.fold(g, v, (0,)))


@dtypes
def test_float32_decides_ordinary_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also such with zeros, and with rows of zeros whose magnitude is zero."""
    v = torch.randn(512, 1000, generator=seeded(2)).to(dtype)
    v[::3, ::7] = 0
    v[5] = 0
    g = (v.double().norm(dim=1, keepdim=True) * torch.rand(512, 1, generator=seeded(3), dtype=torch.float64)).to(dtype)
    counted = Taken(monkeypatch)
    result = weightnorm.fold(g, v)
    assert counted.counts == [1, 0]
    assert reference.same_bits(result, reference.fold(g, v, (0,)))


@pytest.mark.parametrize("factor", [2.0**-41, 2.0**41])
def test_factors_that_float32_may_not_hold_are_left_to_the_formula(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = torch.randn(8, 50, generator=seeded(4)).bfloat16()
    g = (v.double().norm(dim=1, keepdim=True) * factor).float()
    counted = Taken(monkeypatch)
    assert reference.same_bits(weightnorm.fold(g, v), reference.fold(g, v, (0,)))
    assert counted.counts == [0, 0]


@pytest.mark.parametrize("row_major", [True, False])
def test_products_that_are_subnormal_in_float32_are_rounded_once(
    row_major: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have fewer bits there, and may come to lie in the middle between two values of bfloat16."""
    v = torch.randn(64, 1000, generator=seeded(5)).bfloat16()
    v[:, ::50] = (v[:, ::50].double() * torch.exp2(-torch.linspace(76, 136, 20, dtype=torch.float64))).bfloat16()
    v[:, 1::50] = 0
    v = v if row_major else v.t().contiguous().t()
    g = (v.double().norm(dim=1, keepdim=True) * 0.37).bfloat16()
    counted = Taken(monkeypatch)
    result = weightnorm.fold(g, v)
    assert counted.counts == [1, 0]
    assert reference.same_bits(result, reference.fold(g, v, (0,)))


@dtypes
def test_where_the_library_is_imported_does_not_matter(dtype: torch.dtype) -> None:
    """A tensor that a module makes for itself would be on the device that is the default at that moment."""
    name = str(dtype)
    code = f"""
        import torch
        with torch.device("meta"):
            from wnconvert import weightnorm
        v = torch.arange(1.0, 65.0).view(4, 16).to({name})
        print(weightnorm.fold(torch.full((4, 1), 3.0), v).sum().isfinite().item())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_weight_that_is_all_middles_is_left_to_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    v = torch.ones(64, 64).bfloat16()
    g = torch.full((64, 1), 8.03125)
    counted = Taken(monkeypatch)
    result = weightnorm.fold(g, v)
    assert counted.counts == [0, 1]
    assert reference.same_bits(result, reference.fold(g, v, (0,)))


def test_elements_left_to_the_formula_do_not_pile_up() -> None:
    # One row of 24 M elements, of which one in twenty comes to lie in the middle, in every other run.
    code = """
    import resource, torch
    from wnconvert import weightnorm
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    v = torch.zeros(1, 3 << 23, dtype=torch.bfloat16)
    rows = v.view(-1, 256)
    rows[:, :13] = 1.0078125
    g = torch.full((1, 1), 1.5 * (13 * len(rows) * 1.0078125**2) ** 0.5, dtype=torch.float64)
    weightnorm.fold(torch.ones(1, 1), torch.ones(1, 1 << 20, dtype=torch.bfloat16))
    before = peak()
    weightnorm.fold(g, v)
    print(peak() - before - 48)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 24
