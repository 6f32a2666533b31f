"""The report of one command: data only. It is the JSON that programs read and what the table is drawn from."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from wnconvert.sites import Axis, Site

Action = Literal["split", "folded", "skipped", "renamed", "listed"]


@dataclasses.dataclass(frozen=True, slots=True)
class MagnitudeStatistics:
    """Of the magnitudes of one split weight."""

    minimum: float
    median: float
    maximum: float
    negative: int
    zero: int


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What was done to one site.

    Attributes:
        site: the site as it was found.
        action: what happened.
        reason: why it was skipped.
        zero_rows: rows of zeros that got a random direction.
        scaled_rows: rows whose direction was scaled by a power of two.
        magnitude: of split sites, for `inspect`.
    """

    site: Site
    action: Action
    reason: str | None = None
    zero_rows: int = 0
    scaled_rows: int = 0
    magnitude: MagnitudeStatistics | None = None


@dataclasses.dataclass(slots=True)
class OutputCheck:
    """Outputs of two models on the same random inputs.

    Attributes:
        equal: every difference is within the tolerance.
        largest: the largest difference, relative to the largest magnitude of that output.
        tolerance: what was allowed, by dtype.
        note: why nothing could be run, if so.
    """

    equal: bool | None
    largest: float | None = None
    tolerance: float | None = None
    note: str | None = None


@dataclasses.dataclass(slots=True)
class Report:
    """What one command did.

    Attributes:
        command: `apply`, `fold`, `inspect` or `rename`.
        rows: one per site.
        walker: what found the sites.
        walker_note: why a weaker walker was used.
        input, output, format: of a file conversion.
        files: the size in bytes of every file written, by name.
        weights_verified: the result was read back and every weight has the bits it must have; None if not checked.
        tensors_verified: number of tensors compared for that.
        outputs: the output check, where the format can be run.
        notes: lines worth a person's attention.
    """

    command: str
    rows: list[Row]
    walker: str
    walker_note: str | None = None
    input: str | None = None
    output: str | None = None
    format: str | None = None
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    weights_verified: bool | None = None
    tensors_verified: int = 0
    outputs: OutputCheck | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, action: Action) -> int:
        """Number of sites with this action."""
        return sum(row.action == action for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, the same shape for every command."""
        from wnconvert import __version__

        return {
            "tool": "wnconvert",
            "version": __version__,
            "command": self.command,
            "input": self.input,
            "output": self.output,
            "format": self.format,
            "walker": self.walker,
            "walker_note": self.walker_note,
            "sites": [_row_json(row) for row in self.rows],
            "counts": {action: self.count(action) for action in ("split", "folded", "renamed", "listed", "skipped")},
            "files": self.files,
            "verified": {
                "weights": self.weights_verified,
                "tensors": self.tensors_verified,
                "outputs": None if self.outputs is None else dataclasses.asdict(self.outputs),
            },
            "notes": self.notes,
        }


def _row_json(row: Row) -> dict[str, Any]:
    site = row.site
    return {
        "name": site.name,
        "kind": site.kind,
        "shape": list(site.shape),
        "dtype": site.dtype,
        "axis": _axis_json(site.axis),
        "groups": site.groups,
        "g_shape": list(site.g_shape),
        "state": site.state,
        "scheme": site.scheme,
        "action": row.action,
        "reason": row.reason,
        "tied": list(site.tied),
        "uses": list(site.uses),
        "evidence": site.evidence,
        "zero_rows": row.zero_rows,
        "scaled_rows": row.scaled_rows,
        "magnitude": None if row.magnitude is None else dataclasses.asdict(row.magnitude),
    }


def _axis_json(axis: Axis) -> int | list[int] | None:
    return list(axis) if isinstance(axis, tuple) else axis
