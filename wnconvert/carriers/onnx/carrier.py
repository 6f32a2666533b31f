"""The weights of an ONNX model, as `convert` sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto
from torch import Tensor

from wnconvert import bits, names, weightnorm
from wnconvert.carriers.onnx import external, tensors
from wnconvert.carriers.onnx.edit import Editor
from wnconvert.carriers.onnx.graphs import IR_WITH_INITIALIZERS, Constant, GraphIndex, Scope, all_tensors
from wnconvert.carriers.onnx.pairs import Pair, emit, find_pairs
from wnconvert.carriers.onnx.roots import OTHER_FORM
from wnconvert.carriers.onnx.uses import find_uses
from wnconvert.errors import InputError, UsageError
from wnconvert.sites import Dim, Scheme, Site, Use, resolve

INTEGER_CONSTANTS = 9
"""The first operator set whose Constant makes integers."""


class OnnxCarrier:
    """A `Carrier` over a ModelProto, which it changes in place.

    The tensor of a weight stays where it is and under its name, and becomes the direction. Only the magnitude and a few
    nodes are added, and everything that read the weight reads their result.

    Args:
        model: loaded without its external data.
        folder: where the external data is.
    """

    walker = "onnx"
    walker_note: str | None = None

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self.model = model
        self.folder = folder
        # Data that no longer is what an external tensor refers to, by the identity of that tensor.
        self._changed: dict[int, tuple[TensorProto, Callable[[], Tensor]]] = {}
        self._last_read = torch.empty(0)
        self._refresh()

    def _refresh(self) -> None:
        self.index = GraphIndex(self.model)
        self._editor = Editor()
        self._pairs = find_pairs(self.index)
        self._by_name = self.index.constants()
        self._pair_of = {pair.v: pair for pair in self._pairs.values()}
        self._trained = _trained_names(self.model)

    def sites(self, dim: Dim) -> list[Site]:
        """List every weight of the layers in the table, in the order of their first use."""
        self._refresh()
        uses = find_uses(self.index, self._pairs)
        # A pair that no layer of the table reads can be folded all the same.
        for value in self._pair_of:
            label = self.index.label(value)
            uses.setdefault(value, [Use(label, "Unknown", "", None, None)])
        return [self._site(value, found, dim) for value, found in uses.items()]

    def read_weight(self, site: Site) -> Tensor:
        """Return a plain weight.

        Raises:
            InputError: its data is damaged or missing.
        """
        self._last_read = self._read(self._by_name[site.name])
        return self._last_read

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return `(g, v)`; g is float32 for a half-type v.

        Raises:
            InputError: their data is damaged or missing.
        """
        pair = self._pair_of[self._by_name[site.name]]
        return self._read(pair.g), self._read(pair.v)

    def g_dtype(self, site: Site) -> torch.dtype | None:
        """float32 for half types, whose norm the graph computes in float32."""
        return torch.float32 if site.dtype in ("float16", "bfloat16") else None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """Add the magnitude and the nodes, and let every reader of the weight read their result.

        Raises:
            UsageError: a scheme is asked for. Pairs in a graph are found by structure, so there is nothing to spell.
        """
        if scheme != "legacy":
            raise UsageError("an ONNX graph names its tensors freely, so --names has no meaning for it")
        value = self._by_name[site.name]
        magnitude = tensors.make(self.index.new_name(names.spell(value.name, "legacy")[0]), g)
        made = emit(self.index, value, magnitude, site.axis, site.groups)
        # Where no row had to change, v is the tensor that was read.
        if v.data_ptr() != self._last_read.data_ptr():
            if external.is_external(value.tensor):
                # The original data stays where it is, and fold finds the way back to it.
                made.nodes[-1].doc_string = external.reference(value.tensor)
            self._write(value.tensor, lambda: v)
        self._editor.insert(value, [*self._hold(value.scope, made.constants), *made.nodes])
        for consumer in value.consumers:
            consumer.node.input[consumer.position] = made.result

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """Take the nodes and the magnitude out again, and let every reader read the tensor itself."""
        pair = self._pair_of[self._by_name[site.name]]
        folded = weight()
        if not bits.same(folded, self._read(pair.v)) and not self._restore(pair, folded):
            self._write(pair.v.tensor, weight)
        for consumer in pair.result.consumers:
            consumer.node.input[consumer.position] = pair.v.name
        self._editor.remove(pair)

    def rename(self, site: Site, scheme: Scheme) -> None:  # noqa: ARG002 - refused for any
        """Refuse: a pair in a graph has no keys.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{site.name}: an ONNX graph names its tensors freely, so there are no keys to rename")

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """Every initializer and Constant of every graph but strings, pairs multiplied back."""
        self._refresh()
        hidden: set[Constant] = {value for pair in self._pairs.values() for value in (pair.g, *pair.helpers)}
        found: dict[str, Callable[[], Tensor]] = {}
        for label, value in self._by_name.items():
            if value not in hidden and value.tensor.data_type != TensorProto.STRING:
                found[label] = self._reader(value)
        return found

    def magnitudes(self) -> dict[str, Tensor]:
        """Return g of every pair by the name of its site."""
        self._refresh()
        return {self.index.label(pair.v): self._read(pair.g) for pair in self._pairs.values()}

    def data_files(self) -> set[str]:
        """Locations of the external data that the model refers to, without what has been changed."""
        return {
            external.locate(tensor, self.folder).location
            for tensor in all_tensors(self.model)
            if external.is_external(tensor) and id(tensor) not in self._changed
        }

    @contextmanager
    def relocated(self, file: external.DataFile) -> Iterator[ModelProto]:
        """The model as it has to be saved, with every changed external tensor written to `file`."""
        saved = []
        try:
            for tensor, data in self._changed.values():
                before = TensorProto()
                before.CopyFrom(tensor)
                saved.append((tensor, before))
                file.put(tensor, data())
            yield self.model
        finally:
            for tensor, before in saved:
                tensor.CopyFrom(before)

    def _site(self, value: Constant, uses: list[Use], dim: Dim) -> Site:
        shape, dtype = tuple(value.tensor.dims), tensors.dtype_name(value.tensor)
        pair = self._pair_of.get(value)
        if pair is None:
            site = resolve(uses, shape, dtype, dim=dim)
            if site.skip is not None and site.skip.startswith(OTHER_FORM):
                return dataclasses.replace(site, state="split")
            reason = self._problem(value) or self._group_problem(site)
            return dataclasses.replace(site, skip=reason) if reason else site
        return Site(
            name=self.index.label(value),
            kind=uses[0].kind,
            shape=shape,
            dtype=dtype,
            axis=pair.axis,
            groups=pair.groups,
            state="split",
            uses=tuple(use.where for use in uses if use.where),
            skip=pair.problem,
        )

    def _problem(self, value: Constant) -> str | None:
        """Why a tensor cannot be split whatever uses it."""
        if value.tensor.data_type not in tensors.FLOATS:
            return f"dtype {tensors.dtype_name(value.tensor)} has no weight normalization"
        if 0 in value.tensor.dims:
            return "it is empty"
        if value.is_input and self.model.ir_version >= IR_WITH_INITIALIZERS:
            return "it can be overridden from outside: it is an input of the graph as well as an initializer"
        if value.is_output:
            return "it is an output of the graph"
        if value.name in self._trained:
            return "training_info updates it"
        return None

    def _group_problem(self, site: Site) -> str | None:
        """Why a weight cannot be split by groups: its Reshape needs integers, which the oldest models cannot hold."""
        if site.groups > 1 and self.model.ir_version < IR_WITH_INITIALIZERS and self.index.opset < INTEGER_CONSTANTS:
            return f"operator set {self.index.opset} has no integer Constant, which a split by groups needs"
        return None

    def _read(self, value: Constant) -> Tensor:
        if id(value.tensor) in self._changed:
            return self._changed[id(value.tensor)][1]()
        if external.is_external(value.tensor):
            return external.read(value.tensor, self.folder)
        return tensors.read_inline(value.tensor)

    def _reader(self, value: Constant) -> Callable[[], Tensor]:
        pair = self._pair_of.get(value)
        if pair is None:
            return lambda: self._read(value)
        return lambda: weightnorm.fold(self._read(pair.g), self._read(pair.v), name=self.index.label(value))

    def _write(self, tensor: TensorProto, data: Callable[[], Tensor]) -> None:
        if external.is_external(tensor):
            self._changed[id(tensor)] = (tensor, data)
        else:
            tensors.write_inline(tensor, data())

    def _restore(self, pair: Pair, weight: Tensor) -> bool:
        """Let a tensor refer to its original external data again, if that still is the weight, bit for bit."""
        last = pair.result.node
        original = None if last is None else external.recall(last.doc_string, pair.v.tensor)
        if original is None:
            return False
        try:
            same = bits.same(weight, external.read(original, self.folder))
        except InputError:
            return False
        if same:
            self._changed.pop(id(pair.v.tensor), None)
            pair.v.tensor.CopyFrom(original)
        return same

    def _hold(self, scope: Scope, constants: Iterable[TensorProto]) -> list[NodeProto]:
        """Put new tensors into a graph: as initializers, or as nodes where an initializer has to be an input too."""
        if self.model.ir_version >= IR_WITH_INITIALIZERS:
            scope.graph.initializer.extend(constants)
            return []
        nodes = []
        for tensor in constants:
            node = NodeProto(op_type="Constant", output=[tensor.name], name=tensor.name)
            node.attribute.add(name="value", type=AttributeProto.TENSOR, t=tensor)
            nodes.append(node)
        return nodes


def _trained_names(model: ModelProto) -> set[str]:
    """Tensors of the main graph that training_info reads or writes by name."""
    found: set[str] = set()
    for training in model.training_info:
        for binding in (*training.initialization_binding, *training.update_binding):
            found.update((binding.key, binding.value))
        for graph in (training.initialization, training.algorithm):
            found.update(name for node in graph.node for name in node.input)
    return found
