"""What a value made of weights computes, found out by computing it on random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wnconvert import weightnorm
from wnconvert.walk.recipe import EVALUATION_ERRORS, Call, Recipe, evaluate, leaves_of

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a formula may be from its definition, relative to the largest value, by dtype."""


def draw_pair(weights: Mapping[str, Tensor], g: str, v: str) -> dict[str, Tensor] | None:
    """Random numbers in the place of a magnitude and a direction, or None if they cannot be that."""
    if weights[v].dtype not in _CLOSE or weights[g].dtype not in _CLOSE:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = {name: _random(weights[name], generator) for name in (g, v)}
    # Magnitudes of both signs, and none near zero, which would make any formula look right.
    drawn[g] = drawn[g].sign() + drawn[g]
    return drawn


def is_weight_norm(value: Call, drawn: Mapping[str, Tensor], g: str, v: str) -> bool:
    """Whether a value is `g * v / ||v||`, on the numbers of `draw_pair`."""
    try:
        result = evaluate(value, drawn)
    except EVALUATION_ERRORS:
        return False
    # A product in a wider type is not the weight yet: the cast to its own type is.
    if not isinstance(result, Tensor) or result.shape != drawn[v].shape or result.dtype != drawn[v].dtype:
        return False
    return _near(result, weightnorm.fold(drawn[g], drawn[v]), drawn[v].dtype)


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
        once, again = evaluate(value, drawn), evaluate(value, drawn | {main: drawn[main] * 16})
    except EVALUATION_ERRORS:
        return False
    if not isinstance(once, Tensor) or not once.is_floating_point() or not once.any():
        return False
    return _near(once, again, weights[main].dtype)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return like
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def _near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= _CLOSE[dtype] * b.abs().max())
