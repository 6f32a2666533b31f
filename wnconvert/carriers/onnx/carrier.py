"""The weights of an ONNX model, as `convert` sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto
from torch import Tensor

from wnconvert import bits, names
from wnconvert.carriers.onnx import external, tensors, views
from wnconvert.carriers.onnx.edit import Editor
from wnconvert.carriers.onnx.graphs import IR_WITH_INITIALIZERS, Constant, GraphIndex, Scope, all_tensors
from wnconvert.carriers.onnx.pairs import Pair, emit, find_pairs
from wnconvert.carriers.onnx.roots import OTHER_FORM
from wnconvert.carriers.onnx.uses import find_uses
from wnconvert.errors import UsageError
from wnconvert.garbage import unwatched
from wnconvert.sites import Dim, RowCounts, Scheme, Site, Use, resolve
from wnconvert.stream import plan

INTEGER_CONSTANTS = 9
"""The first operator set whose Constant makes integers."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeferredFold:
    """A pair whose nodes are gone from the model, and whose weight has to be written.

    Attributes:
        pair: both halves, where they lie.
        tensor: holds the direction and will hold the weight.
        original: the same referring to the data that the weight had before it was split, if that is still there.
    """

    pair: plan.Pair
    tensor: TensorProto
    original: TensorProto | None


