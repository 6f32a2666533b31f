"""Tracing one eager forward pass: it takes example inputs, and survives control flow that depends on values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from wnconvert.walk import recipe
from wnconvert.walk.graph_uses import function_name
from wnconvert.walk.moves import MOVEMENTS
from wnconvert.walk.reader import Computed, Reader
from wnconvert.walk.recipe import OPAQUE, Leaf, rebuild
from wnconvert.walk.trace import Trace, TraceFailed, failed, weights_of
from wnconvert.walk.twin import twin
from wnconvert.walk.writes import written


def trace(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """Run a network once and watch the functions that take its weights.

    Raises:
        TraceFailed: its forward pass fails on these inputs.
    """
    try:
        return _trace(root, args, kwargs, hooks=False)
    except TraceFailed:
        if not any(module._forward_hooks for module in root.modules()):
            raise
        # Some networks hand on their results through hooks. Here these see tensors with values, never stand-ins.
        return _trace(root, args, kwargs, hooks=True)


def _trace(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, hooks: bool) -> Trace:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), twin(root, data=True, hooks=hooks) as copied:
            watch = _Watch(copied)
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
            with watch.modules(copied), watch:
                copied(*args, **kwargs)
    except Exception as error:
        # The forward pass is somebody's code: it may raise anything at all.
        raise failed(error) from error
    others = {name: tuple(functions) for name, functions in watch.reader.others.items()}
    return Trace(tuple(watch.reader.uses), frozenset(watch.called), others, tuple(watch.norms))


class _Watch(TorchFunctionMode):
    """Gives every tensor that is made of weights its recipe."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        weights = weights_of(root)
        self._parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
        self.reader = Reader(weights)
        self.norms: list[Computed] = []
        self.called: dict[str, None] = {}
        self._inside: list[str] = []
        # Each tensor is kept together with its recipe, so that no other can take its id.
        self._known: dict[int, tuple[Tensor, Any]] = {}
        for name, weight in weights.items():
            self._known.setdefault(id(weight), (weight, Leaf(name)))

    @contextmanager
    def modules(self, root: nn.Module) -> Iterator[None]:
        """Note which modules run."""
        handles = []
        for name, module in root.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self.called[name] = None
                self._inside.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self._inside.pop()

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [part for part in recipe.parts((args, kwargs)) if isinstance(part, Tensor)]
        if tensors and not any(id(tensor) in self._known for tensor in tensors):
            return func(*args, **kwargs)
        name = function_name(func, args)
        # Selecting by an index from the input (one expert of many) moves elements all the same.
        plain = name.rstrip("_") in MOVEMENTS

        def value_of(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            known = self._known.get(id(part))
            if known is not None:
                return known[1]
            return part if plain and not part.is_floating_point() else OPAQUE

        where = ".".join(filter(None, (self._inside[-1] if self._inside else "", name)))
        recipes = rebuild(args, value_of), rebuild(kwargs, value_of)
        # The copy shares the memory of the parameters.
        changed = self._parameters.intersection(written(name, func, *recipes))
        if changed:
            raise RuntimeError(f"its forward pass changes {min(changed)} in place")
        result = func(*args, **kwargs)
        made, pair = self.reader.call(name, func, *recipes, where=where)
        if pair is not None:
            self.norms.append(pair)
        self._learn(result, made)
        if name == "setitem" or (name.endswith("_") and made is OPAQUE):
            # Written to, so no longer made of weights alone.
            self._known.pop(id(args[0]), None)
        return result

    def _learn(self, result: Any, made: Any) -> None:
        if isinstance(result, Tensor):
            if made is OPAQUE:
                self._known.pop(id(result), None)
            else:
                self._known[id(result)] = (result, made)
        elif isinstance(result, (tuple, list)) and made is not OPAQUE:
            for i, item in enumerate(result):
                self._learn(item, recipe.call("getitem", _item, (made, i), {}))


def _item(values: Sequence[Any], i: int) -> Any:
    return values[i]
