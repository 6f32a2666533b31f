"""Which weights of the graphs in a network something else reads too: a forward pass around them, by `self.graph.w`.

A graph can compute a weight wherever it reads it. Code around it cannot: it would find the weight gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from wnconvert.walk.fx import Tracer
from wnconvert.walk.ladder import Example
from wnconvert.walk.twin import twin


def outside_reads(root: nn.Module, example: Example | None) -> Mapping[str, str]:
    """Find the parameters of graphs, and of plain modules below them, that code outside every graph reads.

    Args:
        root: a network that holds graphs.
        example: inputs for a network that torch.fx cannot trace.

    Returns:
        What is known of the reader, by each name of the parameter.
    """
    read: set[str] = set()
    seen = _watch(root, None, read) or (example is not None and _watch(root, example, read))
    found = dict.fromkeys(read, "the forward pass around its graph reads it too")
    if not seen:
        # No forward pass to watch. Code that reads a parameter has its name somewhere.
        words = set(_words(root))
        for name, _ in _held(root):
            if name not in found and name.rpartition(".")[2] in words:
                found[name] = "the forward pass around its graph may read it too, and no trace shows whether it does"
    return found


def _held(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in root.named_modules(remove_duplicate=False):
        if _is_holder(module):
            yield from module.named_parameters(path, recurse=False, remove_duplicate=False)


def _is_holder(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) or type(module) is nn.Module


def _watch(root: nn.Module, example: Example | None, read: set[str]) -> bool:
    """Run the forward pass, on stand-ins unless there is an example, and add the parameters that it reads from holders.

    Returns:
        Whether it got to its end.
    """
    seen: set[int] = set()
    names: dict[str, int] = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), twin(root, data=example is not None) as copied:
            names |= {name: id(parameter) for name, parameter in _held(copied)}
            for module in list(copied.modules()):
                if _is_holder(module):
                    module.__class__ = _watched(type(module), seen)
            if example is None:
                Tracer(into_layers=False).trace(copied)
            else:
                for parameter in copied.parameters():
                    parameter.data = parameter.data.clone()  # what it writes must not stay
                copied(*example.args, **example.kwargs)
    except Exception:  # noqa: BLE001
        # The forward pass is somebody's code run on stand-ins, and so may be copying: they may raise anything at all.
        return False
    finally:
        read |= {name for name, key in names.items() if key in seen}
    return True


def _watched(cls: Any, seen: set[int]) -> Any:
    def get(self: nn.Module, name: str) -> Any:
        parameter = vars(self).get("_parameters", {}).get(name)
        # The code of a graph is compiled under a name of its own.
        if parameter is not None and not sys._getframe(1).f_code.co_filename.startswith("<eval_with_key>"):
            seen.add(id(parameter))
        return cls.__getattr__(self, name)

    return type(cls.__name__, (cls,), {"__getattr__": get})


def _words(root: nn.Module) -> Iterator[str]:
    """Names and strings in the code of the modules that are somebody's own."""
    classes = {cls for module in root.modules() if not _is_holder(module) for cls in type(module).__mro__}
    for cls in classes:
        if not f"{cls.__module__}.".startswith(("torch.", "builtins.")):
            # What built the network has run already.
            for value in (value for name, value in vars(cls).items() if name != "__init__"):
                code = getattr(getattr(value, "fget", value), "__code__", None)
                if isinstance(code, CodeType):
                    yield from _words_of(code)


def _words_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant.rpartition(".")[2]
        elif isinstance(constant, CodeType):
            yield from _words_of(constant)
