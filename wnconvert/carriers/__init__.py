"""What holds the weights: a module, a state dict, an ONNX graph.

A carrier finds uses, and reads and writes tensors by site. It never computes. One file, or one small folder, each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from wnconvert.sites import Dim, RowCounts, Scheme, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Carrier(Protocol):
    """The whole of what `convert` needs from a network.

    Attributes:
        walker: what found the sites: `fx`, `export`, `modules`, `keys` or `onnx`.
        walker_note: why a weaker walker than the best was used, or None.
    """

    walker: str
    walker_note: str | None

    def sites(self, dim: Dim) -> list[Site]:
        """List every weight that is or could be split, also the ones that must be skipped, with the reason."""

    def read_weight(self, site: Site) -> Tensor:
        """Return a plain weight. May alias the carrier's own memory; callers do not write to it."""

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return `(g, v)` of a split weight, as they are stored."""

    def g_dtype(self, site: Site) -> torch.dtype | None:
        """Dtype in which to store the magnitude of a site; None for the weight's own."""

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """Replace a plain weight and everything tied to it by a pair."""

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """Replace a pair by a plain weight. `weight` may be called now or when the carrier is saved."""

    def rename(self, site: Site, scheme: Scheme) -> None:
        """Spell the keys of a split weight in another scheme."""

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """Every tensor of the network by its plain name, pairs multiplied back. This is what `verify` compares."""


@runtime_checkable
class DeferringCarrier(Carrier, Protocol):
    """A carrier that can leave the arithmetic to whoever saves it, so that no tensor is read before."""

    def defer_split(self, site: Site, scheme: Scheme) -> bool:
        """Put a pair in the place of a weight and everything tied to it. False if the values are needed now."""

    def defer_fold(self, site: Site) -> bool:
        """Put a weight in the place of a pair and everything tied to it. False if the values are needed now."""

    def outcomes(self) -> Mapping[str, RowCounts | str]:
        """What the deferred splits came to by site name, once saved: counts, or why the weight stayed as it was."""
