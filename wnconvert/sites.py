"""What the tool knows of a weight without holding its data: where it is used, and what can be done with it.

A `Use` is one place where a graph consumes a weight. A `Site` is one weight that all its uses agree on. A list of sites
is the dry run, the report and what tests compare. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from wnconvert.errors import PairError, UsageError

Axis = int | tuple[int, ...] | None
"""The axis (or axes) that keep one magnitude per index; None for one magnitude in all."""

Scheme = Literal["legacy", "parametrized"]
"""How a pair is named: `weight_g`/`weight_v`, or `parametrizations.weight.original0`/`original1`."""

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

Dim = int | None | Literal["torch", "out"]
"""Which axis to keep: as torch.nn.utils would, the output unit, a given axis, or None for the whole tensor."""


class RowCounts(NamedTuple):
    """What a split had to do to single rows, read off `g`."""

    zero: int
    """Rows of zeros: `g` is 0 and `v` is a random unit vector."""

    scaled: int
    """Rows whose `v` was scaled by a power of two, because their squares leave the range of the dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """One place where a graph consumes a weight.

    Attributes:
        root: name of the weight tensor after walking back through transposes, casts and the like.
        kind: a row of the table of kinds, such as `Conv2d`.
        where: the layer or node that consumes it.
        axis: the axis of the root that torch.nn.utils.weight_norm would keep.
        out_axis: the axis of the root that indexes output units.
        groups: above 1, `out_axis` refers to the root seen as `[groups, shape[0] / groups, ...]`.
        problem: why this use rules out splitting the weight, or None.
        written: it changes the weight in place, or what a weight norm has computed. That rules out folding too.
    """

    root: str
    kind: str
    where: str
    axis: Axis
    out_axis: Axis
    groups: int = 1
    problem: str | None = None
    written: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """One weight that may be split or folded.

    Attributes:
        name: name of the plain weight, `conv.weight`, also while it is split.
        kind: the kind of its first use.
        shape: of the weight.
        dtype: as in `float32`.
        axis: the axes that keep a magnitude, on the weight seen in `groups`.
        groups: see `Use.groups`.
        state: whether the carrier holds one tensor or a pair.
        scheme: how the pair is named, for a split site that is named at all.
        uses: the layers or nodes that consume it.
        tied: other names of the same tensor.
        evidence: how a kind was inferred where no graph says it.
        skip: why it cannot be converted, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    axis: Axis
    groups: int = 1
    state: Literal["plain", "split"] = "plain"
    scheme: Scheme | None = None
    uses: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    evidence: str | None = None
    skip: str | None = None

    @property
    def g_shape(self) -> tuple[int, ...]:
        """Shape of the magnitude."""
        return g_shape(self.shape, self.axis, self.groups)

    def skipped(self, reason: str) -> Site:
        """The same site with a reason not to touch it; an earlier reason stays."""
        return self if self.skip else dataclasses.replace(self, skip=reason)


def kept_axes(axis: Axis, rank: int) -> tuple[int, ...]:
    """Normalise an axis to ascending non-negative indices.

    Raises:
        UsageError: the axis is out of range.
    """
    if axis is None:
        return ()
    axes = (axis,) if isinstance(axis, int) else axis
    if any(not -rank <= a < rank for a in axes):
        raise UsageError(f"axis {axis} is out of range for a weight with {rank} axes")
    return tuple(sorted({a % rank for a in axes}))


def g_shape(shape: Sequence[int], axis: Axis, groups: int = 1) -> tuple[int, ...]:
    """Shape of the magnitude of a weight: 1 on every reduced axis, 0-d if nothing is kept."""
    if axis is None:
        return ()
    seen = (groups, shape[0] // groups, *shape[1:]) if groups > 1 else tuple(shape)
    kept = kept_axes(axis, len(seen))
    return tuple(n if i in kept else 1 for i, n in enumerate(seen))


def pair_axis(g_shape: Sequence[int], v_shape: Sequence[int], name: str = "weight") -> tuple[int, Axis]:
    """Read off the shapes which axes `g` keeps: `(groups, axis)` as `split` takes them.

    Raises:
        PairError: no choice of axes gives `g` this shape.
    """
    g_shape, v_shape = tuple(g_shape), tuple(v_shape)
    if len(g_shape) == len(v_shape) + 1 and g_shape[0] == 1:
        # One group is no group.
        g_shape = g_shape[1:]
    groups, seen = 1, v_shape
    if v_shape and g_shape and len(g_shape) == len(v_shape) + 1 and g_shape[0] > 0 and v_shape[0] % g_shape[0] == 0:
        groups, seen = g_shape[0], (g_shape[0], v_shape[0] // g_shape[0], *v_shape[1:])
    if g_shape == ():
        return 1, None
    if len(g_shape) != len(seen) or any(a not in (1, b) for a, b in zip(g_shape, seen, strict=True)):
        raise PairError(f"{name}: g of shape {list(g_shape)} and v of shape {list(v_shape)} are not a pair")
    kept = tuple(i for i, (a, b) in enumerate(zip(g_shape, seen, strict=True)) if a == b != 1)
    if not kept:
        # One magnitude for the whole tensor. A layer with one output unit looks the same, and is the likelier reading.
        return groups, 0 if seen[0] == 1 else ()
    return groups, kept[0] if len(kept) == 1 else kept


def resolve(
    uses: Iterable[Use],
    shape: Sequence[int],
    dtype: str,
    *,
    dim: Dim = "torch",
    tied: Sequence[str] = (),
    evidence: str | None = None,
) -> Site:
    """Make one site of all the uses of one plain weight.

    `dim` decides the axis. Uses that disagree on it make the site skipped, with the reason.
    """
    uses = tuple(uses)
    first = uses[0]
    reason = next((use.problem for use in uses if use.problem), None)
    choices = {_choose(use, dim): use for use in reversed(uses)}
    axis, groups = _choose(first, dim)
    if isinstance(dim, int):
        if not -len(shape) <= dim < len(shape):
            reason = reason or f"has {len(shape)} axes, so --dim {dim} does not exist"
            axis = None
        else:
            axis = dim % len(shape)
    elif len(choices) > 1 and reason is None:
        said = ", ".join(f"{use.where} needs axis {axis}" for (axis, _), use in reversed(choices.items()))
        reason = f"its uses disagree on the axis: {said}"
    if reason is None and (not shape or 0 in shape):
        reason = "a scalar has no direction" if not shape else "it is empty"
    if reason is None and g_shape(shape, axis, groups) == tuple(shape) and any(size > 1 for size in shape[1:]):
        # Nothing would tell such a pair from any two tensors of one shape.
        reason = "each of its units has a single value, so a magnitude would be all of it"
    return Site(
        name=first.root,
        kind=first.kind,
        shape=tuple(shape),
        dtype=dtype,
        axis=axis,
        groups=groups,
        uses=tuple(use.where for use in uses),
        tied=tuple(tied),
        evidence=evidence,
        skip=reason,
    )


def _choose(use: Use, dim: Dim) -> tuple[Axis, int]:
    if dim == "torch":
        return use.axis, 1
    if dim == "out":
        return use.out_axis, use.groups
    return dim, 1


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which sites a command works on.

    Attributes:
        include: shell globs on site names; empty means all.
        exclude: shell globs on site names; they win over `include`.
        kinds: shell globs on kinds; empty means every kind but those in `OPT_IN`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def apply(self, sites: Sequence[Site]) -> list[Site]:
        """Return every site, the ones not selected marked as skipped.

        Raises:
            UsageError: a pattern matches nothing.
        """
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(_named(site, (pattern,)) for site in sites):
                    raise UsageError(f"{flag} {pattern!r} matches no weight{_hint(sites)}")
        for pattern in self.kinds:
            if not any(fnmatch.fnmatchcase(site.kind, pattern) for site in sites):
                found = ", ".join(sorted({site.kind for site in sites})) or "none"
                raise UsageError(f"--kind {pattern!r} matches no weight; kinds found: {found}")
        return [self._mark(site) for site in sites]

    def left_out(self, site: Site) -> str | None:
        """Why the patterns leave a site out, or None if they choose it."""
        if self.exclude and _named(site, self.exclude):
            return "excluded"
        if self.include and not _named(site, self.include):
            return "not included"
        if self.kinds and not any(fnmatch.fnmatchcase(site.kind, pattern) for pattern in self.kinds):
            return "of another kind"
        return None

    def _mark(self, site: Site) -> Site:
        reason = self.left_out(site)
        if reason is None and not self.kinds and site.state == "plain" and site.kind in OPT_IN:
            seen = f" ({site.evidence})" if site.kind == "Unknown" and site.evidence else ""
            reason = f"{OPT_IN[site.kind]}{seen}; --kind {site.kind} splits it"
        return site.skipped(reason) if reason else site


OPT_IN = {
    "Embedding": "an embedding, not a layer that multiplies",
    "Unknown": "nothing tells which layer it belongs to",
}
"""Kinds that are listed but only converted when asked for by kind, with what to say of them."""

OVERLAP = "shares memory with {} (a transposed view, a slice or a buffer), which no pair could stand for"
"""Why a weight is left alone that something else reads in another form."""


def _named(site: Site, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (site.name, *site.tied) for pattern in patterns)


def _hint(sites: Sequence[Site]) -> str:
    if not sites:
        return "; there are none"
    return f"; the first is {sites[0].name!r} of {len(sites)}"


def element_count(site: Site) -> int:
    """Number of values in the weight."""
    return math.prod(site.shape)
