"""Statistics of magnitudes, for `inspect`. Nothing here imports torch, and numpy only once there is a magnitude."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from wnconvert.report.model import MagnitudeStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def statistics(g: NDArray[Any]) -> MagnitudeStatistics | None:
    """Describe the values of one magnitude tensor, or None if it is empty."""
    import numpy as np

    values = np.asarray(g, dtype=np.float64).reshape(-1)
    if not values.size:
        return None
    return MagnitudeStatistics(
        minimum=float(values.min()),
        median=float(np.median(values)),
        maximum=float(values.max()),
        negative=int((values < 0).sum()),
        zero=int((values == 0).sum()),
    )


def of_tensors(magnitudes: Iterable[tuple[str, Tensor]]) -> dict[str, MagnitudeStatistics]:
    """Describe the values of magnitudes by name. Those without values are left out."""
    found = ((name, statistics(g.detach().cpu().double().numpy())) for name, g in magnitudes)
    return {name: described for name, described in found if described is not None}
