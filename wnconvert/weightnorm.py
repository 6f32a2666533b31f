"""The arithmetic of weight normalization, `w = g * v / ||v||` (Salimans & Kingma 2016, arXiv 1602.07868, eq. 2).

This is the only file that computes a norm. `split` and `fold` are exact inverses, bit for bit:

- `g` is the norm computed in float64 and rounded once; `v` is `w` itself.
- `fold` computes `g * v / ||v||` in float64 and rounds once. Where `g` still is the rounded norm of `v`, nothing has
  trained and the row is `v` itself.

That needs one norm that never changes: squares are added in a fixed tree over the logical order of the elements, with
elementwise additions only. Memory layout, block size, number of threads and device cannot change its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from wnconvert import checks, eager, powers, rows, sums
from wnconvert.checks import DTYPES
from wnconvert.directions import Direction, signed
from wnconvert.errors import NotSplittable, UsageError
from wnconvert.sites import Axis, RowCounts, pair_axis

__all__ = ["BLOCK", "DTYPES", "RowCounts", "compose", "fold", "pair_axis", "row_counts", "split"]

BLOCK = 1 << 19
"""Elements worked on at a time: 4 MB in float64, which stays in the cache and outweighs the calls into torch."""


def split(
    w: Tensor,
    axis: Axis,
    *,
    groups: int = 1,
    name: str = "weight",
    g_dtype: torch.dtype | None = None,
    block: int = BLOCK,
    first: int = 0,
    overwrite: bool = False,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Split a weight into magnitude and direction so that `fold` gives it back bit for bit.

    Args:
        w: float64, float32, float16 or bfloat16, any shape.
        axis: the axis (or axes) that keep one magnitude per index; `None` for one magnitude in all.
        groups: above 1, `w` is seen as `[groups, shape[0] / groups, *shape[1:]]` and `axis` refers to that view
            (a grouped transposed convolution keeps `(0, 2)`).
        name: seeds the direction of zero rows, so that the same file always gives the same bytes.
        g_dtype: dtype of `g` where it is not w's own (graphs that compute a half-type norm in float32).
        block: elements worked on at a time.
        first: number of its first row, where `w` holds some rows of a larger weight: rows do not depend on one another.
        overwrite: change single rows of `w` itself instead of a copy.
        scratch: float64 memory to work in; taken anew if None, or where it does not suffice.

    Returns:
        `g`, with 1 on every reduced axis (0-d for axis None), and `v`, of w's shape. `v` shares the memory
        of `w`, unless single rows had to change.

    Raises:
        NotSplittable: NaN, infinity, a norm that overflows the dtype, or a dtype without a norm.
    """
    if w.dtype not in DTYPES:
        raise NotSplittable(f"dtype {str(w.dtype).removeprefix('torch.')} has no weight normalization")
    if w.is_meta or w.layout != torch.strided:
        raise NotSplittable("has no data (meta device)" if w.is_meta else f"is {w.layout}, not strided")
    if groups > 1 and (not w.dim() or w.shape[0] % groups):
        raise UsageError(f"{groups} groups do not divide a weight of shape {list(w.shape)}")
    w = w.detach()
    view, kept, g_shape = rows.by_rows(w, axis, groups)
    norms = _norms(view, kept, block, scratch)
    g, changed = slab_magnitudes(norms, g_dtype or w.dtype, w.dtype, first)
    v = w
    if changed and view.numel():
        v = w if overwrite else w.clone(memory_format=torch.preserve_format)
        target = rows.by_rows(v, axis, groups)[0]
        for row in changed:
            index = rows.row_index(row, view.shape[:kept])
            if norms[row] == 0:
                (direction,) = Direction(name, first + row, view[index].numel()).pieces(view[index].numel())
                target[index] = signed(direction, view[index])
            else:
                target[index] = powers.scaled_direction(view[index], float(norms[row]), first + row)
    return g.reshape(g_shape), v


