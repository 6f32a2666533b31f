"""A TorchScript archive as a carrier. Folding edits its code; a pair can only leave it, in a state dict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import IO, Any, Literal

import torch
from torch import Tensor

from wnconvert import names, weightnorm
from wnconvert.carriers.torchscript.archive import Archive, StoredTensor
from wnconvert.carriers.torchscript.folding import Fold, Folder, Obstacle, Records, plan
from wnconvert.carriers.torchscript.frames import join
from wnconvert.carriers.torchscript.walk import Found, Weight, kind_of, walk
from wnconvert.errors import InputError, PairError, UsageError
from wnconvert.sites import SCHEMES, Dim, Scheme, Site, Use, resolve
from wnconvert.walk.reader import Computed

_ROLES = {
    "buffer": "a buffer, which does not train",
    "attribute": "an attribute, which no state dict holds",
    "constant": "a constant of the code, which no state dict holds",
}


NO_MOBILE_FOLD = "holds bytecode for the lite interpreter, which cannot be folded"


@dataclasses.dataclass(frozen=True, slots=True)
class _Edited:
    """An archive that is not written yet."""

    name: str
    root: Any
    constants: tuple[Any, ...]
    code: Mapping[str, bytes]


class TorchScriptCarrier:
    """Fulfils `Carrier` for an archive. Its code is read and never run."""

    walker = "torchscript"
    walker_note: str | None = None

    def __init__(self, archive: Archive) -> None:
        """Follow the code of an archive.

        Raises:
            InputError: the code cannot be parsed.
        """
        self.archive = archive
        self._numbers = {
            f"CONSTANTS.c{i}": archive.tensor(stored, "constants").clone()
            for i, stored in enumerate(map(StoredTensor.of, archive.constants))
            if stored is not None and stored.shape == ()
        }
        self._found = walk(archive, self._numbers)
        self._pairs = _pairs(self._found)
        self._folds: dict[str, tuple[Fold, Callable[[], Tensor]]] = {}
        self._split: dict[str, dict[str, Tensor]] = {}

    @property
    def is_split(self) -> bool:
        """Whether weights were split, which an archive cannot hold."""
        return bool(self._split)

    @property
    def is_mobile(self) -> bool:
        """Whether it also holds bytecode for the lite interpreter, which finds attributes by their positions."""
        return "bytecode.pkl" in self.archive.records()

    @property
    def is_folded(self) -> bool:
        """Whether weights were folded."""
        return bool(self._folds)

    def sites(self, dim: Dim) -> list[Site]:
        """See `Carrier.sites`."""
        halves = {half: pair for pair in self._pairs.values() for half in (pair.g, pair.v)}
        sites: dict[str, Site] = {}
        for name, weight in self._found.weights.items():
            pair = halves.get(name)
            if pair is not None:
                known = pair.name in sites or any(pair.name in site.tied for site in sites.values())
                sites |= {} if known else {pair.name: self._split_site(pair)}
            elif self._first(name) == name and name not in sites and (site := self._plain_site(name, weight, dim)):
                sites[name] = site
        return list(sites.values())

    def read_weight(self, site: Site) -> Tensor:
        """See `Carrier.read_weight`."""
        return self._load(site.name)

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """See `Carrier.read_pair`."""
        pair = self._pairs[site.name]
        return self._load(pair.g), self._load(pair.v)

    def g_dtype(self, site: Site) -> torch.dtype | None:  # noqa: ARG002
        """None: the state dict holds g as the module does that will load it."""
        return None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """See `Carrier.put_pair`. The pair goes into the state dict only."""
        for name in (site.name, *site.tied):
            self._split[name] = dict(zip(names.spell(name, scheme), (g, v), strict=True))

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """See `Carrier.put_weight`. The weight is computed when the archive is written.

        Raises:
            InputError: the weight norm cannot be taken out of the code.
            UsageError: there is bytecode, which would go on reading the attributes that are gone.
        """
        if self.is_mobile:
            raise UsageError(
                f"{self.archive.name}: {NO_MOBILE_FOLD}: fold what torch.jit.save writes of the module, then call "
                "_save_for_lite_interpreter on the result"
            )
        pair = self._pairs[site.name]
        try:
            self._folds[site.name] = plan(self._found, pair), functools.cache(weight)
        except Obstacle as error:
            raise InputError(f"{self.archive.name}: {site.name} cannot be folded: {error}") from error

    def rename(self, site: Site, scheme: Scheme) -> None:  # noqa: ARG002
        """No.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.archive.name}: the names in a TorchScript archive are part of its code; fold it")

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """See `Carrier.effective`: the state dict, pairs multiplied back."""
        halves = {half for pair in self._pairs.values() for half in (pair.g, pair.v)}
        found: dict[str, Callable[[], Tensor]] = {}
        for name in self._state_names():
            if name not in halves:
                found[name] = functools.partial(self._load, name)
        for pair in self._pairs.values():
            found[pair.name] = functools.partial(self._multiplied, pair)
        return found

    def state(self) -> dict[str, Tensor]:
        """The state dict as it stands now: parameters and buffers, tied names sharing one tensor."""
        shared: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name in self._state_names():
            if name in self._split:
                state |= self._split[name]
            else:
                first = self._first(name)
                state[name] = shared.setdefault(first, self._load(first))
        return state

    def fixed(self, role: Literal["attribute", "constant"]) -> dict[str, Callable[[], Tensor]]:
        """Tensors that no state dict holds: plain attributes, or constants of the code."""
        return {
            name: functools.partial(self._load, name)
            for name, weight in self._found.weights.items()
            if weight.role == role
        }

    def write(self, file: IO[bytes]) -> None:
        """Write the archive with its folded weights.

        Raises:
            InputError: code that is left reads a tensor that is gone.
        """
        if not self._folds:
            self.archive.write(file, {}, {})
            return
        records, missing = self._trial(self._folds)
        if missing:
            raise InputError(
                f"{self.archive.name}: cannot be folded: its code also reads {min(missing)} apart from the weight norm"
            )
        self.archive.write(file, records.changed, records.added)

    def _trial(self, folds: Mapping[str, tuple[Fold, Callable[[], Tensor]]]) -> tuple[Records, set[str]]:
        """What to write, and the attributes that its code would ask for in vain."""
        records = Folder(self.archive, self._found, folds).records()
        edited = walk(_Edited(self.archive.name, records.root, self.archive.constants, records.code), self._numbers)
        return records, edited.interpreter.missing - self._found.interpreter.missing

    @functools.cached_property
    def _obstacles(self) -> dict[str, str]:
        """Why weights cannot be folded, by name."""
        found: dict[str, str] = {}
        folds: dict[str, tuple[Fold, Callable[[], Tensor]]] = {}
        for name, pair in self._pairs.items():
            problem = next((use.problem for use in self._found.uses.get(name, []) if use.written), None)
            try:
                if name not in self._found.norms:
                    problem = "no code computes its weight norm"
                elif problem is None:
                    folds[name] = plan(self._found, pair), functools.partial(self._multiplied, pair)
            except Obstacle as error:
                problem = str(error)
            if problem is not None:
                found[name] = problem
        # A value that goes nowhere the interpreter looks, such as an output, shows only by what is missing afterwards.
        while folds and (missing := self._trial(folds)[1]):
            read = {name: half for name, (fold, _) in folds.items() if (half := self._half_among(fold, missing))}
            if not read:
                break
            for name, half in read.items():
                found[name] = f"the code also reads {half} apart from the weight norm"
                del folds[name]
        return found

    def _half_among(self, fold: Fold, missing: set[str]) -> str | None:
        """The name of a half that cannot be found, itself or what holds it, or None."""
        halves = [join(self._found.modules.paths[module], leaf) for module, leaf in fold.pairs]
        return next((half for half in halves for gone in missing if f"{half}.".startswith(f"{gone}.")), None)

    def _state_names(self) -> list[str]:
        return [name for name, weight in self._found.weights.items() if weight.role in ("parameter", "buffer")]

    def _load(self, name: str) -> Tensor:
        weight = self._found.weights[name]
        return self.archive.tensor(weight.stored, "constants" if weight.role == "constant" else "data")

    def _multiplied(self, pair: Computed) -> Tensor:
        return weightnorm.fold(self._load(pair.g), self._load(pair.v), name=pair.name)

    def _first(self, name: str) -> str:
        return self._found.aliases(name)[0]

    def _plain_site(self, name: str, weight: Weight, dim: Dim) -> Site | None:
        stored, uses = weight.stored, self._uses(name, weight)
        if all(use.written for use in uses):  # a counter is no weight
            if weight.role != "parameter" or len(stored.shape) < 2 or not stored.dtype.is_floating_point:
                return None
            uses = [Use(name, "Unknown", name.rpartition(".")[0], 0, 0), *uses]
        tied = self._found.aliases(name)[1:]
        site = resolve(uses, stored.shape, _dtype(weight), dim=dim, tied=tied)
        if stored.dtype not in weightnorm.DTYPES:
            site = site.skipped(f"dtype {_dtype(weight)} has no weight normalization")
        if weight.role in _ROLES:
            site = site.skipped(_ROLES[weight.role])
        spelled = (key for scheme in SCHEMES for key in names.spell(name, scheme))
        taken = next((key for key in spelled if key in self._found.weights), None)
        return site.skipped(f"{taken} is the name of another tensor") if taken else site

    def _split_site(self, pair: Computed) -> Site:
        v = self._found.weights[pair.v]
        uses = self._uses(pair.name, v) or [Use(pair.name, "Unknown", pair.name.rpartition(".")[0], 0, 0)]
        problem, groups, axis = self._obstacles.get(pair.name), 1, None
        try:
            groups, axis = weightnorm.pair_axis(self._found.weights[pair.g].stored.shape, v.stored.shape, pair.name)
        except PairError as error:
            problem = str(error)
        spelled = names.plain_name(pair.v)
        tied = [other.name for other in self._pairs.values() if other is not pair and self._same(other, pair)]
        return Site(
            name=pair.name,
            kind=next((use for use in uses if not use.written), uses[0]).kind,
            shape=v.stored.shape,
            dtype=_dtype(v),
            axis=axis,
            groups=groups,
            state="split",
            scheme=spelled[1] if spelled and pair.name != pair.v else None,
            uses=tuple(dict.fromkeys(use.where for use in uses)),
            tied=tuple(tied),
            skip=problem,
        )

    def _same(self, a: Computed, b: Computed) -> bool:
        return self._first(a.v) == self._first(b.v) and self._first(a.g) == self._first(b.g)

    def _uses(self, name: str, weight: Weight) -> list[Use]:
        """Uses of a weight; those of a layer's own weight by the name of the layer."""
        path = name.rpartition(".")[0]
        owner = self._found.modules.at(path) if weight.role != "constant" else None
        kind = kind_of(owner.cls.qualified) if owner is not None else None
        uses = self._found.uses.get(name, [])
        if kind is None:
            return uses
        return [dataclasses.replace(use, kind=kind.name) if use.kind[:1].islower() else use for use in uses]


def _pairs(found: Found) -> dict[str, Computed]:
    """Every pair by the name of its weight: those that code multiplies, and those that are named so."""
    known = dict(found.norms)
    shapes = {
        name: weight.stored.shape for name, weight in found.weights.items() if weight.role in ("parameter", "buffer")
    }
    for pair in names.find_pairs(shapes):
        if pair.problem is None:
            known.setdefault(pair.name, Computed(pair.name, pair.g, pair.v))
    return known


def _dtype(weight: Weight) -> str:
    return str(weight.stored.dtype).removeprefix("torch.")
