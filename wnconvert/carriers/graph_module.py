"""The weights that the graph of an `fx.GraphModule` reads by name, at the root of a network or anywhere inside it.

No layer computes them, so the graph has to: a read of `w` becomes reads of `w_g` and `w_v` and the formula, in plain
torch functions, for the dtype that the weight has at that time. The layers that a graph calls are split like all
others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from torch import Tensor, fx, nn

from wnconvert import layers
from wnconvert.carriers import graph_edit
from wnconvert.carriers.graph_edit import Reads
from wnconvert.carriers.module_forms import SplitWeight, pair_problem
from wnconvert.carriers.outside_reads import outside_reads
from wnconvert.names import spell
from wnconvert.sites import Use
from wnconvert.walk import graph_uses
from wnconvert.walk.graph_uses import GraphUses
from wnconvert.walk.ladder import Example
from wnconvert.walk.trace import weights_of


class GraphWeights:
    """Every `GraphModule` of a network, and what their graphs do with its weights.

    Attributes:
        uses: of weights by functions. `read` fills it.
        pairs: weights that a graph computes from a magnitude and a direction, by name. `read` fills it.
        others: names of functions that take a weight and are no layers, by weight. `read` fills it.
        written: how the graphs change parameters, or computed weights, in place, by name. `read` fills it.
    """

    def __init__(self, root: nn.Module, example: Example | None = None) -> None:
        self._root, self._example = root, example
        self._modules = [(path, module) for path, module in root.named_modules() if isinstance(module, fx.GraphModule)]
        self._formulas: dict[str, dict[str, list[fx.Node]]] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._edited: dict[str, None] = {}
        self._indices: dict[str, Reads] = {}
        self.uses: list[Use] = []
        self.pairs: dict[str, SplitWeight] = {}
        self.others: dict[str, tuple[str, ...]] = {}
        self.written: dict[str, str] = {}

    @property
    def called(self) -> frozenset[str]:
        """Names of the modules that the graphs call."""
        return frozenset(
            _join(path, str(node.target))
            for path, module in self._modules
            for node in module.graph.nodes
            if node.op == "call_module"
        )

    def read(self, held: Mapping[str, SplitWeight]) -> None:
        """Read the graphs as they are now.

        Args:
            held: the weights that layers hold split.
        """
        self.uses, self.pairs, self.written, self._formulas, self._keys, self._indices = [], {}, {}, {}, {}, {}
        if not self._modules:
            return
        tensors, clashing = weights_of(self._root), set()
        handed: dict[fx.Node, str] = {}
        for path, module in self._modules:
            found, leaves = self._read_graph(path, module, tensors, handed)
            self.others |= found.others
            self.uses += [dataclasses.replace(use, where=_join(path, use.where)) for use in found.uses]
            for formula in found.formulas:
                keys = formula.g, formula.v
                if self._keys.setdefault(formula.name, keys) != keys:
                    clashing.add(formula.name)
                node = graph_edit.past_cast(formula, tensors[formula.v].dtype, leaves)
                self._formulas.setdefault(formula.name, {}).setdefault(path, []).append(node)
        self.written = {use.root: use.problem or "changed in place" for use in reversed(self.uses) if use.written}
        taken: set[str] = set()
        for name, keys in self._keys.items():
            if name not in held:
                g, v = (tensors[key] for key in keys)
                problem = "its direction belongs to several magnitudes" if name in clashing else None
                problem = problem or self._problem(name, keys, taken)
                self.pairs[name] = SplitWeight("graph", g, v, problem or pair_problem(g, v), keys)
                taken |= {*keys}
        split = {**held, **self.pairs}
        halves = {key for name, pair in split.items() for key in pair.keys(name)}
        plain = dict(self._root.named_parameters(remove_duplicate=False)).keys() - halves
        self.uses = [use for use in self.uses if use.root in plain or use.root in split]

    def reads(self, name: str) -> bool:
        """Whether a graph reads this parameter."""
        return next(self._reads(name), None) is not None

    def holds(self, name: str) -> bool:
        """Whether it is for graphs to compute this weight: what it belongs to has no forward pass of its own."""
        owner = self._root.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, fx.GraphModule) or (type(owner) is nn.Module and self.reads(name))

    def obstacle(self, name: str) -> str | None:
        """Why graphs cannot compute a weight that `holds` leaves to them, or None."""
        return self._outside.get(name) if self.holds(name) else None

    @functools.cached_property
    def _outside(self) -> Mapping[str, str]:
        """Parameters that something outside the graphs reads. A graph at the root leaves nothing outside."""
        if not self._modules or isinstance(self._root, fx.GraphModule):
            return {}
        return outside_reads(self._root, self._example)

    def other_reader(self, keys: Mapping[str, tuple[str, str]]) -> str | None:
        """What a graph does with the halves of a pair beside computing the weight, or None.

        Args:
            keys: names of the halves by each name of the weight.
        """
        for path, module in self._modules:
            below = (_below(path, key) for halves in keys.values() for key in halves)
            formulas = [node for name in keys for node in self._formulas.get(name, {}).get(path, [])]
            targets = [target for target in below if target is not None]
            other = graph_edit.other_reader(self._index(path, module), targets, formulas)
            if other is not None:
                return f"the graph uses its magnitude or direction by itself, in {_join(path, other.name)}"
        return None

    def register(self, name: str, pair: tuple[nn.Parameter, nn.Parameter]) -> None:
        """Put a pair in the place of a plain parameter that only graphs read."""
        path, _, leaf = name.rpartition(".")
        held = self._root.get_submodule(path)._parameters
        if leaf in held:
            _exchange(held, (leaf,), dict(zip(spell(leaf, "legacy"), pair, strict=True)))

    def split(self, name: str, spec: layers.Spec, v: Tensor) -> None:
        """Compute a weight wherever a graph reads it. Its pair is in place already."""
        for path, module, nodes in list(self._reads(name)):
            g_name, v_name = spell(str(nodes[0].target), "legacy")
            graph_edit.split_reads(self._index(path, module), nodes, (g_name, v_name), spec, v)
            self._edited[path] = None

    def fold(self, name: str, weight: nn.Parameter) -> None:
        """Read a weight wherever a graph computes it. It takes the place of a pair that only graphs read."""
        if name in self.pairs:
            self._put_plain(name, self.pairs.pop(name).keys(name), weight)
        modules = dict(self._modules)
        for path, nodes in self._formulas.pop(name, {}).items():
            g, v, plain = (str(_below(path, key)) for key in (*self._keys[name], name))
            graph_edit.fold_formulas(self._index(path, modules[path]), nodes, (g, v), plain)
            self._edited[path] = None

    def finish(self) -> None:
        """Bring the code of every edited graph up to date. Until then it does not run."""
        modules = dict(self._modules)
        while self._edited:
            modules[self._edited.popitem()[0]].recompile()

    @staticmethod
    def _read_graph(
        path: str, module: fx.GraphModule, tensors: Mapping[str, Tensor], handed: dict[fx.Node, str]
    ) -> tuple[GraphUses, Mapping[fx.Node, str]]:
        """Read one graph, and tell which of its nodes are weights.

        `handed` are placeholders that are weights; those of the graphs that it calls are added.
        """
        graph = module.graph
        names = {node: _join(path, str(node.target)) for node in graph.nodes if node.op == "get_attr"}
        leaves = {node: name for node, name in names.items() if name in tensors}
        leaves |= {node: handed[node] for node in graph.find_nodes(op="placeholder") if node in handed}
        for _, given in graph_edit.calls(module):
            handed |= {inner: leaves[outer] for inner, outer in given.items() if outer in leaves}
        return graph_uses.read(graph, leaves, tensors), leaves

    def _index(self, path: str, module: fx.GraphModule) -> Reads:
        if path not in self._indices:
            self._indices[path] = Reads(module.graph)
        return self._indices[path]

    def _reads(self, name: str) -> Iterator[tuple[str, fx.GraphModule, list[fx.Node]]]:
        for path, module in self._modules:
            target = _below(path, name)
            nodes = self._index(path, module).of(target) if target is not None else []
            if nodes:
                yield path, module, nodes

    def _problem(self, name: str, keys: tuple[str, str], taken: set[str]) -> str | None:
        """Why a pair cannot be folded. `taken` are the halves of other pairs."""
        if not taken.isdisjoint(keys):
            return "its magnitude or direction belongs to another weight too"
        written = next((self.written[key] for key in (name, *keys) if key in self.written), None)
        outside = next((self._outside[key] for key in keys if key in self._outside), None)
        if written or outside:
            return written or outside
        for key in keys:
            owner = self._root.get_submodule(key.rpartition(".")[0])
            if type(owner) is not nn.Module and not isinstance(owner, fx.GraphModule):
                return f"{key} belongs to a {type(owner).__name__}, which may use it by itself"
        return None

    def _put_plain(self, name: str, keys: tuple[str, str], weight: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self._root.get_submodule(path)
        owners = [self._root.get_submodule(key.rpartition(".")[0]) for key in keys]
        leaves = [key.rpartition(".")[2] for key in keys]
        if all(other is owner for other in owners):
            _exchange(owner._parameters, tuple(leaves), {leaf: weight})
            return
        for other, key in zip(owners, leaves, strict=True):
            del other._parameters[key]
        owner.register_parameter(leaf, weight)
        for emptied in {key.rpartition(".")[0] for key in keys}:
            self._prune(emptied)

    def _prune(self, path: str) -> None:
        """Remove a module that held nothing but a half of a pair, and what held nothing but that."""
        while path:
            parent, _, leaf = path.rpartition(".")
            holder, module = self._root.get_submodule(parent), self._root.get_submodule(path)
            if type(module) is not nn.Module or module._parameters or module._buffers or module._modules:
                return
            del holder._modules[leaf]
            path = parent


def _exchange(
    held: dict[str, nn.Parameter | None], old: tuple[str, ...], new: Mapping[str, nn.Parameter | None]
) -> None:
    """Put entries in the place of others. Optimizers count on the order."""
    entries = list(held.items())
    held.clear()
    placed = False
    for key, parameter in entries:
        if key not in old:
            held[key] = parameter
        elif not placed:
            held.update(new)
            placed = True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _below(path: str, name: str) -> str | None:
    """A full name as a graph at this path says it, or None if it is not below."""
    if not path:
        return name
    return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else None
