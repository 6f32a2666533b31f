"""Sites of a program, and what is put in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from wnconvert import weightnorm
from wnconvert.carriers.program import formula
from wnconvert.carriers.program.draft import Draft
from wnconvert.carriers.program.weights import Plain, Split, find, has_data
from wnconvert.errors import PairError
from wnconvert.layers import Spec
from wnconvert.names import spell
from wnconvert.sites import SCHEMES, Dim, Scheme, Site, Use, resolve
from wnconvert.walk.graph_uses import between


class ProgramCarrier:
    """Fulfils `Carrier` for an exported program, which stays as it is: `rebuild` gives the converted one."""

    walker = "export"
    walker_note: str | None = None

    def __init__(self, program: ExportedProgram) -> None:
        self._draft = Draft(program)
        self._split: dict[str, Split] = {}
        self._recorded: dict[object, fx.Graph] = {}

    def rebuild(self) -> ExportedProgram:
        """The program as it is now."""
        return self._draft.build()

    def sites(self, dim: Dim) -> list[Site]:
        split, plain = find(self._draft)
        self._split = {weight.pairs[0].name: weight for weight in split}
        order = {name: i for i, name in enumerate(self._draft.leaves().values())}
        found = [(order[weight.keys[0]], self._split_site(weight)) for weight in split]
        for weight in plain:
            site = self._plain_site(weight, dim)
            if site is not None:
                found.append((order[site.name], site))
        return [site for _, site in sorted(found, key=lambda entry: entry[0])]

    def read_weight(self, site: Site) -> Tensor:
        return self._tensor(site.name).detach()

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        pair = self._split[site.name].pairs[0]
        return self._tensor(pair.g).detach(), self._tensor(pair.v).detach()

    def g_dtype(self, site: Site) -> torch.dtype | None:  # noqa: ARG002
        return None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        old, names = self._tensor(site.name), (site.name, *site.tied)
        if isinstance(old, nn.Parameter):
            g, v = nn.Parameter(g, old.requires_grad), nn.Parameter(v, old.requires_grad)
        inputs: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for name in names:
            before = self._draft.node(name)
            made = self._draft.exchange([name], dict(zip(spell(name, scheme), (g, v), strict=True)))
            inputs[before] = made[0], made[1]
        # Of tied inputs the graph uses one as a rule.
        used = [node for node in inputs if node.users]
        if used:
            weight = self._emit(*inputs[used[0]], Spec.of(site.kind, site.axis, site.groups, v.dim()), (g, v))
            for node in used:
                self._draft.redirect(node, weight)
        self._draft.erase(inputs)

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        split, value = self._split[site.name], weight()
        if split.nodes:
            # What follows may count on the layout that the formula gives.
            value = _laid_out(value, split.nodes[0].meta["val"])
        g, v = (self._tensor(key) for key in split.keys[:2])
        if isinstance(v, nn.Parameter):
            value = nn.Parameter(value, g.requires_grad or v.requires_grad)
        before = [self._draft.node(key) for key in split.keys]
        inner = between(before, split.nodes)
        # Of tied inputs the graph goes on with the one that it used.
        used = next((i for i, pair in enumerate(split.pairs) if self._draft.node(pair.v).users), 0)
        made = [self._draft.exchange([pair.g, pair.v], {pair.name: value})[0] for pair in split.pairs]
        for node in split.nodes:
            self._draft.redirect(node, self._cast(made[used], node.meta["val"].dtype))
        self._draft.erase({*inner, *split.nodes, *before})

    def rename(self, site: Site, scheme: Scheme) -> None:
        for pair in self._split[site.name].pairs:
            for old, new in zip((pair.g, pair.v), spell(pair.name, scheme), strict=True):
                before = self._draft.node(old)
                (node,) = self._draft.exchange([old], {new: self._tensor(old)})
                self._draft.redirect(before, node)
                self._draft.erase([before])

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        held, (split, _) = self._draft.tensors(), find(self._draft)
        halves = {key for weight in split for key in weight.keys}
        tensors: dict[str, Callable[[], Tensor]] = {
            name: tensor.detach for name, tensor in held.items() if isinstance(tensor, Tensor) and name not in halves
        }
        for weight in split:
            for pair in weight.pairs:
                tensors[pair.name] = _Fold(pair.name, held[pair.g], held[pair.v])
        return tensors

    def _emit(self, g: fx.Node, v: fx.Node, spec: Spec, pair: tuple[Tensor, Tensor]) -> fx.Node:
        """Compute a weight right after the inputs."""
        draft = self._draft
        key = *((t.shape, t.stride(), t.dtype, t.device) for t in pair), spec.reduced, spec.groups
        if key not in self._recorded:
            self._recorded[key] = formula.record(*pair, spec, draft.mode)
        with draft.inserting_after_inputs():
            return formula.emit(draft.graph, self._recorded[key], g, v, draft.root_meta())

    def _cast(self, weight: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The weight in the dtype that the graph expects."""
        if weight.meta["val"].dtype == dtype:
            return weight
        with self._draft.inserting_after_inputs():
            cast = self._draft.graph.call_function(torch.ops.aten._to_copy.default, (weight,), {"dtype": dtype})
        with self._draft.mode:
            cast.meta = {"val": weight.meta["val"].detach().to(dtype)}
        return cast

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._draft.tensors()[name]
        return tensor

    def _split_site(self, split: Split) -> Site:
        name, *tied = [pair.name for pair in split.pairs]
        pair = split.pairs[0]
        g, v = self._tensor(pair.g), self._tensor(pair.v)
        problem, groups, axis = split.problem, 1, None
        try:
            groups, axis = weightnorm.pair_axis(g.shape, v.shape, name)
        except PairError as error:
            problem = problem or str(error)
        taken = [other.name for other in split.pairs if other.name not in split.keys and self._draft.holds(other.name)]
        if taken:
            problem = problem or f"{taken[0]} is there already"
        if not has_data(g) or not has_data(v):
            problem = problem or _NO_DATA
        return Site(
            name=name,
            kind=next((use.kind for use in split.uses if not use.written), "Unknown"),
            shape=tuple(v.shape),
            dtype=_dtype_name(v),
            axis=axis,
            groups=groups,
            state="split",
            scheme=next((scheme for scheme in SCHEMES if spell(name, scheme) == (pair.g, pair.v)), None),
            uses=tuple(dict.fromkeys(use.where for use in split.uses)),
            tied=tuple(tied),
            skip=problem,
        )

    def _plain_site(self, weight: Plain, dim: Dim) -> Site | None:
        name, *tied = weight.names
        tensor, parameter = self._tensor(name), self._draft.is_parameter(name)
        # An embedding that shares its table with a layer follows that layer.
        uses = [use for use in weight.uses if use.kind != "Embedding"] or list(weight.uses)
        if not uses and (tensor.dim() < 2 or not parameter):
            return None
        uses = [dataclasses.replace(use, root=name) for use in uses] or [Use(name, "Unknown", name, 0, 0)]
        site = resolve(uses, tuple(tensor.shape), _dtype_name(tensor), dim=dim, tied=tied)
        problem = self._obstacle(weight)
        return site.skipped(problem) if problem else site

    def _obstacle(self, weight: Plain) -> str | None:
        """Why a plain weight of this program cannot be replaced by a pair."""
        draft, names = self._draft, weight.names
        if not all(draft.is_parameter(name) for name in names):
            return "a buffer, which does not train"
        if not has_data(self._tensor(names[0])):
            return _NO_DATA
        if weight.overlaps is not None:
            return f"{weight.overlaps} shares its memory, in another form"
        if draft.returned().intersection(names):
            return "the program returns its new value or its gradient"
        if weight.written:
            return "the program writes to it"
        if not weight.uses and weight.others:
            return f"used by {', '.join(weight.others[:3])}, which is no layer"
        keys = (key for name in names for scheme in SCHEMES for key in spell(name, scheme))
        taken = next((key for key in keys if draft.holds(key)), None)
        return None if taken is None else f"{taken} is there already"


_NO_DATA = "has no data, or is no ordinary tensor"


@dataclasses.dataclass(frozen=True, slots=True)
class _Fold:
    name: str
    g: Tensor
    v: Tensor

    def __call__(self) -> Tensor:
        return weightnorm.fold(self.g, self.v, name=self.name)


def _laid_out(weight: Tensor, like: Tensor) -> Tensor:
    """The same values in the memory format of another tensor of this shape."""
    if weight.stride() == like.stride():
        return weight
    return torch.empty_strided(like.shape, like.stride(), dtype=weight.dtype, device=weight.device).copy_(weight)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
