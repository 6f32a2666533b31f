"""Layers of a known class with a forward pass of their own: do they still use the weight as that class does?

A subclass of a convolution may standardise its weight first, or use it transposed. One forward pass of the layer alone,
on an input made up to fit, tells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wnconvert.sites import Use
from wnconvert.walk import eager
from wnconvert.walk.trace import TraceFailed

_METHODS = ("forward", "_conv_forward")


def is_custom(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a layer has a forward pass of its own."""
    return any(getattr(type(module), method, None) is not getattr(base, method, None) for method in _METHODS)


def uses_of(module: nn.Module, base: type[nn.Module], name: str) -> list[Use] | None:
    """How a layer uses its own weight.

    Args:
        module: a linear or convolution layer.
        base: the class whose row of the table it belongs to.
        name: of the weight in the module.

    Returns:
        None if the layer computes what its base does, or cannot be tried alone.
    """
    if not is_custom(module, base):
        return None
    weight = module._parameters[name]
    example = None if weight is None else _example(module, weight)
    if example is None:
        return None
    try:
        trace = eager.trace(module, (example,), {})
    except TraceFailed:
        return None
    return [use for use in trace.uses if use.root == name] or None


def _example(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The smallest input that a layer takes."""
    if isinstance(module, nn.Linear):
        return torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device)
    if isinstance(module, nn.modules.conv._ConvNd):
        spread = zip(module.kernel_size, module.dilation, strict=True)
        sizes = [1 + (size - 1) * dilation for size, dilation in spread]
        return torch.zeros(1, module.in_channels, *sizes, dtype=weight.dtype, device=weight.device)
    return None
