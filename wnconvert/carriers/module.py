"""A live `nn.Module` as a carrier. It changes in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from wnconvert import layers, weightnorm
from wnconvert.carriers import module_forms as forms
from wnconvert.carriers import ties
from wnconvert.carriers.graph_module import GraphWeights
from wnconvert.carriers.module_forms import SplitWeight
from wnconvert.carriers.overlap import overlaps
from wnconvert.errors import InputError, PairError, UsageError
from wnconvert.sites import OVERLAP, Dim, Scheme, Selection, Site, Use, resolve
from wnconvert.walk import modules
from wnconvert.walk.ladder import Example, Walk, walk
from wnconvert.walk.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True)
class _Owner:
    """A module and the name of one of its weights."""

    module: nn.Module
    name: str


class ModuleCarrier:
    """Fulfils `Carrier` for a network in memory.

    Sites come from a trace where one can be had, which also shows weights used by functions, from the graphs that it
    holds (an `fx.GraphModule` is one), and from the tree of modules, which also shows layers that no path reaches.
    """

    def __init__(self, module: nn.Module, *, trace: bool = True, example: Example | None = None) -> None:
        self.module = module
        self._tries_layers = trace
        self._listed: tuple[Dim, list[Site]] | None = None
        self._graphs = GraphWeights(module, example)
        for name, parameter in module.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise InputError(f"{name}: a lazy layer has no shape yet; run one forward pass before converting")
        walked = self._walk(trace, example)
        self.walker, self.walker_note, self._traced = walked.walker, walked.note, walked.trace

    def _walk(self, trace: bool, example: Example | None) -> Walk:
        if isinstance(self.module, fx.GraphModule):
            return Walk("fx", trace=Trace((), self._graphs.called, self._graphs.others, ()))
        if not trace or modules.is_plain_layer(self.module):
            return Walk("modules")
        return walk(self.module, example)

    def sites(self, dim: Dim) -> list[Site]:
        # Folding asks twice: once to check every pair before anything changes.
        if self._listed is None or self._listed[0] != dim:
            self._listed = dim, self._list(dim)
        return self._listed[1]

    def _list(self, dim: Dim) -> list[Site]:
        weights, split, shared = self.weights(), self._split_weights(), self._overlaps()
        found = []
        for names, uses in weights:
            if names[0] in split:
                found.append(self._split_site(names, split, uses))
            else:
                site = self._plain_site(names, uses, dim)
                other = next((shared[name] for name in names if name in shared), None)
                found.append(site.skipped(OVERLAP.format(other)) if other else site)
        return [*found, *self._foreign_sites()]

    def weights(self) -> list[tuple[list[str], list[Use]]]:
        """Every weight, split or plain, by all of its names, with what uses it."""
        self._graphs.read(forms.all_split_weights(self.module))
        split = self._split_weights()
        uses: dict[str, list[Use]] = {}
        for use in modules.find_uses(self.module, split, try_layers=self._tries_layers):
            uses.setdefault(use.root, []).append(self._mark_unreached(use))
        in_graphs = {use.root for use in self._graphs.uses}
        traced = (use for use in self._functional_uses(split) if use.root not in in_graphs)
        for use in (*self._graphs.uses, *traced):
            known = uses.setdefault(use.root, [])
            if not any(_agree(use, other) for other in known):
                known.append(use)
        for name in (*split, *self._unexplained(split)):
            uses.setdefault(name, [])
        found = []
        for names in self._tied(uses, split):
            everywhere = [dataclasses.replace(use, root=names[0]) for name in names for use in uses.get(name, ())]
            # An embedding that shares its table with a layer follows that layer.
            found.append((names, [use for use in everywhere if use.kind != "Embedding"] or everywhere))
        return found

    def _functional_uses(self, split: Mapping[str, SplitWeight]) -> Iterator[Use]:
        if self._traced is None:
            return
        halves, parameters = _spelled(split), {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        for norm in self._traced.norms:
            if norm.name not in split:
                problem = "its own forward pass makes a weight norm of it"
                yield from (Use(key, "Unknown", key, None, None, problem=problem) for key in (norm.v, norm.g))
        for use in self._traced.uses:
            if use.root in split or (use.root in parameters and use.root not in halves):
                yield use

    def read_weight(self, site: Site) -> Tensor:
        return self.module.get_parameter(site.name).detach()

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        pair = self._pair(site.name)
        return pair.g.detach(), pair.v.detach()

    def g_dtype(self, site: Site) -> torch.dtype | None:  # noqa: ARG002
        return None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        if scheme != "legacy":
            raise UsageError(
                "a module writes legacy keys (weight_g, weight_v), which torch's parametrizations load too"
            )
        # Another network of the same file may hold this very layer, and have split it.
        names = [name for name in (site.name, *site.tied) if not self._is_split(name)]
        if not names:
            return
        self._listed = None
        trains = self.module.get_parameter(names[0]).requires_grad
        pair = nn.Parameter(g, trains), nn.Parameter(v, trains)
        spec = layers.Spec.of(site.kind, site.axis, site.groups, len(site.shape))
        for name in filter(self._graphs.holds, names):
            self._graphs.register(name, pair)
        for owner in self._owners(*(name for name in names if not self._graphs.holds(name))):
            layers.attach(owner.module, owner.name, spec, *pair)
        for name in names:
            self._graphs.split(name, spec, pair[1])

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        self._listed = None
        value = weight()
        names = (site.name, *site.tied)
        split = [name for name in names if self._is_split(name)]
        if not split:
            return
        pair = self._pair(split[0])
        parameter = nn.Parameter(value, pair.g.requires_grad or pair.v.requires_grad)
        for owner in self._owners(*(name for name in names if name not in self._graphs.pairs)):
            forms.replace(owner.module, owner.name, parameter)
        for name in names:
            self._graphs.fold(name, parameter)

    def rename(self, site: Site, scheme: Scheme) -> None:  # noqa: ARG002
        raise UsageError("a module in memory cannot be renamed: fold it, or rename its saved state dict")

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        tensors: dict[str, Callable[[], Tensor]] = {}
        self._graphs.read(forms.all_split_weights(self.module))
        split = self._split_weights()
        halves = _spelled(split)
        named = (*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers())
        for name, tensor in named:
            if name not in halves:
                tensors[name] = tensor.detach
        for name, pair in split.items():
            tensors[name] = _Fold(name, pair)
        return tensors

    def clean(self) -> None:
        """Finish: generate the code of edited graphs, remove what a parametrized weight norm of torch leaves behind."""
        self._graphs.finish()
        for module in self.module.modules():
            forms.remove_leftover_hooks(module)

    def require_pairs(self, selection: Selection) -> None:
        """Raise what folding would raise, before anything has changed."""
        sites = [site for site in self.sites("torch") if site.state == "split"]
        for site in selection.apply(sites) if sites else ():
            if site.skip is None:
                weightnorm.require_pair(*self.read_pair(site), name=site.name)

    def _split_weights(self) -> dict[str, SplitWeight]:
        return {**forms.all_split_weights(self.module), **self._graphs.pairs}

    def _is_split(self, name: str) -> bool:
        owner = self._owner(name)
        return name in self._graphs.pairs or owner.name in forms.split_weights(owner.module)

    def _pair(self, name: str) -> SplitWeight:
        pair = self._graphs.pairs.get(name)
        if pair is not None:
            return pair
        owner = self._owner(name)
        layers.settle(owner.module)
        return forms.split_weights(owner.module)[owner.name]

    def _split_site(self, names: list[str], split: Mapping[str, SplitWeight], uses: list[Use]) -> Site:
        name, owner = names[0], self._owner(names[0])
        pair, keys = split[name], {key: split[key].keys(key) for key in names if key in split}
        written = next((use.problem for use in uses if use.written), None)
        problem, groups, axis = pair.problem or written or self._graphs.other_reader(keys), 1, None
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
        others = [name for key in names for name in (self._traced.others.get(key, ()) if self._traced else ())]
        evidence = f"used by {', '.join(dict.fromkeys(others))}" if others and uses[0].kind == "Unknown" else None
        shape, tied = tuple(weight.shape), tuple(names[1:])
        site = resolve(uses, shape, _dtype_name(weight), dim=dim, tied=tied, evidence=evidence)
        if weight.is_meta:
            return site.skipped("has no data (meta device)")
        if type(weight) is not nn.Parameter:
            return site.skipped(f"held as a {type(weight).__name__}, which may not be replaced")
        problems = (layers.obstacle(owner.module, owner.name) for owner in self._owners(site.name, *site.tied))
        read_outside = (self._graphs.obstacle(name) for name in (site.name, *site.tied))
        problem = next((problem for problem in (*problems, *read_outside) if problem), None)
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
        groups = ties.groups(everything, split)
        found: dict[int, list[str]] = {}
        for name in uses:
            names = [name, *(other for other in groups[name] if other != name)]
            found.setdefault(id(groups[name]), sorted(names, key=lambda other: other not in split))
        return list(found.values())

    def _overlaps(self) -> dict[str, str]:
        """Parameters that something reads in another form than as itself: transposed, sliced, or as a buffer."""
        buffers = dict(self.module.named_buffers())
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return overlaps(parameters | buffers, buffers)

    def _mark_unreached(self, use: Use) -> Use:
        if self._traced is None or "." not in use.root:
            return use
        steps = use.where.split(".")
        if any(".".join(steps[:i]) in self._traced.called for i in range(1, len(steps) + 1)):
            return use
        return dataclasses.replace(use, where=f"{use.where} (not in the trace)")

    def _owners(self, *names: str) -> list[_Owner]:
        """The modules that hold a weight, each once, also where one module goes by several names."""
        owners = [self._owner(name) for name in names]
        return list({(id(owner.module), owner.name): owner for owner in owners}.values())

    def _owner(self, name: str) -> _Owner:
        path, _, leaf = name.rpartition(".")
        return _Owner(self.module.get_submodule(path), leaf)


def _agree(use: Use, layer: Use) -> bool:
    """Whether what a trace shows of a weight is what the layer that owns it says already."""
    if (use.kind == "Embedding") != (layer.kind == "Embedding"):
        return False  # a table that is multiplied too
    return (use.axis, use.out_axis, use.groups, use.problem) == (layer.axis, layer.out_axis, layer.groups, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fold:
    name: str
    pair: SplitWeight

    def __call__(self) -> Tensor:
        return weightnorm.fold(self.pair.g, self.pair.v, name=self.name)


def _spelled(split: Mapping[str, SplitWeight]) -> set[str]:
    """Names of the parameters that hold a half of a pair."""
    return {key for name, pair in split.items() for key in pair.keys(name)}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
