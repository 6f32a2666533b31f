"""timm: every architecture, at the smallest image that it takes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from zoo import weights
from zoo.outputs import Inputs
from zoo.trial import LACKS_MEMORY, Attempt, Attempts, NotBuilt, lacks_memory, one_line

SIZES = (64, 128, 224)
"""Images tried before the one that an architecture was made for."""

_FIXED: set[str] = set()
"""Modules of timm whose constructors take no image size."""


def names() -> list[str]:
    """Every architecture."""
    import timm

    return sorted(timm.list_models())


def attempts(name: str) -> Attempts:
    """The architecture built for ever larger images, then as it is."""
    import timm

    default = timm.get_pretrained_cfg(name)
    channels, *side = default.input_size if default else (3, 224, 224)
    sizes = [size for size in SIZES if size < max(side)]
    for size in sizes:
        model = _built_for(name, size)
        if model is not None:
            found = Attempt(model, Inputs((_image(channels, size, size),)))
            del model
            yield found
            del found
    try:
        model = _build(name)
    except Exception as error:
        raise NotBuilt(LACKS_MEMORY if lacks_memory(error) else one_line(error)) from error
    for shape in (*((size, size) for size in sizes), side):
        yield Attempt(model, Inputs((_image(channels, *shape),)))


def _built_for(name: str, size: int) -> torch.nn.Module | None:
    """The architecture for images of another size, or None if it cannot be had."""
    import timm

    family = timm.model_entrypoint(name).__module__
    if family in _FIXED:
        return None
    try:
        return _build(name, img_size=size)
    except TypeError:
        _FIXED.add(family)
    except Exception as error:
        if lacks_memory(error):
            raise NotBuilt(LACKS_MEMORY) from error
    return None


def _build(name: str, **options: Any) -> torch.nn.Module:
    import timm

    with weights.cheap_init():
        return timm.create_model(name, pretrained=False, **options)


@functools.cache
def _image(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
