"""What a value made of weights computes, found out by computing it on random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from wnconvert import weightnorm
from wnconvert.errors import PairError
from wnconvert.walk.recipe import EVALUATION_ERRORS, Call, Recipe, evaluate, leaves_of

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a formula may be from its definition, relative to its values, by dtype."""


_SCALES = {
    torch.float16: (1.0, 2.0**-4, -(2.0**4)),
    torch.bfloat16: (1.0, 2.0**-20, -(2.0**20)),
    torch.float32: (1.0, 2.0**-20, -(2.0**20)),
    torch.float64: (1.0, 2.0**-20, -(2.0**20)),
}
"""Sizes of directions, with the sign of the magnitudes. Small ones show a number that is added to the norm."""

_ROUNDED = 1e-6
"""How far a formula may be if it is computed in float64, but for casts inside that round to float32."""


def draw_pair(weights: Mapping[str, Tensor], g: str, v: str) -> list[dict[str, Tensor]]:
    """Random numbers in the place of a magnitude and a direction, several times; none if they cannot be that."""
    dtype = weights[v].dtype
    if dtype not in _CLOSE or weights[g].dtype not in _CLOSE:
        return []
    # A formula is exact in float64 unless it casts, or mixes types.
    wide = torch.float64 if weights[g].dtype == dtype else None
    generator = torch.Generator().manual_seed(0)
    draws = []
    for scale in _SCALES[dtype]:
        drawn = {name: _random(weights[name], generator, wide) for name in (g, v)}
        # Magnitudes of both signs, also where there is one, and none near zero, where any formula looks right.
        drawn[g] = (drawn[g].sign() + drawn[g]) * math.copysign(1, scale)
        drawn[v] = drawn[v] * abs(scale)
        draws.append(drawn)
    return draws


def is_weight_norm(
    value: Call, draws: Iterable[Mapping[str, Tensor]], weights: Mapping[str, Tensor], *, g: str, v: str
) -> bool:
    """Whether a value is `g * v / ||v||`, on the numbers of `draw_pair` and on the weights themselves."""
    dtype = weights[v].dtype
    if not all(_agrees(value, drawn, dtype, g=g, v=v) for drawn in draws):
        return False
    real = {name: weights[name].detach() for name in (g, v)}
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in real.values()):
        return True
    return _agrees(value, real, dtype, g=g, v=v)


def _agrees(value: Call, leaves: Mapping[str, Tensor], dtype: torch.dtype, *, g: str, v: str) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            result = evaluate(value, leaves)
    except EVALUATION_ERRORS:
        narrow = {name: tensor.to(dtype) for name, tensor in leaves.items()}
        # A formula that asks for float32 refuses float64.
        return leaves[v].dtype != dtype and _agrees(value, narrow, dtype, g=g, v=v)
    # A product in a wider type is not the weight yet: the cast to its own type is.
    if (
        not isinstance(result, Tensor)
        or result.shape != leaves[v].shape
        or result.dtype not in (dtype, leaves[v].dtype)
    ):
        return False
    try:
        expected = weightnorm.fold(leaves[g], leaves[v]).double()
    except PairError:
        return True  # folding will say so
    # torch's own formula makes NaN of rows of zeros.
    close = _CLOSE[dtype] if result.dtype == dtype else _ROUNDED
    near = (result.double() - expected).abs() <= close * expected.abs() + torch.finfo(result.dtype).tiny
    return bool((near | (expected == 0)).all())


def ignores_scale(value: Recipe, weights: Mapping[str, Tensor]) -> bool:
    """Whether a value stays the same when its largest weight is multiplied by a number."""
    generator = torch.Generator().manual_seed(0)
    names = leaves_of(value)
    if any(weights[name].dtype not in _CLOSE and weights[name].is_floating_point() for name in names):
        return False
    drawn = {name: _random(weights[name], generator) for name in names}
    main = max(names, key=lambda name: weights[name].numel())
    try:
        # Random state inside the recipe (dropout on a weight) would make it differ from itself.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            once, again = evaluate(value, drawn), evaluate(value, drawn | {main: drawn[main] * 16})
    except EVALUATION_ERRORS:
        return False
    if not isinstance(once, Tensor) or not once.is_floating_point() or not once.any():
        return False
    return _near(once, again, weights[main].dtype)


def _random(like: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    if not like.is_floating_point():
        return like
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(dtype or like.dtype)


def _near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= _CLOSE[dtype] * b.abs().max())
