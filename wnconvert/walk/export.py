"""Tracing with torch.export: it takes example inputs, and follows shapes and containers that torch.fx does not."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from wnconvert.walk import program
from wnconvert.walk.trace import Trace, failed, weights_of
from wnconvert.walk.twin import twin


def trace(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """Export a network, with all shapes fixed, and read the program.

    Raises:
        TraceFailed: its forward pass depends on values, or fails.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet(), twin(root, data=True) as copied:
            exported = torch.export.export(copied, tuple(args), dict(kwargs), strict=False)
    except Exception as error:
        # The forward pass is somebody's code run on stand-ins: it may raise anything at all.
        raise failed(error) from error
    weights = weights_of(root)
    graph, constants = exported.graph_module.graph, exported.constants
    leaves = program.leaves_of(graph, exported.graph_signature)
    for node, spec in zip(program.inputs_of(graph), exported.graph_signature.input_specs, strict=True):
        constant = constants.get(str(spec.target)) if spec.kind is InputKind.CONSTANT_TENSOR else None
        if isinstance(constant, torch.Tensor):
            weights.setdefault(str(spec.target), constant)
            leaves[node] = str(spec.target)
    found = program.read(exported.graph_module, leaves, weights)
    exported.state_dict.clear()  # see `twin`
    return Trace(found.uses, _called(graph), found.others, (*found.formulas, *found.inner))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch.export prints, logs and warns about: the report says in one line why it failed."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _called(graph: fx.Graph) -> frozenset[str]:
    """Names of the modules out of whose forward passes the nodes come."""
    stacks = (node.meta.get("nn_module_stack", {}) for node in graph.nodes)
    return frozenset(str(path) for stack in stacks for path, _ in stack.values())
