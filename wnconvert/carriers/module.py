"""A live `nn.Module` as a carrier. It changes in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wnconvert import layers, weightnorm
from wnconvert.carriers import module_forms as forms
from wnconvert.carriers.module_forms import SplitWeight
from wnconvert.errors import InputError, PairError, UsageError
from wnconvert.names import spell
from wnconvert.sites import Dim, Scheme, Selection, Site, Use, resolve
from wnconvert.walk import fx, modules


@dataclasses.dataclass(frozen=True, slots=True)
class _Owner:
    """A module and the name of one of its weights."""

    module: nn.Module
    name: str


class ModuleCarrier:
    """Fulfils `Carrier` for a network in memory.

    Sites come from torch.fx where it can trace the network, which also shows weights used by functions, and from the
    tree of modules, which also shows layers that the traced path does not reach.
    """

    def __init__(self, module: nn.Module, *, trace: bool = True) -> None:
        self.module = module
        self.walker = "modules"
        self.walker_note: str | None = None
        self._traced: fx.Trace | None = None
        for name, parameter in module.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise InputError(f"{name}: a lazy layer has no shape yet; run one forward pass before converting")
        if trace and modules.kind_of(module) is None:
            self._trace()

    def _trace(self) -> None:
        try:
            self._traced = fx.trace(self.module)
            self.walker = "fx"
        except fx.TraceFailed as error:
            self.walker_note = f"torch.fx cannot trace it ({error})"

    def sites(self, dim: Dim) -> list[Site]:
        split = forms.all_split_weights(self.module)
        uses: dict[str, list[Use]] = {}
        for use in modules.find_uses(self.module, split):
            uses.setdefault(use.root, []).append(self._mark_unreached(use))
        for use in self._traced.uses if self._traced else ():
            uses.setdefault(use.root, []).append(use)
        for name in (*split, *self._unexplained(split)):
            uses.setdefault(name, [])
        found = []
        for names in self._tied(uses, split):
            everywhere = [dataclasses.replace(use, root=names[0]) for name in names for use in uses.get(name, ())]
            # An embedding that shares its table with a layer follows that layer.
            layer_uses = [use for use in everywhere if use.kind != "Embedding"] or everywhere
            if names[0] in split:
                found.append(self._split_site(names, split[names[0]], layer_uses))
            else:
                found.append(self._plain_site(names, layer_uses, dim))
        return [*found, *self._foreign_sites()]

    def read_weight(self, site: Site) -> Tensor:
        return self.module.get_parameter(site.name).detach()

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        owner = self._owner(site.name)
        layers.settle(owner.module)
        pair = forms.split_weights(owner.module)[owner.name]
        return pair.g.detach(), pair.v.detach()

    def g_dtype(self, site: Site) -> torch.dtype | None:  # noqa: ARG002
        return None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        if scheme != "legacy":
            raise UsageError(
                "a module writes legacy keys (weight_g, weight_v), which torch's parametrizations load too"
            )
        trains = self.module.get_parameter(site.name).requires_grad
        pair = nn.Parameter(g, trains), nn.Parameter(v, trains)
        spec = layers.Spec.of(site.kind, site.axis, site.groups, len(site.shape))
        for owner in self._owners(site):
            layers.attach(owner.module, owner.name, spec, *pair)

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        value = weight()
        owner = self._owner(site.name)
        pair = forms.split_weights(owner.module)[owner.name]
        parameter = nn.Parameter(value, pair.g.requires_grad or pair.v.requires_grad)
        for owner in self._owners(site):
            forms.replace(owner.module, owner.name, parameter)

    def rename(self, site: Site, scheme: Scheme) -> None:  # noqa: ARG002
        raise UsageError("a module in memory cannot be renamed: fold it, or rename its saved state dict")

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        tensors: dict[str, Callable[[], Tensor]] = {}
        split = forms.all_split_weights(self.module)
        halves = _spelled(split)
        named = (*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers())
        for name, tensor in named:
            if name not in halves:
                tensors[name] = tensor.detach
        for name, pair in split.items():
            tensors[name] = _Fold(name, pair)
        return tensors

    def clean(self) -> None:
        """Remove what torch leaves behind when it removes a parametrized weight norm."""
        for module in self.module.modules():
            forms.remove_leftover_hooks(module)

    def require_pairs(self, selection: Selection) -> None:
        """Raise what folding would raise, before anything has changed."""
        sites = [site for site in self.sites("torch") if site.state == "split"]
        for site in selection.apply(sites) if sites else ():
            if site.skip is None:
                weightnorm.require_pair(*self.read_pair(site), name=site.name)

    def _split_site(self, names: list[str], pair: SplitWeight, uses: list[Use]) -> Site:
        name, owner = names[0], self._owner(names[0])
        problem, groups, axis = pair.problem, 1, None
        if problem is None:
            try:
                groups, axis = weightnorm.pair_axis(pair.g.shape, pair.v.shape, name)
            except PairError as error:
                problem = str(error)
        kind = layers.spec_of(owner.module, owner.name).kind if pair.form == "wnconvert" else "Unknown"
        return Site(
            name=name,
            kind=uses[0].kind if uses else kind,
            shape=tuple(pair.v.shape),
            dtype=_dtype_name(pair.v),
            axis=axis,
            groups=groups,
            state="split",
            scheme=pair.scheme,
            uses=tuple(use.where for use in uses),
            tied=tuple(names[1:]),
            skip=problem,
        )

    def _plain_site(self, names: list[str], uses: list[Use], dim: Dim) -> Site:
        weight = self.module.get_parameter(names[0])
        uses = uses or [Use(names[0], "Unknown", names[0], 0, 0)]
        site = resolve(uses, tuple(weight.shape), _dtype_name(weight), dim=dim, tied=tuple(names[1:]))
        if weight.is_meta:
            return site.skipped("has no data (meta device)")
        if type(weight) is not nn.Parameter:
            return site.skipped(f"held as a {type(weight).__name__}, which may not be replaced")
        problems = (layers.obstacle(owner.module, owner.name) for owner in self._owners(site))
        problem = next((problem for problem in problems if problem), None)
        return site.skipped(problem) if problem else site

    def _foreign_sites(self) -> list[Site]:
        """Weights that something else holds in parts of its own. They count as split, so that fold reports them too."""
        found = []
        for path, module in self.module.named_modules():
            for name, reason in forms.other_parametrizations(module).items():
                kind, weight = modules.kind_of(module), getattr(module, name)
                found.append(
                    Site(
                        name=f"{path}.{name}".lstrip("."),
                        kind=kind.name if kind else "Unknown",
                        shape=tuple(weight.shape),
                        dtype=_dtype_name(weight),
                        axis=None,
                        state="split",
                        skip=reason,
                    )
                )
        return found

    def _unexplained(self, split: Mapping[str, SplitWeight]) -> list[str]:
        """Parameters that could be weights of something that neither a trace nor the table of kinds shows."""
        halves = _spelled(split)
        found = []
        for name, parameter in self.module.named_parameters():
            path, _, leaf = name.rpartition(".")
            spectral = leaf.endswith("_orig") and leaf.removesuffix("_orig") in forms.other_parametrizations(
                self.module.get_submodule(path)
            )
            held = spectral or ".parametrizations." in f".{name}"
            if parameter.dim() > 1 and name not in halves and not held:
                found.append(name)
        return found

    def _tied(self, uses: Mapping[str, object], split: Mapping[str, SplitWeight]) -> list[list[str]]:
        """Group names by the tensor they stand for, in the order of the uses, with names that nothing uses added.

        Names of a tensor that is split come before names under which it is still plain.
        """
        halves = _spelled(split)
        everything: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if name not in halves
        }
        everything |= {name: pair.v for name, pair in split.items()}
        groups: dict[object, list[str]] = {}
        for name, tensor in everything.items():
            groups.setdefault(_identity(tensor), []).append(name)
        found: dict[object, list[str]] = {}
        for name in uses:
            key = _identity(everything[name])
            names = [name, *(other for other in groups[key] if other != name)]
            found.setdefault(key, sorted(names, key=lambda other: other not in split))
        return list(found.values())

    def _mark_unreached(self, use: Use) -> Use:
        if self._traced is None or "." not in use.root:
            return use
        steps = use.where.split(".")
        if any(".".join(steps[:i]) in self._traced.called for i in range(1, len(steps) + 1)):
            return use
        return dataclasses.replace(use, where=f"{use.where} (not in the trace)")

    def _owners(self, site: Site) -> list[_Owner]:
        """The modules that hold a weight, each once, also where one module goes by several names."""
        owners = [self._owner(name) for name in (site.name, *site.tied)]
        return list({(id(owner.module), owner.name): owner for owner in owners}.values())

    def _owner(self, name: str) -> _Owner:
        path, _, leaf = name.rpartition(".")
        return _Owner(self.module.get_submodule(path), leaf)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fold:
    name: str
    pair: SplitWeight

    def __call__(self) -> Tensor:
        return weightnorm.fold(self.pair.g, self.pair.v, name=self.name)


def _spelled(split: Mapping[str, SplitWeight]) -> set[str]:
    """Names of the parameters that hold a half of a pair."""
    return {key for name, pair in split.items() for key in spell(name, pair.scheme)}


def _identity(tensor: Tensor) -> object:
    """The same for every name of one tensor, also where two parameters share one piece of memory."""
    if tensor.is_meta or tensor.numel() == 0 or type(tensor) is not nn.Parameter:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
