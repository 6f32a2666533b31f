"""torchvision.models: classification, segmentation, detection, video and optical flow."""

from __future__ import annotations

import torch

from zoo import weights
from zoo.outputs import Inputs
from zoo.trial import Attempt, Attempts


def names() -> list[str]:
    """Every model."""
    import torchvision

    return sorted(torchvision.models.list_models())


def attempts(name: str) -> Attempts:
    """The model with a small input of the kind its family takes, then with larger ones."""
    import torchvision

    family = torchvision.models.get_model_builder(name).__module__
    options = {} if "weights_backbone" not in _parameters(name) else {"weights_backbone": None}
    with weights.cheap_init():
        model = torchvision.models.get_model(name, weights=None, **options)
    for size in (64, 128, 224, 299):
        yield Attempt(model, _inputs(family, size))


def _parameters(name: str) -> set[str]:
    import inspect

    import torchvision

    return set(inspect.signature(torchvision.models.get_model_builder(name)).parameters)


def _inputs(family: str, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, size, size, generator=generator)
    if ".detection." in family:
        return Inputs(([image[0]],))
    if ".video." in family:
        return Inputs((torch.rand(1, 3, 16 if size > 64 else 8, size, size, generator=generator),))
    if ".optical_flow." in family:
        # It looks up an eighth of the image at four scales.
        large = torch.rand(1, 3, 128, 128, generator=generator)
        return Inputs((), {"image1": large, "image2": large.flip(-1), "num_flow_updates": 2})
    return Inputs((image,))