def fold(
    g: Tensor,
    v: Tensor,
    *,
    name: str = "weight",
    block: int = BLOCK,
    first: int = 0,
    overwrite: bool = False,
    scratch: Tensor | None = None,
) -> Tensor:
    """Multiply magnitude and direction back into one weight, each element rounded once.

    Rows that `split` had to scale by a power of two (their norm leaves the range in which a runtime can square it) come
    back exactly too. They are recognised by their values, so a trained pair that looks like one is treated as one.

    Args:
        g: magnitudes, in one of the shapes that `split` gives for v's shape. Its dtype may be wider than v's.
        v: directions.
        name: named in the error.
        block: elements worked on at a time.
        first: number of its first row, where the pair holds some rows of a larger one.
        overwrite: put the result into `v` itself.
        scratch: see `split`.

    Returns:
        A tensor of v's shape, dtype and memory format, new unless it is `v`.

    Raises:
        PairError: the shapes or dtypes are not a pair, a value is NaN or infinite, or a row of `v` is zero where `g`
            is not.
    """
    groups, axis = checks.open_pair(g, v, name, first)
    g, v = g.detach().reshape(-1), v.detach()
    w = v if overwrite else torch.empty_like(v, memory_format=torch.preserve_format)
    view, kept, _ = rows.by_rows(v, axis, groups)
    out = rows.by_rows(w, axis, groups)[0]
    scratch, done = _scratch(v, block, scratch), 0
    for part, target in zip(rows.parts(view, kept, block), rows.parts(out, kept, block), strict=True):
        norm = _norm(part, kept, scratch)
        magnitude = g[done : done + norm.numel()]
        checks.require_directions(norm, magnitude, name, first + done)
        _fold_part(magnitude, part, norm, target, kept=kept, scratch=scratch)
        done += norm.numel()
    return w


def require_pair(g: Tensor, v: Tensor, *, name: str = "weight") -> None:
    """Raise the `PairError` that `fold` would raise, without making the weight."""
    groups, axis = checks.open_pair(g, v, name)
    view, kept, _ = rows.by_rows(v.detach(), axis, groups)
    checks.require_directions(_norms(view, kept, BLOCK), g.detach().reshape(-1), name)


def _out_of_range(norms: Tensor, dtype: torch.dtype) -> list[int]:
    """Rows that need another `v` than their own values."""
    low, high = powers.SAFE_NORM[dtype]
    return cast("list[int]", ((norms == 0) | (norms < low) | (norms > high)).nonzero().flatten().tolist())


