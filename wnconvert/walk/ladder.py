"""Which way a network can be walked: torch.fx, else torch.export, else one eager pass, else the tree of modules."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wnconvert.errors import UsageError
from wnconvert.walk.trace import Trace, TraceFailed


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Inputs for one forward pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None) -> Example | None:
        """Take one tensor, a sequence of positional arguments, or a mapping of keyword arguments.

        Raises:
            UsageError: it is none of these.
        """
        if inputs is None:
            return None
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {})
        raise UsageError(
            f"example_inputs is a tensor, a sequence of arguments or a mapping of keyword arguments, "
            f"not {type(inputs).__name__}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Walk:
    """How a network was walked.

    Attributes:
        walker: `fx`, `export`, `eager` or `modules`.
        note: why no better way was taken, or None.
        trace: what it shows; None for the tree of modules.
    """

    walker: str
    note: str | None = None
    trace: Trace | None = None


def walk(root: nn.Module, example: Example | None) -> Walk:
    """Trace a network in the best way that works."""
    from wnconvert.walk import fx

    try:
        return Walk("fx", trace=fx.trace(root))
    except TraceFailed as error:
        note = f"torch.fx cannot trace it ({error})"
    if example is None:
        return Walk("modules", f"{note}; example inputs would show weights that functions use")
    with _collected():
        return _by_example(root, example, note)


@contextmanager
def _collected() -> Iterator[None]:
    """Leave no garbage behind.

    Programs and failures hold weights in reference cycles, so that folding would need the memory of two networks.
    """
    # Nothing that was there before needs a look, which takes half a second where large libraries are loaded.
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not frozen:
            gc.unfreeze()


def _by_example(root: nn.Module, example: Example, note: str) -> Walk:
    from wnconvert.walk import eager, export

    try:
        return Walk("export", note, export.trace(root, example.args, example.kwargs))
    except TraceFailed as error:
        note = f"{note}; torch.export cannot either ({error})"
    try:
        return Walk("eager", note, eager.trace(root, example.args, example.kwargs))
    except TraceFailed as error:
        return Walk("modules", f"{note}; and it fails on the example inputs ({error})")
