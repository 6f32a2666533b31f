"""How a pair is spelled in a state dict, and which keys are pairs. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from wnconvert.sites import SCHEMES, Scheme

_PARAMETRIZED = re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<leaf>[^.]+)\.original(?P<part>[01])")


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """The two keys of one split weight.

    Attributes:
        name: key of the plain weight.
        g: key of the magnitude.
        v: key of the direction.
        scheme: how they are spelled.
        problem: why they are not a weight-norm pair although they are spelled like one, or None.
    """

    name: str
    g: str
    v: str
    scheme: Scheme
    problem: str | None = None


def spell(name: str, scheme: Scheme) -> tuple[str, str]:
    """Return the keys of g and v for the plain weight `name`."""
    if scheme == "legacy":
        return f"{name}_g", f"{name}_v"
    prefix, _, leaf = name.rpartition(".")
    base = f"{prefix}.parametrizations.{leaf}" if prefix else f"parametrizations.{leaf}"
    return f"{base}.original0", f"{base}.original1"


def plain_name(key: str) -> tuple[str, Scheme, str] | None:
    """Read a key as one half of a pair: `(plain name, scheme, "g" or "v")`, or None if it is not spelled like one."""
    match = _PARAMETRIZED.fullmatch(key)
    if match:
        return match["prefix"] + match["leaf"], "parametrized", "gv"[int(match["part"])]
    if key.endswith(("_g", "_v")):
        return key[:-2], "legacy", key[-1]
    return None


def sources(key: str) -> list[str]:
    """The keys of what a tensor can come from by a conversion: the direction of a pair, or a plain weight."""
    half = plain_name(key)
    return [spell(key, scheme)[1] for scheme in SCHEMES] + ([half[0]] if half else [])


def find_pairs(shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Find every pair among the keys of a state dict, in the order of its keys.

    Only a `g` with the keepdim norm shape of its `v` makes a pair. Keys spelled like a pair that cannot be one are
    returned with the problem where their name says `weight`, and passed over where any two tensors may be called so.
    """
    pairs: dict[str, Pair] = {}
    for key in shapes:
        half = plain_name(key)
        if half is None or half[0] in pairs:
            continue
        name, scheme, _ = half
        g, v = spell(name, scheme)
        problem = _problem(name, g, v, shapes)
        if problem is None or "weight" in name.rpartition(".")[2]:
            pairs[name] = Pair(name, g, v, scheme, problem)
    return list(pairs.values())


def is_norm_shape(g: tuple[int, ...], v: tuple[int, ...]) -> bool:
    """Whether `g` may hold the norms of `v`: 0-d, or of v's rank with some axes reduced to 1, or the same by groups."""
    if not v:
        return False
    if g == ():
        return True
    if len(g) == len(v) + 1:
        if not g[0] or v[0] % g[0]:
            return False
        v = (g[0], v[0] // g[0], *v[1:])
    if len(g) != len(v) or any(a not in (1, b) for a, b in zip(g, v, strict=True)):
        return False
    # Two tensors of one shape are no magnitude and direction, unless every row is a single element.
    return g != v or len(v) == 1 or all(n == 1 for n in v[1:])


def _problem(name: str, g: str, v: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if g not in shapes or v not in shapes:
        if f"{name}_orig" in shapes or f"{name}_u" in shapes:
            return "spectral norm, which is no weight norm"
        return f"{v if g in shapes else g} is missing"
    if name in shapes:
        return f"{name} is there beside {g} and {v}"
    other = next(key for scheme in SCHEMES for key in spell(name, scheme) if key not in (g, v))
    if other in shapes:
        return f"{other} is there beside {g} and {v}"
    if not is_norm_shape(shapes[g], shapes[v]):
        return f"{g} of shape {list(shapes[g])} is not the norm of {v} of shape {list(shapes[v])}"
    return None
