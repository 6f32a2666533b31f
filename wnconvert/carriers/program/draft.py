"""A copy of an exported program that can be changed, and made into a new program."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from wnconvert.errors import InputError
from wnconvert.walk import program as walk


class Draft:
    """Graph, signature and state of a program. The program that it was made from stays as it is.

    Attributes:
        module: the graph, with the graphs of its higher-order operators, which nothing here changes.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._signature = copy.deepcopy(program.graph_signature)
        self._calls = copy.deepcopy(program.module_call_graph)
        self.module = fx.GraphModule(program.graph_module, _copied(program.graph))
        inputs = walk.inputs_of(self.graph)
        self._specs: dict[fx.Node, InputSpec] = dict(zip(inputs, self._signature.input_specs, strict=True))
        self._nodes = {name: node for node, name in walk.leaves_of(self.graph, self._signature).items()}
        self._state: dict[str, Any] = dict(program.state_dict)
        self._constants: dict[str, Any] = dict(program.constants)
        self._mode: FakeTensorMode | None = detect_fake_mode([node.meta.get("val") for node in inputs])

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def mode(self) -> FakeTensorMode:
        """What the stand-ins of this program belong to."""
        if self._mode is None:
            raise InputError("the program says no shapes of its inputs, so no weight of it can be replaced")
        return self._mode

    def node(self, name: str) -> fx.Node:
        """The placeholder of a parameter or buffer."""
        return self._nodes[name]

    def leaves(self) -> dict[fx.Node, str]:
        """The placeholders of parameters and buffers, with their names."""
        return {node: name for name, node in self._nodes.items()}

    def tensors(self) -> dict[str, Any]:
        """Everything that the program holds, by name: parameters, buffers and constants."""
        return {**self._constants, **self._state}

    def holds(self, name: str) -> bool:
        """Whether a name is taken, by a tensor or by a module that holds tensors."""
        return any(held == name or held.startswith(f"{name}.") for held in (*self._nodes, *self.tensors()))

    def is_parameter(self, name: str) -> bool:
        return self._specs[self._nodes[name]].kind is InputKind.PARAMETER

    def returned(self) -> frozenset[str]:
        """The parameters and buffers for which the program returns something: a new value, or a gradient."""
        return frozenset(str(spec.target) for spec in self._signature.output_specs if spec.target is not None)

    def inserting_after_inputs(self) -> AbstractContextManager[Any]:
        """Within it, new nodes go in front of the first operator."""
        return self.graph.inserting_before(next(node for node in self.graph.nodes if node.op != "placeholder"))

    def root_meta(self) -> dict[str, Any]:
        """What says that a node belongs to the root module; `torch.export.unflatten` sorts nodes by that."""
        stacks = (node.meta.get("nn_module_stack") for node in self.graph.nodes)
        root = next((dict([next(iter(stack.items()))]) for stack in stacks if stack), None)
        return {} if root is None else {"nn_module_stack": root}

    def exchange(self, old: Collection[str], new: Mapping[str, Tensor]) -> list[fx.Node]:
        """Put inputs where others are: at the place of the first one, and of its kind.

        Args:
            old: names of parameters or buffers. Their placeholders must be erased before `build`.
            new: tensors by name.

        Returns:
            The new placeholders.
        """
        first = min(self._nodes.pop(name) for name in old)
        spec, made = self._specs[first], []
        prefix = "p_" if spec.kind is InputKind.PARAMETER else "b_"
        for name, tensor in new.items():
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(prefix + name.replace(".", "_"))
            node.target = node.name  # it has a number behind it where the name was taken
            node.meta = {"val": self.mode.from_tensor(tensor, static_shapes=True)}
            self._nodes[name] = node
            self._specs[node] = dataclasses.replace(spec, arg=TensorArgument(name=node.name), target=name)
            made.append(node)
        self._state = _exchanged(self._state, old, new)
        self._constants = _exchanged(self._constants, old, new)
        return made

    def redirect(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that uses a node use another one, in the signature too."""
        old.replace_all_uses_with(new)
        self._signature.replace_all_uses(old.name, new.name)
        for entry in self._calls:
            if entry.signature is not None:
                entry.signature.replace_all_uses_with(old, new)

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Erase nodes that nothing outside them uses any more, and the constants that only they needed."""
        needed: set[fx.Node] = set()
        for node in sorted(nodes, reverse=True):
            needed = {*needed, *node.all_input_nodes} - {node}
            self.graph.erase_node(node)
            self._specs.pop(node, None)
        for node in sorted(needed, reverse=True):
            if node.op == "call_function" and not node.all_input_nodes and not node.users:
                self.graph.erase_node(node)

    def build(self) -> ExportedProgram:
        """The program as it is now."""
        before, signature = self._program, copy.deepcopy(self._signature)
        signature.input_specs = [self._specs[node] for node in walk.inputs_of(self.graph)]
        return ExportedProgram(
            root=self.module,
            graph=_copied(self.graph),
            graph_signature=signature,
            state_dict=dict(self._state),
            range_constraints=copy.deepcopy(before.range_constraints),
            module_call_graph=copy.deepcopy(self._calls),
            example_inputs=before.example_inputs,
            constants=dict(self._constants),
            verifiers=list(before.verifiers),
        )


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy with the same names of nodes, which the signature refers to.

    Exported programs use names that a graph would not choose, such as `input`.
    """
    made = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, made.nodes, strict=True):
        if new.name != old.name:
            made._graph_namespace._used_names.add(old.name)
            new.name = old.name
    return made


def _exchanged(held: dict[str, Any], old: Collection[str], new: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same entries with new ones at the place of the first old one."""
    made: dict[str, Any] = {}
    for name, value in held.items():
        if name not in old:
            made[name] = value
        elif not made.keys() & new.keys():
            made |= new
    return made
