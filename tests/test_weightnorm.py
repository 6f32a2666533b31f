"""The numeric contract: exact inverses, one rounding, and what happens at the edges of the number formats."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from wnconvert import powers, weightnorm
from wnconvert.errors import NotSplittable, PairError, UsageError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@st.composite
def weights(draw: st.DrawFn, scales: tuple[float, ...] = (1.0,)) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """A weight of rank 1 to 6 in any dtype and layout, and the axes to keep (None for none)."""
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 4, 7, 16]), min_size=1, max_size=6).filter(lambda s: math.prod(s) <= 4096)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    w = (torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from(scales))).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "channels_last", "strided"]))
    if layout == "transposed":
        w = w.permute(*draw(st.permutations(range(w.dim()))))
    elif layout == "channels_last" and w.dim() == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        w = torch.stack([w, w], -1)[..., 0]
    axes = st.lists(st.integers(0, w.dim() - 1), min_size=1, unique=True).map(lambda a: tuple(sorted(a)))
    return w, draw(st.none() | axes)


SCALES = (1.0, 0.0, 1e-30, 1e30, 1e-40, 1e-44, 1e-310, 1e300, 1e-5, 6e4)


@settings(max_examples=400, deadline=None)
@given(weights(SCALES), st.sampled_from([1, 5, 64, 1 << 19]))
def test_fold_of_split_is_the_weight_bit_for_bit(case: tuple[torch.Tensor, tuple[int, ...] | None], block: int) -> None:
    w, kept = case
    try:
        g, v = weightnorm.split(w, kept)
    except NotSplittable as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        overflows = not reference.norm(w, kept).to(w.dtype).isfinite().all()
        assert overflows or "exponent range" in reason
        return
    assert g.dtype == w.dtype
    assert tuple(g.shape) == (() if kept is None else tuple(n if i in kept else 1 for i, n in enumerate(w.shape)))
    assert reference.same_bits(weightnorm.fold(g, v, block=block), w)
    again = weightnorm.split(w, kept, block=block)
    assert reference.same_bits(again[0], g)
    assert reference.same_bits(again[1], v)


@settings(max_examples=300, deadline=None)
@given(weights(), st.integers(0, 2**31))
def test_fold_of_a_trained_pair_is_the_float64_value_rounded_once(
    case: tuple[torch.Tensor, tuple[int, ...] | None], seed: int
) -> None:
    w, kept = case
    g, v = weightnorm.split(w, kept)
    generator = torch.Generator().manual_seed(seed)
    g = (g.double() * torch.randn(g.shape, generator=generator, dtype=torch.float64)).to(w.dtype)
    v = (v.double() + 0.1 * torch.randn(v.shape, generator=generator, dtype=torch.float64)).to(w.dtype)
    folded, expected = weightnorm.fold(g, v), reference.fold(g, v, kept)
    if w.dtype == torch.float64:
        # The reference is float64 itself here, so its own sum may be off by the last bit.
        assert reference.ulp(folded, expected) <= 4
    else:
        assert int((reference.bits(folded) != reference.bits(expected)).sum()) == 0


@settings(max_examples=200, deadline=None)
@given(weights(), st.integers(0, 2**31))
def test_the_training_forward_agrees_with_fold(case: tuple[torch.Tensor, tuple[int, ...] | None], seed: int) -> None:
    w, kept = case
    g, v = weightnorm.split(w, kept)
    reduced = None if kept is None else tuple(i for i in range(w.dim()) if i not in kept)
    assert reference.same_bits(weightnorm.compose(g, v, reduced), w)
    generator = torch.Generator().manual_seed(seed)
    g = (g.double() * (1 + torch.randn(g.shape, generator=generator, dtype=torch.float64))).to(w.dtype)
    v = (v.double() * (1 + 0.2 * torch.randn(v.shape, generator=generator, dtype=torch.float64))).to(w.dtype)
    # In float64 there is no wider type to round from: both sides carry two roundings of their own.
    assert reference.ulp(weightnorm.compose(g, v, reduced), weightnorm.fold(g, v)) <= (
        2 if w.dtype == torch.float64 else 1
    )


@dtypes
def test_the_training_forward_stays_within_an_ulp_where_g_almost_is_the_norm(dtype: torch.dtype) -> None:
    # Near g == ||v|| the forward takes the ratio as 1; that must not reach further than the rounding of g.
    v = torch.randn(4096, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    g = reference.norm(v, (0,)).to(dtype)
    for _ in range(4):
        g = (
            torch.nextafter(g.float(), torch.tensor(math.inf)).to(dtype)
            if dtype == torch.float32
            else g * (1 + torch.finfo(dtype).eps)
        )
        assert reference.ulp(weightnorm.compose(g, v, (1,)), weightnorm.fold(g, v)) <= (
            2 if dtype == torch.float64 else 1
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_fresh_half_precision_row_is_never_taken_for_a_trained_one(dtype: torch.dtype) -> None:
    # Of half a million rows some have a norm within float32 rounding of the middle between two values.
    w = torch.randn(500_000, 6, generator=torch.Generator().manual_seed(15)).to(dtype)
    g, v = weightnorm.split(w, 0)
    assert reference.same_bits(weightnorm.compose(g, v, (1,)), w)
    assert reference.same_bits(weightnorm.fold(g, v), w)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_fold_and_torch_differ_by_no_more_than_the_rounding_of_torch(dim: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(48, 24, 9, generator=generator)
    g, _ = weightnorm.split(v, dim)
    g = g * (1 + 0.3 * torch.randn(g.shape, generator=generator))
    kept = None if dim is None else (dim,)
    ours, theirs = weightnorm.fold(g, v), torch._weight_norm(v, g, -1 if dim is None else dim)
    exact = g.double() * v.double() / reference.norm(v, kept)
    assert bool(((ours.double() - exact).abs() <= (theirs.double() - exact).abs()).all())
    assert reference.ulp(ours, theirs) <= reference.ulp(theirs, exact.float())


def test_magnitude_may_be_wider_than_direction() -> None:
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    g, v = weightnorm.split(w, 0, g_dtype=torch.float32)
    assert g.dtype == torch.float32
    assert reference.same_bits(g, reference.norm(w, (0,)).float())
    assert reference.same_bits(weightnorm.fold(g, v), w)
    assert reference.same_bits(weightnorm.fold(2 * g, v), 2 * w) or reference.ulp(weightnorm.fold(2 * g, v), 2 * w) <= 1


@dtypes
def test_zero_rows_get_a_random_unit_direction_and_an_exact_zero(dtype: torch.dtype) -> None:
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    w[1] = 0
    w[4] = 0
    w[4, 2] = -0.0
    g, v = weightnorm.split(w, 0, name="conv.weight")
    assert weightnorm.row_counts(g, dtype) == (2, 0)
    assert g.flatten()[[1, 4]].tolist() == [0, 0]
    assert reference.norm(v, (0,)).flatten()[[1, 4]].tolist() == pytest.approx([1, 1], rel=4 * torch.finfo(dtype).eps)
    assert not torch.equal(v[1], v[4].abs())
    assert reference.same_bits(weightnorm.fold(g, v), w)
    assert reference.same_bits(weightnorm.compose(g, v, (1, 2)), w)
    assert reference.same_bits(weightnorm.split(w, 0, name="conv.weight")[1], v)
    assert not torch.equal(weightnorm.split(w, 0, name="other.weight")[1], v)
    rest = [0, 2, 3, 5]
    assert reference.same_bits(v[rest], w[rest])


def test_zero_rows_can_train() -> None:
    g, v = (t.requires_grad_() for t in weightnorm.split(torch.zeros(2, 4), 0))
    weightnorm.compose(g, v, (1,)).square().sum().add(weightnorm.compose(g, v, (1,)).sum()).backward()
    assert g.grad is not None
    assert v.grad is not None
    assert bool(g.grad.isfinite().all() and v.grad.isfinite().all() and (g.grad != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-130, 2.0**100])
def test_rows_out_of_range_are_scaled_so_that_no_runtime_gives_nan(dtype: torch.dtype, scale: float) -> None:
    w = torch.randn(4, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    w[2] *= scale
    w = w.to(dtype)
    g, v = weightnorm.split(w, 0)
    assert weightnorm.row_counts(g, dtype) == (0, 1)
    assert 1 <= float(reference.norm(v, (0,))[2]) < 2
    assert reference.same_bits(v[[0, 1, 3]], w[[0, 1, 3]])
    assert reference.same_bits(weightnorm.fold(g, v), w)
    # float32 squares, as any runtime takes them, of the unscaled row would be 0 or infinite.
    naive = g.float() * v.float() / v.float().pow(2).sum(1, keepdim=True).sqrt()
    assert bool(naive.isfinite().all() and (naive[2] != 0).any())
    assert reference.ulp(weightnorm.compose(g, v, (1,)), w) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_norm_rounds_to_the_edge_of_the_range_come_back(dtype: torch.dtype) -> None:
    for edge in powers.SAFE_NORM[dtype]:
        rows = torch.zeros(40, 3, dtype=torch.float64)
        rows[:, 0] = edge
        # From far below to far above half of the last place of the edge.
        rows[:, 1] = edge * torch.pow(2.0, torch.arange(-39, 1).double() * 0.75)
        w = torch.cat([rows, rows * (1 - torch.finfo(dtype).eps), rows / 2**0.5]).to(dtype)
        g, v = weightnorm.split(w, 0)
        assert reference.same_bits(weightnorm.fold(g, v), w)
        changed = int((v != w).any(1).sum())
        assert sum(weightnorm.row_counts(g, dtype)) == changed
        assert 0 < changed < len(w)


def test_every_subnormal_row_comes_back() -> None:
    smallest = torch.tensor(2.0**-149, dtype=torch.float64)
    rows = torch.cartesian_prod(*[torch.arange(-4, 5)] * 3).double()
    w = (rows * smallest).float()
    assert reference.same_bits(weightnorm.fold(*weightnorm.split(w, 0)), w)
    w = (rows * 2.0**-1074).to(torch.float64)
    assert reference.same_bits(weightnorm.fold(*weightnorm.split(w, 0)), w)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@dtypes
def test_values_that_are_no_numbers_are_refused_by_row(bad: float, dtype: torch.dtype) -> None:
    w = torch.ones(5, 3, dtype=dtype)
    w[3, 1] = bad
    with pytest.raises(NotSplittable, match="row 3 holds NaN or infinity"):
        weightnorm.split(w, 0)
    with pytest.raises(PairError, match=r"^c\.weight: row 3 of v holds NaN or infinity$"):
        weightnorm.fold(torch.ones(5, 1, dtype=dtype), w, name="c.weight", block=1)
    g = torch.ones(5, 1, dtype=dtype)
    g[3] = bad
    with pytest.raises(PairError, match=r"^c\.weight: row 3 of g is NaN or infinite$"):
        weightnorm.fold(g, torch.ones(5, 3, dtype=dtype), name="c.weight")


def test_a_norm_that_overflows_half_precision_is_refused() -> None:
    w = torch.full((300, 300), 300.0).half()
    with pytest.raises(NotSplittable, match="norm of row 0 overflows float16"):
        weightnorm.split(w, None)
    g, v = weightnorm.split(w, 0)
    assert reference.same_bits(weightnorm.fold(g, v), w)


def test_a_wider_magnitude_is_refused_where_fold_would_not_take_it_back() -> None:
    w = torch.full((2, 4), 60000.0, dtype=torch.float16)

    with pytest.raises(NotSplittable, match="norm of row 0 overflows float16"):
        weightnorm.split(w, 0, g_dtype=torch.float32)


def test_a_row_too_wide_to_scale_is_refused() -> None:
    w = torch.tensor([[1e38, 1e-38]])
    with pytest.raises(NotSplittable, match="row 0 spans more than the exponent range"):
        weightnorm.split(w, 0)


def test_a_zero_direction_with_a_magnitude_is_an_error_and_without_one_a_zero() -> None:
    v = torch.tensor([[1.0, 2.0], [0.0, -0.0]])
    with pytest.raises(PairError, match="row 1 of v is zero but its g is not"):
        weightnorm.fold(torch.tensor([[1.0], [1.0]]), v)
    folded = weightnorm.fold(torch.tensor([[1.0], [0.0]]), v)
    assert reference.same_bits(folded[1], v[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(NotSplittable, match="has no weight normalization"):
        weightnorm.split(torch.zeros(2, 2).to(dtype), 0)
    with pytest.raises(PairError, match="must be float64"):
        weightnorm.fold(torch.zeros(2, 1).to(dtype), torch.zeros(2, 2).to(dtype))


@pytest.mark.parametrize(("shape", "axis"), [((0, 4), 0), ((4, 0), 0), ((0,), 0), ((3, 0, 2), None), ((2, 0), (0, 1))])
def test_empty_tensors(shape: tuple[int, ...], axis: weightnorm.Axis) -> None:
    w = torch.zeros(shape)
    g, v = weightnorm.split(w, axis)
    assert weightnorm.fold(g, v).shape == shape


@pytest.mark.parametrize(
    ("g", "v"),
    [((3, 1), (4, 2)), ((4,), (4, 2)), ((4, 1, 1), (4, 2)), ((3, 1, 1), (4, 2)), ((1, 4), (4, 2)), ((4, 3), (4, 2))],
)
def test_shapes_that_are_no_pair_are_refused_by_name(g: tuple[int, ...], v: tuple[int, ...]) -> None:
    if g == (4, 1, 1):  # four groups of one row each: a pair
        assert weightnorm.pair_axis(g, v) == (4, 0)
        return
    with pytest.raises(PairError, match=r"conv\.weight: g of shape .* are not a pair"):
        weightnorm.fold(torch.ones(g), torch.ones(v), name="conv.weight")


@pytest.mark.parametrize(
    ("g", "v", "axis"),
    [
        ((8, 1, 1), (8, 4, 3), 0), ((1, 4, 1), (8, 4, 3), 1), ((1, 1, 3), (8, 4, 3), 2), ((), (8, 4, 3), None),
        ((8, 1, 3), (8, 4, 3), (0, 2)), ((1, 1, 1), (8, 4, 3), ()), ((1, 1, 1), (1, 4, 3), 0), ((8,), (8,), 0),
    ],
)  # fmt: skip
def test_the_axis_follows_from_the_shapes(g: tuple[int, ...], v: tuple[int, ...], axis: weightnorm.Axis) -> None:
    assert weightnorm.pair_axis(g, v) == (1, axis)
    w = torch.randn(v, generator=torch.Generator().manual_seed(6))
    split_g, _ = weightnorm.split(w, axis)
    assert tuple(split_g.shape) == g
    assert reference.same_bits(weightnorm.fold(split_g, w), w)


def test_an_axis_out_of_range_is_named() -> None:
    with pytest.raises(UsageError, match="axis 2 is out of range for a weight with 2 axes"):
        weightnorm.split(torch.ones(2, 2), 2)


def test_groups_keep_one_magnitude_per_group_and_output() -> None:
    w = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(7))  # ConvTranspose1d(6, 8, 3, groups=2)
    g, v = weightnorm.split(w, (0, 2), groups=2)
    assert g.shape == (2, 1, 4, 1)
    expected = w.reshape(2, 3, 4, 3).double().pow(2).sum((1, 3), keepdim=True).sqrt().float()
    assert torch.equal(g, expected)
    assert reference.same_bits(weightnorm.fold(g, v), w)
    doubled = weightnorm.fold(g * 3, v)
    assert reference.ulp(doubled, 3 * w) <= 1


@pytest.mark.parametrize("axis", [0, 1, None])
def test_long_rows_are_summed_in_segments_without_changing_a_bit(axis: int | None) -> None:
    w = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(8))
    g, v = weightnorm.split(w, axis)
    assert torch.equal(g, reference.norm(w, None if axis is None else (axis,)).float())
    for block in (1 << 10, 1 << 16, 1 << 22):
        assert reference.same_bits(weightnorm.split(w.t().contiguous().t(), axis, block=block)[0], g)
        assert reference.same_bits(weightnorm.fold(g, v, block=block), w)
        assert reference.same_bits(
            weightnorm.fold(-g, v, block=block), reference.fold(-g, v, None if axis is None else (axis,))
        )


def test_the_number_of_threads_changes_no_bit() -> None:
    w = torch.randn(700, 900, generator=torch.Generator().manual_seed(9))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append([weightnorm.split(w, axis)[0] for axis in (0, 1, None)])
            assert reference.same_bits(
                weightnorm.fold(results[-1][1] * 1.5, w), weightnorm.fold(results[0][1] * 1.5, w)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(reference.same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_fold_keeps_the_memory_format(memory: torch.memory_format) -> None:
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=memory)
    g, v = weightnorm.split(w, 0)
    assert v.data_ptr() == w.data_ptr()
    assert weightnorm.fold(g, v).stride() == w.stride()


def test_memory_does_not_grow_with_the_tensor() -> None:
    # One row of 64 M elements and 64 k rows, 256 MB each: the work needs the result and a few MB.
    code = """
    import resource, torch
    from wnconvert import weightnorm
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weightnorm.fold(*weightnorm.split(torch.ones(2000, 300), 0))
    w = torch.ones(65536, 1024)
    before = peak()
    for axis in (0, 1, None):
        g, _ = weightnorm.split(w, axis)
    split = peak() - before
    weightnorm.fold(g * 2, w)
    print(split, peak() - before - 256)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    split, fold = map(float, out.stdout.split())
    assert split < 48
    assert fold < 48


