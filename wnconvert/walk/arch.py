"""`--arch`: build the exact network on the meta device and walk that, instead of guessing at the keys.

Nothing here imports torch before a network is built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wnconvert.errors import InputError, UsageError
from wnconvert.names import find_pairs
from wnconvert.sites import Use
from wnconvert.walk import keys
from wnconvert.walk.keys import Guess, Weight

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 4
"""Differences between a checkpoint and a network that are named in the error."""

# What somebody's constructor may be expected to raise.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


_Rename = Callable[[str], str | None]
"""From a name of the network to one of the checkpoint, or None for a part that the checkpoint does not hold."""


def walker_for(spec: str | None, path: Path) -> ArchWalker | None:
    """Make the walker that `--arch` asks for, or None if it asks for nothing.

    Args:
        spec: `package.module:callable`, `timm:NAME` or `transformers`.
        path: the checkpoint; `transformers` reads `config.json` beside it.

    Raises:
        UsageError: the request is of none of these forms.
    """
    if spec is None:
        return None
    if spec == "transformers":
        return ArchWalker(spec, lambda: _from_config(path if path.is_dir() else path.parent))
    source, colon, name = spec.partition(":")
    if not colon or not source or not name:
        raise UsageError(f"--arch {spec}: must be package.module:callable, timm:NAME or transformers")
    if source == "timm":
        return ArchWalker(spec, lambda: _from_timm(name))
    return ArchWalker(spec, lambda: _from_callable(spec, source, name))


@dataclasses.dataclass(frozen=True, slots=True)
class _Network:
    """What the walk needs of a network.

    Attributes:
        shapes: of every tensor, by plain name.
        required: for each parameter the names of that same parameter, one of which a checkpoint must hold.
        uses: of its weights.
        note: why torch.fx could not trace it, or None.
    """

    shapes: Mapping[str, tuple[int, ...]]
    required: Mapping[str, tuple[str, ...]]
    uses: Sequence[Use]
    note: str | None


class ArchWalker:
    """Knows the layers of one network. Built when it is first asked."""

    def __init__(self, spec: str, build: Callable[[], nn.Module]) -> None:
        self.name = "modules"
        self.note: str | None = None
        self._spec = spec
        self._build = build

    def find(self, weights: Mapping[str, Weight]) -> Mapping[str, Guess]:
        """Give every weight of the network its layer, wherever the checkpoint holds that network.

        Parts of the checkpoint that are not this network (a discriminator beside the generator) go by their keys.

        Raises:
            UsageError: the network cannot be built.
            InputError: no part of the checkpoint fits it.
        """
        network = self._network
        self.name, notes = ("modules", [network.note]) if network.note else ("fx", [])
        found: dict[str, Guess] = {}
        covered: set[str] = set()
        for rename in self._fits(network, weights):
            covered |= {name for name in map(rename, network.shapes) if name is not None}
            for use in network.uses:
                name = rename(use.root)
                if name is not None and name in weights:
                    found.setdefault(name, Guess(use, f"a {use.kind} of {self._spec}"))
        rest = {name: weight for name, weight in keys.find(weights).items() if name not in covered}
        if rest:
            others = ", ".join(sorted({name.partition(".")[0] for name in rest}))
            notes.append(f"not part of {self._spec}, so inferred from the keys: {others}")
        self.note = "; ".join(notes) or None
        return found | rest

    def _fits(self, network: _Network, weights: Mapping[str, Weight]) -> list[_Rename]:
        """Every place of the checkpoint that holds exactly this network."""
        fits: list[_Rename] = []
        nearest = ["nothing in common"]
        fewest = math.inf
        for prefix, rename in _placements(network.shapes, weights):
            differences = list(_differences(prefix, rename, network, weights))
            if not differences:
                fits.append(rename)
            elif len(differences) < fewest:
                nearest, fewest = differences, len(differences)
        if not fits:
            raise InputError(f"--arch {self._spec}: the checkpoint does not fit: {_shorten(nearest)}")
        return fits

    @functools.cached_property
    def _network(self) -> _Network:
        from wnconvert.walk import fx, modules

        module = self._on_meta_device()
        shapes, required = _shapes(module)
        hidden = {pair.name for pair in find_pairs(_stored_shapes(module)) if pair.problem is None}
        uses = list(modules.find_uses(module, hidden))
        note = None
        try:
            uses += fx.trace(module).uses
        except fx.TraceFailed as error:
            note = f"torch.fx cannot trace it ({error})"
        return _Network(shapes, required, [use for use in uses if use.root in shapes], note)

    def _on_meta_device(self) -> nn.Module:
        import torch

        try:
            with torch.device("meta"):
                module = self._build()
        except _BUILD_ERRORS as error:
            lines = str(error).strip().splitlines() or [""]
            raise UsageError(f"--arch {self._spec}: cannot be built: {type(error).__name__}: {lines[0]}") from error
        if not isinstance(module, torch.nn.Module):
            raise UsageError(f"--arch {self._spec}: gives a {type(module).__name__}, not an nn.Module")
        return module


def _from_callable(spec: str, source: str, name: str) -> nn.Module:
    try:
        found: object = importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--arch {spec}: no module named {error.name}; run where `import {source}` works, e.g. PYTHONPATH=FOLDER"
        ) from error
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"--arch {spec}: {name} cannot be called")
    made: nn.Module = found()
    return made


def _from_timm(name: str) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, pretrained=False)
    return made


def _from_config(folder: Path) -> nn.Module:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--arch transformers: no config.json in {folder}")
    import transformers

    architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    builder = getattr(transformers, architectures[0]) if architectures else transformers.AutoModel.from_config
    made: nn.Module = builder(config)
    return made


def _stored_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if hasattr(value, "shape")}


def _shapes(module: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Every tensor of a network by its plain name, and for each parameter the names of the same parameter."""
    stored = _stored_shapes(module)
    pairs = [pair for pair in find_pairs(stored) if pair.problem is None]
    halves = {key for pair in pairs for key in (pair.g, pair.v)}
    shapes = {name: shape for name, shape in stored.items() if name not in halves}
    shapes |= {pair.name: stored[pair.v] for pair in pairs}
    ties: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    required = {name: tuple(group) for group in ties.values() for name in group if name in shapes}
    return shapes, required | {pair.name: (pair.name,) for pair in pairs}


