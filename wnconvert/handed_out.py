"""Weights that were computed and handed out, in case somebody writes into them: `nn.init`, `.data`, `copy_`.

A plain parameter keeps what is written into it. A computed weight is a fresh tensor that nobody looks at again. So each
one that leaves its layer is kept together with a checksum until the layer is used next, and split anew if it changed.
What has become of `g` and `v` meanwhile does not matter: nobody writes into a weight without meaning it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wnconvert import bits, eager, kinds

_KEY = "_weight_norm_handed_out"
"""In the `__dict__` of the module, so that it goes with the module; `settle` empties it before pickling."""

_LAYERS = ("torch.nn.modules.", *{kind.path.rpartition(".")[0] for kind in kinds.MODULES} - {"torch.nn"})
"""Python modules that only read their weights, many times a second, but where they initialise them."""

_CONTAINERS = "torch.nn.modules.container"
"""Reads its weights for somebody else: `ParameterList` and `ParameterDict`."""


class _Read(NamedTuple):
    weight: Tensor
    checksum: tuple[Tensor, Tensor]


def remember(module: nn.Module, name: str, weight: Tensor, reader: FrameType) -> None:
    """Keep a weight that is about to leave its layer, unless the reader is known to leave it alone."""
    home = reader.f_globals.get("__name__", "")
    if home != _CONTAINERS and home.startswith(_LAYERS) and "reset_parameters" not in reader.f_code.co_name:
        return
    # Tracers, transforms and distributed tensors hand out stand-ins.
    if type(weight) is Tensor and eager.is_plain():
        vars(module).setdefault(_KEY, {})[name] = _Read(weight, _checksum(weight))


def any_of(module: nn.Module) -> bool:
    """Whether a weight of this module is out there."""
    return _KEY in vars(module)


def written(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Forget what was handed out, and yield each weight that has changed since."""
    reads: dict[str, _Read] = vars(module).pop(_KEY, {})
    for name, read in reads.items():
        now = _checksum(read.weight)
        if not all(torch.equal(a, b) for a, b in zip(read.checksum, now, strict=True)):
            yield name, read.weight


def forget(module: nn.Module, name: str | None = None) -> None:
    """Drop what was handed out: of one weight, or of all."""
    if name is None:
        vars(module).pop(_KEY, None)
    else:
        vars(module).get(_KEY, {}).pop(name, None)


def _checksum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits along rows and along columns: no write that a person would think of leaves both as they were."""
    integers = bits.as_integers(weight.detach())
    rest = tuple(range(1, integers.dim()))
    return integers.sum(0, dtype=torch.int64), integers.sum(rest, dtype=torch.int64) if rest else integers.long()
