"""The arithmetic of weight normalization, `w = g * v / ||v||` (Salimans & Kingma 2016, arXiv 1602.07868, eq. 2).

`split` and `fold` are exact inverses, bit for bit:

- `g` is the norm computed in float64 and rounded once; `v` is `w` itself.
- `fold` computes `g * v / ||v||` in float64 and rounds once. Where `g` still is the rounded norm of `v`, nothing has
  trained and the row is `v` itself.

That needs one norm that never changes, see `norms`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wnconvert import checks, directions, eager, half_types, norms, powers, products, rows
from wnconvert.checks import DTYPES
from wnconvert.errors import NotSplittable, UsageError
from wnconvert.rounding import once
from wnconvert.sites import Axis, RowCounts, pair_axis

__all__ = ["BLOCK", "DTYPES", "RowCounts", "compose", "fold", "pair_axis", "row_counts", "split"]

BLOCK = 1 << 19
"""Elements worked on at a time: few enough to stay in the cache, and enough to outweigh the calls into torch."""

_TOGETHER = 8
"""Blocks whose rows are looked at together: what is done for each row takes longer to call than to do."""

SCRATCH = 2 * BLOCK + half_types.SPARE
"""Elements of float64 memory to work in that suffice for a block."""


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
    lengths = norms.of_rows(view, kept, block, _scratch(w, block, scratch))
    g, changed = magnitudes(lengths, g_dtype or w.dtype, w.dtype, first)
    v = w
    if changed.numel() and view.numel():
        v = w if overwrite else w.clone(memory_format=torch.preserve_format)
        directions.replace(rows.by_rows(v, axis, groups)[0], kept, changed, lengths, name=name, first=first)
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
    together = _TOGETHER * block
    for part, target in zip(rows.parts(view, kept, together), rows.parts(out, kept, together), strict=True):
        norm = norms.of_rows(part, kept, block, scratch)
        magnitude = g[done : done + norm.numel()]
        checks.require_directions(norm, magnitude, name, first + done)
        products.fold_rows(magnitude, part, norm, target, kept=kept, block=block, scratch=scratch)
        done += norm.numel()
    return w


def require_pair(g: Tensor, v: Tensor, *, name: str = "weight") -> None:
    """Raise the `PairError` that `fold` would raise, without making the weight."""
    groups, axis = checks.open_pair(g, v, name)
    view, kept, _ = rows.by_rows(v.detach(), axis, groups)
    lengths = norms.of_rows(view, kept, BLOCK, _scratch(view, BLOCK))
    checks.require_directions(lengths, g.detach().reshape(-1), name)


def magnitudes(lengths: Tensor, g_dtype: torch.dtype, dtype: torch.dtype, first: int) -> tuple[Tensor, Tensor]:
    """What `split` makes of the norms of some rows: `g` as one axis, and the numbers of the rows that need another `v`.

    `g` tells which, because `fold` has nothing else to know them by.

    Raises:
        NotSplittable: see `split`.
    """
    g = once(lengths, g_dtype)
    if powers.ordinary(g, dtype):
        return g, torch.empty(0, dtype=torch.long, device=g.device)
    checks.require(lengths.isfinite(), NotSplittable, "row {} holds NaN or infinity", first)
    # A wider g could hold more, but `fold` takes no magnitude that v's dtype cannot hold.
    finite = g.isfinite() & g.to(dtype).isfinite()
    checks.require(finite, NotSplittable, f"the norm of row {{}} overflows {str(dtype).removeprefix('torch.')}", first)
    size = g.double()
    return g, ((size == 0) | powers.outside(size, dtype)).nonzero().flatten()


def require_slab(g: Tensor, lengths: Tensor, dtype: torch.dtype, *, name: str, first: int) -> None:
    """Raise the `PairError` that `fold` would raise for rows with these norms."""
    checks.require_magnitudes(g, dtype, name, first)
    checks.require_directions(lengths, g, name, first)


def fold_slab(g: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Put the folded columns `v`, some columns of rows with these norms, into `v` itself.

    Args:
        g: as one axis.
        v: `[rows, ...]`.
        lengths: norms of the whole rows, as one axis.
    """
    products.fold_rows(g, v, lengths, v, kept=1, block=v.numel(), scratch=_scratch(v, v.numel()))


def row_counts(g: Tensor, dtype: torch.dtype) -> RowCounts:
    """Count the zero rows and the rescaled rows of a freshly split weight of this dtype from its `g`."""
    if powers.ordinary(g.detach(), dtype):
        return RowCounts(0, 0)
    size = g.detach().double().abs()
    zero = size == 0
    return RowCounts(int(zero.sum()), int((powers.outside(size, dtype) & ~zero).sum()))


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
    return norms.of_rows(view, count, BLOCK, _scratch(view, BLOCK)).reshape(norm.shape)


def _scratch(w: Tensor, block: int, given: Tensor | None = None) -> Tensor:
    """One float64 buffer for all the work: fresh memory for every block would scatter over the heap and add up."""
    size = 2 * max(min(block, w.numel()), rows.SEGMENT) + half_types.SPARE
    return torch.empty(size, dtype=torch.float64, device=w.device) if given is None or given.numel() < size else given
