"""Whether two files are the same function: the finding of `verify`, data only."""

from __future__ import annotations

import dataclasses
from typing import Any

from wnconvert.report.model import OutputCheck


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same on both sides.

    Attributes:
        name: as side A calls it.
        count: number of values that differ; 0 where shape or dtype already do.
        ulp: the largest distance in units in the last place, None where there is no such thing.
    """

    name: str
    count: int
    ulp: int | None

    @property
    def comparable(self) -> bool:
        """Both sides hold the same number of values of one dtype."""
        return self.count > 0

    def __str__(self) -> str:
        if not self.comparable:
            return "in shape or dtype"
        values = "1 value" if self.count == 1 else f"{self.count:,} values"
        return f"in {values}" + ("" if self.ulp is None else f", by up to {self.ulp:,} ulp")


@dataclasses.dataclass(slots=True)
class Comparison:
    """The tensors of two networks side by side, split weights multiplied back.

    Attributes:
        compared: number of tensors with one name, shape and dtype on both sides.
        only_a: names that only the first network has.
        only_b: names that only the second network has.
        differing: tensors that are on both sides and not the same.
        prefixes: what was taken off the names of each side to make them match.
    """

    compared: int = 0
    only_a: list[str] = dataclasses.field(default_factory=list)
    only_b: list[str] = dataclasses.field(default_factory=list)
    differing: list[Difference] = dataclasses.field(default_factory=list)
    prefixes: tuple[str, str] = ("", "")

    @property
    def same_names(self) -> bool:
        """Neither side has a tensor that the other lacks."""
        return not self.only_a and not self.only_b

    @property
    def identical(self) -> bool:
        """Same names, same bits."""
        return self.same_names and not self.differing

    def within(self, ulp: int) -> bool:
        """Same names, and every element at most `ulp` units in the last place away."""
        return self.same_names and all(d.ulp is not None and d.ulp <= ulp for d in self.differing)

    def worst(self, count: int) -> list[Difference]:
        """The tensors that differ most, different shapes first."""
        far = sorted(self.differing, key=lambda d: (d.comparable, -(d.ulp or 0), -d.count))
        return far[:count]

    @property
    def first_difference(self) -> str:
        """One line on what differs first."""
        lonely = self.only_a + self.only_b
        if lonely:
            return f"{lonely[0]} is on one side only ({len(lonely)} such names)"
        if not self.differing:
            return "nothing differs"
        return f"{self.differing[0].name} differs {self.differing[0]} ({len(self.differing)} such tensors)"


@dataclasses.dataclass(slots=True)
class Verdict:
    """What `verify` found out about two files.

    Attributes:
        a, b: the files.
        formats: of the two.
        weights: the tensors side by side.
        outputs: what both compute on the same random inputs, where they can be run.
        notes: lines worth a person's attention.
    """

    a: str
    b: str
    formats: tuple[str, str]
    weights: Comparison
    outputs: OutputCheck | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the two are the same function.

        Outputs that differ always decide. Else weights that can be compared do: each value within 1 ulp. Outputs that
        agree decide only where names or shapes do not match, as after another tool has rewritten the graph.
        """
        if self.outputs is not None and self.outputs.equal is False:
            return False
        return self.weights.within(1) or self.decided_by == "outputs"

    @property
    def decided_by(self) -> str:
        """`weights` or `outputs`."""
        if self.outputs is None or self.outputs.equal is None:
            return "weights"
        if self.outputs.equal is False:
            return "weights" if any(d.comparable for d in self.weights.differing) else "outputs"
        far = any(d.comparable and (d.ulp is None or d.ulp > 1) for d in self.weights.differing)
        return "weights" if far or self.weights.within(1) else "outputs"

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain data."""
        from wnconvert import __version__

        return {
            "tool": "wnconvert",
            "version": __version__,
            "command": "verify",
            "a": self.a,
            "b": self.b,
            "formats": list(self.formats),
            "same": self.same,
            "decided_by": self.decided_by,
            "weights": {
                "identical": self.weights.identical,
                "within_1_ulp": self.weights.within(1),
                **dataclasses.asdict(self.weights),
            },
            "outputs": None if self.outputs is None else dataclasses.asdict(self.outputs),
            "notes": self.notes,
        }