class OnnxCarrier:
    """A `DeferringCarrier` over a ModelProto, which it changes in place.

    The tensor of a weight stays where it is and under its name, and becomes the direction. Only the magnitude and a few
    nodes are added, and everything that read the weight reads their result.

    Args:
        model: loaded without its external data.
        folder: where the external data is.
    """

    walker = "onnx"
    walker_note: str | None = None

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._model = model
        self.folder = folder
        self._deferred: dict[str, Site] = {}
        self._folds: list[DeferredFold] = []
        self._outcomes: dict[str, RowCounts | str] = {}
        self._editor, self._edited = Editor(), True
        self._last_read = torch.empty(0)
        self._refresh()

    @property
    def model(self) -> ModelProto:
        """The model as it stands now."""
        self._editor.finish()
        return self._model

    def _refresh(self) -> None:
        """Index the model again if it was edited."""
        if not self._edited:
            return
        self._edited = False
        with unwatched():
            self.index = GraphIndex(self.model)
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

    def defer_split(self, site: Site, scheme: Scheme) -> bool:
        """See `DeferringCarrier.defer_split`. That is so for every weight in a data file.

        Raises:
            UsageError: see `put_pair`.
        """
        tensor = self._by_name[site.name].tensor
        if not external.is_external(tensor):
            return False
        kind = TensorProto.FLOAT if tensor.data_type in tensors.HALF else tensor.data_type
        self._put_nodes(site, TensorProto(data_type=kind, dims=site.g_shape), scheme)
        self._deferred[site.name] = site
        return True

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """Add the magnitude and the nodes, and let every reader of the weight read their result.

        Raises:
            UsageError: a scheme is asked for. Pairs in a graph are found by structure, so there is nothing to spell.
        """
        self._put_nodes(site, tensors.make("", g), scheme)
        # Where no row had to change, v is the tensor that was read.
        if v.data_ptr() != self._last_read.data_ptr():
            tensors.write_inline(self._by_name[site.name].tensor, v)

    def defer_fold(self, site: Site) -> bool:
        """See `DeferringCarrier.defer_fold`. That is so for every direction in a data file."""
        pair = self._pair_of[self._by_name[site.name]]
        g, v = pair.g.tensor, pair.v.tensor
        if not external.is_external(v):
            return False
        halves = plan.Pair(site.name, views.stored(g, self.folder), views.stored(v, self.folder))
        self._folds.append(DeferredFold(halves, v, self._original(pair)))
        self._take_out(pair)
        return True

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """Take the nodes and the magnitude out again, and let every reader read the tensor itself."""
        pair = self._pair_of[self._by_name[site.name]]
        v, original, folded = pair.v.tensor, self._original(pair), weight()
        if original is not None and bits.same(folded, external.read(original, self.folder)):
            v.CopyFrom(original)
        elif not bits.same(folded, tensors.read_inline(v)):
            tensors.write_inline(v, folded)
        self._take_out(pair)

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
        """Locations of the external data that the model refers to."""
        return {part.location for _, part in self.located()}

    def located(self, folder: Path | None = None) -> list[tuple[TensorProto, external.Slice]]:
        """Every external tensor with its place in a folder, that of the model if None.

        Raises:
            InputError: see `external.locate`.
        """
        return [
            (tensor, external.locate(tensor, self.folder if folder is None else folder))
            for tensor in all_tensors(self.model)
            if external.is_external(tensor)
        ]

    def deferred_splits(self) -> list[tuple[Site, Pair]]:
        """Splits whose magnitudes have no values yet, each with its pair as it stands in the model now."""
        if self._deferred:
            self._refresh()
        return [(site, self._pair_of[self._by_name[name]]) for name, site in self._deferred.items()]

    def deferred_folds(self) -> list[DeferredFold]:
        """Folds whose weights have no values yet."""
        return self._folds

    def settle(self, outcomes: Mapping[str, RowCounts | str]) -> None:
        """Say what deferred splits came to by site name. A reason instead of counts takes a split back."""
        for name, outcome in outcomes.items():
            if isinstance(outcome, str):
                self._take_out(self._pair_of[self._by_name[name]])
        self._outcomes |= outcomes
        self._deferred.clear()

    def outcomes(self) -> Mapping[str, RowCounts | str]:
        """See `DeferringCarrier.outcomes`."""
        return self._outcomes

    def _original(self, pair: Pair) -> TensorProto | None:
        """Where the weight of a pair was in a data file before it was split, if it is there still."""
        last = pair.result.node
        original = None if last is None else external.recall(last.doc_string, pair.v.tensor)
        return original if original is not None and external.is_there(original, self.folder) else None

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
        if value.is_input and self._model.ir_version >= IR_WITH_INITIALIZERS:
            return "it can be overridden from outside: it is an input of the graph as well as an initializer"
        if value.is_output:
            return "it is an output of the graph"
        if value.name in self._trained:
            return "training_info updates it"
        return None

    def _group_problem(self, site: Site) -> str | None:
        """Why a weight cannot be split by groups: its Reshape needs integers, which the oldest models cannot hold."""
        if site.groups > 1 and self._model.ir_version < IR_WITH_INITIALIZERS and self.index.opset < INTEGER_CONSTANTS:
            return f"operator set {self.index.opset} has no integer Constant, which a split by groups needs"
        return None

    def _read(self, value: Constant) -> Tensor:
        return views.read(value.tensor, self.folder)

    def _reader(self, value: Constant) -> Callable[[], Tensor]:
        pair = self._pair_of.get(value)
        if pair is None:
            return views.Plain(value.tensor, self.folder)
        return views.Folded(self.index.label(value), pair.g.tensor, pair.v.tensor, self.folder)

    def _put_nodes(self, site: Site, magnitude: TensorProto, scheme: Scheme) -> None:
        self._edited = True
        if scheme != "legacy":
            raise UsageError("an ONNX graph names its tensors freely, so --names has no meaning for it")
        value = self._by_name[site.name]
        magnitude.name = self.index.new_name(names.spell(value.name, "legacy")[0])
        made = emit(self.index, value, magnitude, site.axis, site.groups)
        self._editor.insert(value, [*self._hold(value.scope, made.constants), *made.nodes])
        for consumer in value.consumers:
            consumer.node.input[consumer.position] = made.result

    def _take_out(self, pair: Pair) -> None:
        self._edited = True
        for consumer in pair.result.consumers:
            consumer.node.input[consumer.position] = pair.v.name
        self._editor.remove(pair)

    def _hold(self, scope: Scope, constants: Iterable[TensorProto]) -> list[NodeProto]:
        """Put new tensors into a graph: as initializers, or as nodes where an initializer has to be an input too."""
        if self._model.ir_version >= IR_WITH_INITIALIZERS:
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
