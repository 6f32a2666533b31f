"""What a trace of a network shows, whichever way it was traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from wnconvert.sites import Use
from wnconvert.walk.reader import Computed


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """What a trace shows.

    Attributes:
        uses: of weights by functions, in the order of the calls.
        called: names of the modules that the forward pass calls.
        others: for every weight the names of functions that take it and are no layers.
        norms: weight norms that the forward pass computes; uses of the weight go by the name given here.
    """

    uses: tuple[Use, ...]
    called: frozenset[str]
    others: Mapping[str, tuple[str, ...]]
    norms: tuple[Computed, ...]


class TraceFailed(Exception):
    """A network cannot be traced this way; the message is the reason in one line."""


def failed(error: BaseException) -> TraceFailed:
    """The reason in one line, out of what a forward pass or a tracer raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return TraceFailed(f"{name}: {lines[0][:200]}" if lines else name)


def weights_of(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    named: Iterable[tuple[str, Tensor]] = (
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    )
    return dict(named)
