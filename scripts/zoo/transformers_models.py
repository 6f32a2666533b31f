"""transformers: every public model class, built from a tiny configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import nn

from zoo import transformers_config as configs
from zoo import transformers_overrides as overrides
from zoo import weights
from zoo.outputs import Inputs
from zoo.transformers_calls import calls
from zoo.transformers_rules import AS_IT_IS, Recipe
from zoo.trial import Attempt, Attempts, NotBuilt, one_line

LARGEST = 400_000_000
"""Parameters of a network that still counts as tiny."""


RECIPES = (
    Recipe(16),
    Recipe(16, lists=True),
    Recipe(8),
    Recipe(16, heads=False),
    Recipe(4, heads=False),
    Recipe(16, side=None),
    Recipe(8, depth=None),
    Recipe(4, side=None),
    Recipe(1, heads=False),
)
"""Tried in turn."""

ALIKE = 3
"""After so many recipes with the same complaints only the class's own configuration is tried."""


def names() -> list[str]:
    """Every public model class that has a forward pass; the base classes of a family have none."""
    import transformers.models
    from transformers import PreTrainedModel

    found = []
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue
        public = [getattr(module, name) for name in module.__all__]
        classes = [item for item in public if isinstance(item, type) and issubclass(item, PreTrainedModel)]
        found += [cls.__name__ for cls in classes if _has_forward(cls) and cls.__module__ == module.__name__]
    return sorted(set(found))


def _has_forward(cls: type) -> bool:
    return cls.forward is not nn.Module.forward


def attempts(name: str) -> Attempts:
    """The class built from ever larger configurations, each called with ever fewer inputs."""
    import transformers

    cls = getattr(transformers, name)
    complaints: list[set[str]] = []
    first: Exception | None = None
    for recipe in _recipes(complaints):
        complaints.append(set())
        try:
            model = _build(cls, recipe)
        except Exception as error:  # noqa: BLE001 a library may raise anything
            first = first if first and not isinstance(first, NotBuilt) else error
            complaints[-1].add(_gist(error))
            continue
        inputs = calls(model, shrink=recipe == AS_IT_IS)
        answer: Exception | None = None
        while (found := _next(inputs, answer)) is not None:
            answer = yield Attempt(model, found)
            first = first if first and not isinstance(first, NotBuilt) else answer
            complaints[-1].add(_gist(answer))
    raise NotBuilt(str(first) if isinstance(first, NotBuilt) else one_line(first or NotBuilt())) from first


def _recipes(complaints: list[set[str]]) -> Iterator[Recipe]:
    """Recipes in turn; a larger network with the same complaint will not do better."""
    for recipe in RECIPES:
        if not complaints or complaints.count(complaints[-1]) <= ALIKE:
            yield recipe
    yield AS_IT_IS


def _next(inputs: Generator[Inputs, Exception, None], error: Exception | None) -> Inputs | None:
    try:
        return next(inputs) if error is None else inputs.send(error)
    except StopIteration:
        return None


def _gist(error: Exception) -> str:
    return re.sub(r"\d+", "", one_line(error))


def _build(cls: type, recipe: Recipe) -> nn.Module:
    config = configs.tiny(cls.config_class(), recipe, overrides.changes(cls))
    configs.add_sections(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
    if size > LARGEST:
        raise NotBuilt(f"its tiny configuration still has {size / 1e6:.0f} M parameters")
    with weights.cheap_init():
        model: nn.Module = cls._from_config(config)
    return model
