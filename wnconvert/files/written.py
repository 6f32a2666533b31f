"""What there is to say about a file that was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wnconvert.sites import RowCounts

if TYPE_CHECKING:
    from wnconvert.stream.receipts import Receipts

Outcomes = dict[str, RowCounts | str]
"""What splits came to, by the name of the weight: counts, or why it cannot be split."""


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """One file.

    Attributes:
        outcomes: what the splits in it came to.
        places: `(start, size)` of what is in it, where its format needs that.
        receipts: what was computed for it; None where that is not known any more.
    """

    outcomes: Outcomes
    places: Sequence[tuple[int, int]] = ()
    receipts: Receipts | None = None


def refused(outcomes: Outcomes) -> bool:
    """Whether a weight turned out not to be splittable, so that the file is to be written once more, without."""
    return any(isinstance(outcome, str) for outcome in outcomes.values())