def slab_norms(read: Callable[[int, int], Tensor], columns: int, dtype: torch.dtype, *, width: int) -> Tensor:
    """The float64 norms of some rows, bit for bit, that are read a few columns at a time.

    Args:
        read: gives a new float64 tensor `[rows, stop - start]` with the columns `start..stop` of the rows.
        columns: of the rows.
        dtype: of the weight.
        width: columns to read at a time.
    """
    exponent: Tensor | None = None
    if dtype == torch.float64:
        largest = torch.zeros((), dtype=dtype)
        for start in range(0, columns, width):
            x = read(start, min(start + width, columns))
            largest = torch.maximum(largest, torch.maximum(x.amax(1), -x.amin(1)))
        exponent = powers.exponents(largest.reshape(-1, 1), 1).reshape(-1, 1)
    totals = torch.empty(0, dtype=torch.float64)
    for i, start in enumerate(range(0, columns, rows.SEGMENT)):
        total = _segment_total(read, start, min(start + rows.SEGMENT, columns), exponent, width)
        if not i:
            # Made once: small tensors that stay would scatter the large ones between them over the heap.
            totals = torch.empty(total.shape[0], -(-columns // rows.SEGMENT), dtype=torch.float64)
        totals[:, i] = total
    norm = sums.tree(totals).sqrt()
    return norm if exponent is None else powers.ldexp(norm, exponent[:, 0])


def _segment_total(
    read: Callable[[int, int], Tensor], start: int, stop: int, exponent: Tensor | None, width: int
) -> Tensor:
    def squares(first: int, last: int) -> Tensor:
        x = read(start + first, start + last)
        return (x if exponent is None else powers.ldexp(x, -exponent)).square_()

    return sums.tree_by_pieces(squares, stop - start, width)


def slab_magnitudes(norms: Tensor, g_dtype: torch.dtype, dtype: torch.dtype, first: int) -> tuple[Tensor, list[int]]:
    """What `split` makes of the norms of some rows: `g` as one axis, and the rows that need another `v`.

    Raises:
        NotSplittable: see `split`.
    """
    checks.require(norms.isfinite(), NotSplittable, "row {} holds NaN or infinity", first)
    g = norms.to(g_dtype)
    # A wider g could hold more, but `fold` takes no magnitude that v's dtype cannot hold.
    finite = g.isfinite() & g.to(dtype).isfinite()
    checks.require(finite, NotSplittable, f"the norm of row {{}} overflows {str(dtype).removeprefix('torch.')}", first)
    return g, _out_of_range(norms, dtype)


def require_slab(g: Tensor, norms: Tensor, dtype: torch.dtype, *, name: str, first: int) -> None:
    """Raise the `PairError` that `fold` would raise for rows with these norms."""
    checks.require_magnitudes(g, dtype, name, first)
    checks.require_directions(norms, g, name, first)


def fold_slab(g: Tensor, v: Tensor, norms: Tensor) -> None:
    """Put the folded columns `v`, some columns of rows with these norms, into `v` itself.

    Args:
        g: as one axis.
        v: `[rows, ...]`.
        norms: of the whole rows, as one axis.
    """
    _fold_part(g, v, norms, v, kept=1, scratch=_scratch(v, v.numel()))


def row_counts(g: Tensor, dtype: torch.dtype) -> RowCounts:
    """Count the zero rows and the rescaled rows of a freshly split weight of this dtype from its `g`."""
    low, high = powers.SAFE_NORM[dtype]
    size = g.detach().double().abs()
    zero = int((size == 0).sum())
    return RowCounts(zero, int(((size < low) | (size > high)).sum()) - (zero if low > 0 else 0))


def compose(g: Tensor, v: Tensor, reduced: tuple[int, ...] | None, *, like: Tensor | None = None) -> Tensor:
    """Compute `g * v / ||v||` with gradients, for the forward pass of a training step.

    The ratio `g / ||v||` is taken as 1 where it is 1 within the rounding of `g`, so that a fresh pair gives `v` bit
    for bit; every other element is within 1 ulp of `fold` (2 in float64, where both round more than once).

    Args:
        g: magnitudes, shaped to broadcast against `v`.
        v: directions.
        reduced: the axes of `v` to sum over, all of them if None.
        like: a tensor to read dtype and device from where `v` is a tracer's stand-in.
    """
    like = v if like is None else like
    if like is v and eager.is_plain():
        return cast("Tensor", _Compose.apply(g, v, reduced))  # type: ignore[no-untyped-call]
    return _composed(v, _ratio(g, v, reduced, like)[1], like.dtype)


class _Compose(torch.autograd.Function):
    """The same formula with its gradient by hand (section 2 of the paper), in half the passes over memory."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, reduced: tuple[int, ...] | None) -> Tensor:
        norm, ratio = _ratio(g, v, reduced, v)
        ctx.save_for_backward(g, v, norm, ratio)
        ctx.reduced = reduced
        return _composed(v, ratio, v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        g, v, norm, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For a second derivative the norm must depend on v.
            norm, ratio = _ratio(g, v, ctx.reduced, v)
        narrow = v.dtype if v.dtype == torch.float64 else torch.float32
        dw, direction, length = grads[0].to(narrow), v.to(narrow), norm.to(narrow)
        product = dw * direction
        along = (product if ctx.reduced == () else product.sum(ctx.reduced, keepdim=ctx.reduced is not None)) / length
        dv = torch.addcmul(dw, direction, along / length, value=-1) * ratio.to(narrow)
        return along.to(g.dtype), dv.to(v.dtype), None


def _ratio(g: Tensor, v: Tensor, reduced: tuple[int, ...] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of `v` in a wider type, and `g / ||v||`, exactly 1 where `g` is the rounded norm."""
    wide = torch.float64 if _has_exact_norm(like) else torch.float32
    if reduced == ():
        norm = v.abs().to(wide)
    else:
        norm = torch.linalg.vector_norm(v, dim=reduced, keepdim=reduced is not None, dtype=wide)
    # Half an ulp, and a little for the norm's own rounding: more would let a trained row differ from fold by 2 ulp.
    near = 0.5 + 2**-7
    if like.dtype == torch.float64 and like is v and eager.is_plain():
        # float64 has no wider type to hide the order of the additions in, so take the one norm that never changes.
        norm = norm + (_norm_like(norm, v, reduced) - norm).detach()
    elif like.dtype == torch.float64:
        # A graph has to do with torch's norm, which is 100 ulp off for rows of a million elements.
        near = 2.0**8
    ratio = g / norm
    fresh = (ratio - 1).abs() <= torch.finfo(like.dtype).eps * near
    # ratio + (1 - ratio) is exactly 1 this close to 1, and the gradient stays that of the ratio: the rest is a multiple
    # of 2**-60, so rounding it to one changes nothing but its derivative. Exported graphs lose a detach.
    rest = torch.where(fresh, 1 - ratio, 0)
    return norm, ratio + (rest * 2.0**60).round() * 2.0**-60


def _composed(v: Tensor, ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """`v * ratio` with the ratio rounded to float32 or float64 and the product rounded once to v's dtype."""
    return (v * ratio.to(dtype if dtype == torch.float64 else torch.float32)).to(dtype)


def _has_exact_norm(v: Tensor) -> bool:
    # MPS has no float64; half types are summed in float32, 2^13 times finer than they are.
    return v.dtype in (torch.float32, torch.float64) and v.device.type != "mps"


def _norm_like(norm: Tensor, v: Tensor, reduced: tuple[int, ...] | None) -> Tensor:
    kept = None if reduced is None else tuple(i for i in range(v.dim()) if i not in reduced)
    view, count, _ = rows.by_rows(v.detach(), kept, 1)
    return _norms(view, count, BLOCK).reshape(norm.shape)


def _scratch(w: Tensor, block: int, given: Tensor | None = None) -> Tensor:
    """One float64 buffer for all the work: fresh memory for every block would scatter over the heap and add up."""
    size = max(min(block, w.numel()), rows.SEGMENT)
    return torch.empty(size, dtype=torch.float64, device=w.device) if given is None or given.numel() < size else given


def _norms(view: Tensor, kept: int, block: int, scratch: Tensor | None = None) -> Tensor:
    """The float64 norms of all rows, in order, as one axis."""
    norms = torch.empty(math.prod(view.shape[:kept]), dtype=torch.float64, device=view.device)
    scratch, first = _scratch(view, block, scratch), 0
    for part in rows.parts(view, kept, block):
        norm = _norm(part, kept, scratch)
        norms[first : first + norm.numel()] = norm
        first += norm.numel()
    return norms


def _norm(part: Tensor, kept: int, scratch: Tensor) -> Tensor:
    """The float64 norm of each row of one part, as one axis. Overwrites `scratch`."""
    count = math.prod(part.shape[:kept])
    columns = part.numel() // count
    if columns == 0:
        return torch.zeros(count, dtype=torch.float64, device=part.device)
    # Only float64 itself can leave the range of float64 when squared; scaling by a power of two is exact.
    exponent = powers.exponents(part, kept).reshape(count, 1) if part.dtype == torch.float64 else None
    totals = torch.empty(count, -(-columns // rows.SEGMENT), dtype=torch.float64, device=part.device)
    for i in range(totals.shape[1]):
        start, stop = i * rows.SEGMENT, min((i + 1) * rows.SEGMENT, columns)
        if count > 1:
            shaped, segment = rows.workspace(scratch, part, kept)
            shaped.copy_(part)
        else:
            segment = scratch[: stop - start].view(1, -1)
            rows.copy_range(part, start, stop, segment[0])
        if exponent is not None:
            segment.copy_(powers.ldexp(segment, -exponent))
        totals[:, i] = sums.tree(segment.square_())
    norm = sums.tree(totals).sqrt()
    return norm if exponent is None else powers.ldexp(norm, exponent[:, 0])


def _fold_part(g: Tensor, v: Tensor, norm: Tensor, out: Tensor, *, kept: int, scratch: Tensor) -> None:
    """Write the folded rows of one part into `out`, a piece at a time if it is one long row. Overwrites `scratch`."""
    fresh = norm.to(g.dtype) == g
    if bool(fresh.all()):
        # The result may go into v itself.
        if out.data_ptr() != v.data_ptr():
            out.copy_(v)
        return
    multiply, divide = _factors(g, norm, v.dtype, fresh)
    # g * v may leave the range of float64 although the weight does not; v / ||v|| cannot.
    wide = (multiply.abs() > 2.0**400) | (divide > 2.0**400) | (divide < 2.0**-400)
    extreme = v.dtype == torch.float64 and bool(wide.any())
    count = norm.numel()
    shape = (*v.shape[:kept], *(1,) * (v.dim() - kept)) if count > 1 else ()
    multiply, divide, wide = (t.reshape(shape) for t in (multiply, divide, wide))
    step = max(v.numel(), 1) if count > 1 else rows.SEGMENT
    for start in range(0, v.numel(), step):
        stop = min(start + step, v.numel())
        for x, y in zip(rows.pieces(v, start, stop), rows.pieces(out, start, stop), strict=True):
            w = rows.workspace(scratch, x, kept if count > 1 else 0)[0].copy_(x).mul_(multiply).div_(divide)
            y.copy_(torch.where(wide, multiply * (x / divide), w) if extreme else w)


def _factors(g: Tensor, norm: Tensor, dtype: torch.dtype, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, what to multiply `v` by and then divide it by: `(g, ||v||)`, or a pair that gives `w` exactly.

    - Where `g` is the rounded norm, nothing has trained: `(1, 1)`. That includes rows of zeros.
    - Where `split` scaled `v` by a power of two: that power, taken back.
    """
    power = powers.recognise(g, norm, dtype)
    first, second = powers.factors(power)
    multiply = torch.where(power != 0, first, g.double())
    divide = torch.where(power != 0, 1 / second, norm)
    return torch.where(fresh, 1.0, multiply), torch.where(fresh, 1.0, divide)
