"""Find the tensors of a nested checkpoint: state dicts wherever they nest, whole modules, optimizer state."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wnconvert.carriers.overlap import overlaps
from wnconvert.files.entries import Entry, Raw

_OPTIMIZER_NAME = re.compile(r"(^|[^a-z])optim(s|izers?)?([^a-z]|$)")


@dataclasses.dataclass(slots=True)
class Tree:
    """What a checkpoint holds.

    Attributes:
        entries: the tensors of its networks, in order.
        kept: tensors of optimizer state.
        modules: whole modules, by dotted path.
        optimizers: dotted paths of optimizer state that is still there.
        dropped: dotted paths of optimizer state that was taken out.
        holders: the dict behind each `Entry.home`.
    """

    entries: list[Entry] = dataclasses.field(default_factory=list)
    kept: list[Entry] = dataclasses.field(default_factory=list)
    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    optimizers: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    holders: dict[int, dict[Any, Any]] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Where the tensors of a file are."""

    def raw(self, tensor: Tensor) -> Raw | None:
        """The bytes of a tensor in its logical order, if they are in a file like that."""

    def look(self, tensor: Tensor) -> Tensor:
        """The tensor, which is about to be read."""


class Memory:
    """Tensors that are in no file."""

    def raw(self, tensor: Tensor) -> Raw | None:  # noqa: ARG002
        """See `Source.raw`."""
        return None

    def look(self, tensor: Tensor) -> Tensor:
        """See `Source.look`."""
        return tensor


def explore(root: object, *, drop_optimizer: bool = False, source: Source | None = None) -> Tree:
    """Walk through dicts, lists and tuples. Anything else is left as it is.

    A dict or module that is held in two places is listed once, under its first name.

    Args:
        root: what torch.load gave.
        drop_optimizer: take optimizer state out of the dicts that hold it.
        source: of the tensors, if that is a file.
    """
    source = source or Memory()
    tree = Tree()
    names: set[str] = set()
    seen: set[int] = set()
    # A stack and not a recursion: a hostile file may nest deeper than Python calls may.
    stack: list[tuple[tuple[str, ...], object, bool]] = [((), root, False)]
    while stack:
        path, value, optimizer = stack.pop()
        if not isinstance(value, (dict, list, tuple, nn.Module, torch.optim.Optimizer)) or id(value) in seen:
            continue
        seen.add(id(value))
        if not optimizer and is_optimizer(path[-1] if path else "", value):
            optimizer = True
            tree.optimizers.append(".".join(path))
        if isinstance(value, nn.Module) and not optimizer:
            tree.modules[".".join(path)] = value
        if not isinstance(value, (dict, list, tuple)):
            continue
        if drop_optimizer and isinstance(value, dict) and not optimizer:
            _drop(tree, path, value)
        _take_tensors(tree, path, value, optimizer=optimizer, names=names, source=source)
        inner = [((*path, str(key)), item, optimizer) for key, item in _items(value)]
        stack.extend(reversed(inner))
    _mark_overlaps(tree)
    return tree


def _mark_overlaps(tree: Tree) -> None:
    shared = overlaps({entry.name: entry.load() for entry in tree.entries})
    tree.entries[:] = [dataclasses.replace(entry, overlaps=shared.get(entry.name)) for entry in tree.entries]


def is_optimizer(name: str, value: object) -> bool:
    """Whether a part of a checkpoint is optimizer state, by its form or by its name."""
    if isinstance(value, torch.optim.Optimizer):
        return True
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        return True
    if isinstance(value, (list, tuple)) and value and all(is_optimizer("", item) for item in value):
        return True
    return isinstance(value, (dict, list, tuple)) and _OPTIMIZER_NAME.search(name.lower()) is not None


def stored_size(entry: Entry) -> int:
    """Bytes of the values of a tensor."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return math.prod(entry.shape) * dtype.itemsize


def dtype_name(tensor: Tensor) -> str:
    """As in `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _drop(tree: Tree, path: tuple[str, ...], holder: dict[Any, Any]) -> None:
    for key in [key for key, value in holder.items() if is_optimizer(str(key), value)]:
        del holder[key]
        tree.dropped.append(".".join((*path, str(key))))


def _items(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    return iter(value.items() if isinstance(value, dict) else enumerate(value))


def _take_tensors(
    tree: Tree,
    path: tuple[str, ...],
    holder: dict[Any, Any] | list[Any] | tuple[Any, ...],
    *,
    optimizer: bool,
    names: set[str],
    source: Source,
) -> None:
    found = [(key, value) for key, value in _items(holder) if isinstance(value, Tensor) and _is_plain(value)]
    if not found:
        return
    # Dots in keys can make two paths read the same; names must not.
    prefix = base = "".join(f"{part}." for part in path)
    count = 1
    while any(_named(prefix, key) in names for key, _ in found):
        count += 1
        prefix = f"{base[:-1]}#{count}."
    names |= {_named(prefix, key) for key, _ in found}
    if isinstance(holder, dict):
        tree.holders[id(holder)] = holder
    target = tree.kept if optimizer else tree.entries
    for key, tensor in found:
        fixed = not (isinstance(holder, dict) and isinstance(key, str))
        entry = _entry(_named(prefix, key), prefix, id(holder), tensor, fixed)
        target.append(dataclasses.replace(entry, load=functools.partial(source.look, tensor), raw=source.raw(tensor)))


def _named(prefix: str, key: object) -> str:
    return prefix + (key if isinstance(key, str) else f"[{key!r}]")


def _entry(name: str, prefix: str, home: int, tensor: Tensor, fixed: bool) -> Entry:
    return Entry(
        name,
        tuple(tensor.shape),
        dtype_name(tensor),
        load=lambda: tensor,
        prefix=prefix,
        home=home,
        alias=memory_of(tensor),
        requires_grad=tensor.requires_grad if isinstance(tensor, nn.Parameter) else None,
        fixed=fixed,
    )


def memory_of(tensor: Tensor) -> tuple[object, ...] | None:
    """The same for two tensors that are the same view of the same memory; None for an empty tensor."""
    if tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is ordinary memory. Sparse, quantized, nested and other special tensors stay as they are."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not (tensor.is_meta or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