def _placements(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Weight]) -> Iterator[tuple[str, _Rename]]:
    """Yield the ways in which the names of a network may be those of a checkpoint: as they are, nested, or cut short.

    Each comes with the prefix under which the checkpoint would hold nothing else.
    """
    yield "", functools.partial(_nested, "")
    for prefix in _prefixes(shapes, weights):
        yield prefix, functools.partial(_nested, prefix)
    for prefix in _prefixes(weights, shapes):
        yield "", functools.partial(_cut, prefix)


def _prefixes(short: Iterable[str], long: Iterable[str]) -> list[str]:
    """What may have to go before the names of one side to give names of the other."""
    anchors = sorted(short, key=len)[-3:]
    return sorted({name.removesuffix(anchor) for anchor in anchors for name in long if name.endswith(f".{anchor}")})


def _nested(prefix: str, name: str) -> str | None:
    return prefix + name


def _cut(prefix: str, name: str) -> str | None:
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _differences(
    prefix: str,
    rename: _Rename,
    network: _Network,
    weights: Mapping[str, Weight],
) -> Iterator[str]:
    """Say how a checkpoint differs from a network. Buffers may be missing, and integers be left over."""
    placed = {name: new for name in network.shapes if (new := rename(name)) is not None}
    for name, new in placed.items():
        weight = weights.get(new)
        if weight is None:
            same = network.required.get(name, ())
            if same and not any(placed.get(tied) in weights for tied in same):
                yield f"{new} is missing"
        elif weight.shape != network.shapes[name]:
            yield f"{new} has shape {list(weight.shape)}, the network needs {list(network.shapes[name])}"
    known = set(placed.values())
    for name, weight in weights.items():
        if name not in known and name.startswith(prefix) and "float" in weight.dtype:
            yield f"{name} is not in the network"


def _shorten(differences: list[str]) -> str:
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + more