def test_gradients_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(10)
    v = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    dw = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    weightnorm.compose(g, v, (1,)).backward(dw)
    with torch.no_grad():
        n = reference.norm(v, (0,))
        along = (dw * v).sum(1, keepdim=True) / n
        assert torch.allclose(g.grad, along, rtol=1e-12)  # type: ignore[arg-type]
        assert torch.allclose(v.grad, g / n * (dw - along * v / n), rtol=1e-12)  # type: ignore[arg-type]


def test_a_fresh_pair_has_the_gradients_of_the_formula_too() -> None:
    # The ratio is taken as exactly 1 there, which must not cut the gradient of g off.
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(11), dtype=torch.float32)
    g, v = (t.clone().requires_grad_() for t in weightnorm.split(w, 0))
    dw = torch.randn(4, 9, generator=torch.Generator().manual_seed(12))
    weightnorm.compose(g, v, (1,)).backward(dw)
    along = (dw.double() * w.double()).sum(1, keepdim=True) / reference.norm(w, (0,))
    assert torch.allclose(g.grad.double(), along, rtol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("reduced", [(1, 2), (0, 2), (2,), (0, 1, 2), (), None], ids=str)
def test_first_and_second_derivatives_are_those_of_the_formula(reduced: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(13)
    v = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    shape = () if reduced is None else tuple(1 if i in reduced else n for i, n in enumerate(v.shape))
    g = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: weightnorm.compose(a, b, reduced), (g, v))
    assert torch.autograd.gradgradcheck(lambda a, b: weightnorm.compose(a, b, reduced), (g, v))


@dtypes
@pytest.mark.parametrize("reduced", [(1,), None], ids=str)
def test_gradients_by_hand_are_those_of_autograd(dtype: torch.dtype, reduced: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(14)
    v = torch.randn(16, 50, generator=generator, dtype=torch.float64)
    g = torch.randn(() if reduced is None else (16, 1), generator=generator, dtype=torch.float64)
    dw = torch.randn(16, 50, generator=generator, dtype=torch.float64).to(dtype)
    found, expected = [], []
    for derivatives, cast in ((found, dtype), (expected, torch.float64)):
        a, b = g.to(dtype).to(cast).requires_grad_(), v.to(dtype).to(cast).requires_grad_()
        n = b.pow(2).sum(reduced, keepdim=reduced is not None).sqrt()
        w = weightnorm.compose(a, b, reduced) if derivatives is found else a * b / n
        derivatives.extend(torch.autograd.grad(w, (a, b), dw.to(cast)))
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(ours.double(), exact, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_number_is_a_row_of_its_own(dtype: torch.dtype) -> None:
    w = torch.tensor(-3.0, dtype=dtype)
    g, v = weightnorm.split(w, None)
    assert (float(g), g.shape, v.shape) == (3.0, (), ())
    assert reference.same_bits(weightnorm.fold(g, v), w)
    assert float(weightnorm.fold(2 * g, v)) == -6.0
