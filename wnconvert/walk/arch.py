"""`--arch`: walk the exact network on the meta device, instead of guessing at the keys.

Nothing here imports torch before a network is built.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wnconvert.errors import InputError
from wnconvert.names import find_pairs
from wnconvert.sites import Use
from wnconvert.walk import build, keys
from wnconvert.walk.build import Builder
from wnconvert.walk.keys import Guess, Weight

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 4
"""Differences between a checkpoint and a network that are named in the error."""

_Rename = Callable[[str], str | None]
"""From a name of the network to one of the checkpoint, or None for a part that the checkpoint does not hold."""


def walker_for(spec: str | None, path: Path) -> ArchWalker | None:
    """Make the walker that `--arch` asks for, or None if it asks for nothing. See `build.builder_for`.

    Raises:
        UsageError: the request is of no known form.
    """
    return None if spec is None else ArchWalker(spec, build.builder_for(spec, path))


@dataclasses.dataclass(frozen=True, slots=True)
class _Network:
    """What the walk needs of a network.

    Attributes:
        module: the network, without data.
        shapes: of every tensor, by plain name.
        required: for each parameter the names of that same parameter, one of which a checkpoint must hold.
        weights: the names of each weight, with its uses.
        held: parameters that something else than weight norm computes a weight from.
        walker: see `Carrier.walker`.
        note: see `Carrier.walker_note`.
        lenient: the checkpoint may hold more, and other names for what is no weight.
    """

    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    required: Mapping[str, tuple[str, ...]]
    weights: Sequence[tuple[Sequence[str], Sequence[Use]]]
    held: frozenset[str]
    walker: str
    note: str | None
    lenient: bool


class ArchWalker:
    """Knows the layers of one network. Built when it is first asked."""

    def __init__(self, spec: str, builder: Builder) -> None:
        self.name = "modules"
        self.note: str | None = None
        self._spec = spec
        self._builder = builder

    def find(self, weights: Mapping[str, Weight]) -> Mapping[str, Guess]:
        """Give every weight of the network its layers, wherever the checkpoint holds that network.

        Parts of the checkpoint that are not this network (a discriminator beside the generator) go by their keys.

        Raises:
            UsageError: the network cannot be built.
            InputError: no part of the checkpoint fits it.
        """
        network = self._network
        self.name, notes = network.walker, [network.note] if network.note else []
        found: dict[str, Guess] = {}
        covered: set[str] = set()
        held: set[str] = set()
        for rename in self._fits(network, weights):
            covered |= {name for name in map(rename, network.shapes) if name is not None}
            held |= {name for name in map(rename, network.held) if name is not None}
            for names, uses in network.weights:
                guess = _guess(names[0], uses, self._spec)
                # A tied weight may be stored under any of its names, and has all of its uses under each.
                for name in map(rename, names):
                    if name is not None and name in weights:
                        found.setdefault(name, guess)
        guessed = keys.find(weights)
        rest = {name: guess for name, guess in guessed.items() if name not in covered}
        if rest:
            others = ", ".join(sorted({name.partition(".")[0] for name in rest}))
            notes.append(f"not part of {self._spec}, so inferred from the keys: {others}")
        self.note = "; ".join(notes) or None
        return found | rest | {name: guess for name, guess in guessed.items() if name in held}

    def _fits(self, network: _Network, weights: Mapping[str, Weight]) -> list[_Rename]:
        """Every place of the checkpoint that holds exactly this network."""
        fits: list[_Rename] = []
        nearest, nearest_rename = ["nothing in common"], None
        fewest = math.inf
        for prefix, rename in _placements(network.shapes, weights):
            differences = list(_differences(prefix, rename, network, weights))
            if not differences:
                fits.append(rename)
            elif len(differences) < fewest:
                nearest, nearest_rename, fewest = differences, rename, len(differences)
        if not fits and network.lenient:
            names, merged = build.transformers_names(network.module, weights)
            required = {name: tied for name, tied in network.required.items() if name not in merged}
            unmerged = {name: weights[name] for name in names.values()}
            if not list(_differences("", names.get, dataclasses.replace(network, required=required), unmerged)):
                fits.append(names.get)
        if not fits:
            hint = "" if nearest_rename is None else self._hint(network, nearest_rename, weights)
            raise InputError(f"--arch {self._spec}: the checkpoint does not fit: {_shorten(nearest)}{hint}")
        return fits

    def _hint(self, network: _Network, rename: _Rename, weights: Mapping[str, Weight]) -> str:
        """How to ask for the network that the checkpoint seems to hold."""
        placed = {name: weights[new] for name in network.shapes if (new := rename(name)) is not None and new in weights}
        misfit = {name: weight.shape for name, weight in placed.items() if weight.shape != network.shapes[name]}
        options = build.timm_options(network.module, misfit)
        if not options:
            return ""
        return f"; try --arch '{self._spec}{'&' if '?' in self._spec else '?'}{options}'"

    @functools.cached_property
    def _network(self) -> _Network:
        from wnconvert.carriers.module import ModuleCarrier

        module = build.without_data(self._spec, self._builder)
        try:
            carrier = ModuleCarrier(module)
        except InputError as error:
            raise InputError(f"--arch {self._spec}: {error}") from error
        shapes, required = _shapes(module)
        weights = [(names, uses) for names, uses in carrier.weights() if not shapes.keys().isdisjoint(names)]
        listed = {name for names, _ in weights for name in names}
        held = {name for name in required if len(shapes[name]) > 1 and name not in listed}
        return _Network(
            module,
            shapes,
            required,
            weights,
            frozenset(held),
            carrier.walker,
            carrier.walker_note,
            lenient=self._spec == "transformers",
        )


def _guess(name: str, uses: Sequence[Use], spec: str) -> Guess:
    if not uses:
        return Guess(Use(name, "Unknown", name, 0, 0), f"no layer of {spec} that is known uses it")
    kinds = " and a ".join(dict.fromkeys(use.kind for use in uses))
    return Guess(uses[0], f"a {kinds} of {spec}", tuple(uses[1:]))


def _stored_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if hasattr(value, "shape")}


def _shapes(module: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Every tensor of a network by its plain name, and for each parameter the names of the same parameter."""
    stored = _stored_shapes(module)
    # Also what is spelled like a pair and is none (spectral norm), for a checkpoint is read so too.
    pairs = find_pairs(stored)
    halves = {key for pair in pairs for key in (pair.g, pair.v)}
    shapes = {name: shape for name, shape in stored.items() if name not in halves}
    shapes |= {pair.name: stored[pair.v if pair.v in stored else pair.g] for pair in pairs}
    ties: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    required = {name: tuple(group) for group in ties.values() for name in group if name in shapes}
    return shapes, required | {pair.name: (pair.name,) for pair in pairs if pair.problem is None}


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
        weight, shape = weights.get(new), network.shapes[name]
        if weight is None:
            same = network.required.get(name, ())
            ignored = network.lenient and len(shape) < 2
            if same and not ignored and not any(placed.get(tied) in weights for tied in same):
                yield f"{new} is missing"
        elif weight.shape != shape:
            yield f"{new} has shape {list(weight.shape)}, the network needs {list(shape)}"
    known = set(placed.values())
    here = [name for name in weights if name.startswith(prefix) and "float" in weights[name].dtype]
    others = [name for name in here if name not in known]
    if network.lenient:
        # Heads that it leaves out are no difference, but a part of it that happens to fit somewhere is no network.
        others = [name for name in others if len(weights[name].shape) > 1]
        matched = sum(len(weights[name].shape) > 1 for name in here) - len(others)
        others = others if matched <= len(others) else []
    yield from (f"{name} is not in the network" for name in others)


def _shorten(differences: list[str]) -> str:
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + more
