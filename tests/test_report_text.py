"""Reports for people: nothing is cut off, whatever the width, and nothing is claimed that was not done."""

from __future__ import annotations

import math
import re

import pytest

from wnconvert.report import text
from wnconvert.report.model import MagnitudeStatistics, OutputCheck, Report, Row
from wnconvert.report.table import report_text
from wnconvert.report.verdict import Comparison, Difference, Verdict
from wnconvert.report.verdict_text import verdict_text
from wnconvert.sites import Site

LONG = "module.encoder.transformer.layers.{}.self_attention.output_projection.linear.weight"


def site(name: str, **changes: object) -> Site:
    return Site(**{"name": name, "kind": "Linear", "shape": (8, 4), "dtype": "float32", "axis": 0, **changes})


def report(rows: list[Row], command: str = "inspect", **facts: object) -> Report:
    return Report(command, rows, "keys", **facts)


def widths(shown: str) -> set[int]:
    return {len(line) for line in shown.splitlines()}


@pytest.mark.parametrize("width", [40, 60, 80, 132, 1 << 16])
@pytest.mark.parametrize("stems", [[LONG], ["w{}"], ["no_dots_at_all_in_this_name_" * 4 + "{}"]])
def test_every_name_is_whole_at_every_width(width: int, stems: list[str]) -> None:
    names = [stem.format(i) for stem in stems for i in range(12)]
    statistics = MagnitudeStatistics(-0.5, 1.25, 3.0, 1, 0)
    rows = [Row(site(name, state="split", scheme="legacy"), "listed", magnitude=statistics) for name in names]

    shown = report_text(report(rows), width=width)

    # A name that goes on in the next line is indented there.
    columns = [
        re.split(r" {2,}", line, maxsplit=1)[0] for line in re.sub(r"\n  (?=\S)", "", joined(shown)).splitlines()
    ]
    assert set(names) <= set(columns)
    assert max(widths(shown)) <= max(width, 60)


def joined(shown: str) -> str:
    """The first column with continued names put together."""
    lines: list[str] = []
    for line in shown.splitlines():
        if line.startswith("  ") and lines:
            head, *tail = re.split(r"(?= {2,})", lines[-1], maxsplit=1)
            lines[-1] = head + line.strip() + "".join(tail)
        else:
            lines.append(line)
    return "\n".join(lines)


def test_magnitudes_stand_apart_where_they_do_not_fit() -> None:
    statistics = MagnitudeStatistics(-0.5, 1.25, 3.0, 1, 2)
    rows = [Row(site(LONG.format(0), state="split", scheme="legacy"), "listed", magnitude=statistics)]
    rows.append(Row(site("plain.weight"), "listed"))

    wide, narrow = (report_text(report(rows), width=width) for width in (200, 80))

    assert wide.count("NAME") == 1
    assert narrow.count("NAME") == 2
    for shown in (wide, narrow):
        assert "MIN G  MEDIAN  MAX  NEGATIVE  ZERO" in shown
        assert re.search(r"-0\.5 +1\.25 +3 +1 +2", shown)


def test_reasons_stand_below_once() -> None:
    rows = [Row(site(f"n{i}", skip="too odd"), "skipped", "too odd") for i in range(3)]
    rows.append(Row(site("tied", tied=("other.weight",)), "listed"))

    shown = report_text(report(rows), width=80)

    assert shown.count("too odd") == 1
    assert "3 of them left alone by apply" in shown
    assert "also named other.weight" in shown
    assert len(re.findall(r"^n\d .* 1$", shown, re.MULTILINE)) == 3


def test_weights_of_a_kind_share_a_line_unless_verbose() -> None:
    rows = [Row(site(f"layer{i}"), "split") for i in range(5)]
    rows += [Row(site(f"odd{i}"), "skipped", "holds NaN") for i in range(2)]
    facts = {"weights_verified": True, "tensors_verified": 9, "files": {"out.pt": 55_800_000}, "output": "d/out.pt"}

    shown = report_text(report(rows, "apply", **facts), width=80)
    every = report_text(report(rows, "apply", **facts), width=80, verbose=True)

    assert re.search(r"Linear +5 +160 +split", shown)
    assert re.search(r"Linear +2 +64 +skipped +holds NaN: odd0 and 1 more", shown)
    assert "5 of 7 split" in shown
    assert "identical bits in 9 tensors" in shown
    assert "d/out.pt, 55.8 MB" in shown
    assert all(row.site.name in every for row in rows)


def test_a_dry_run_claims_nothing() -> None:
    shown = report_text(report([Row(site("a"), "split")], "apply"), width=80, dry_run=True)

    assert "1 of 1 would be split; nothing is written in a dry run" in shown
    assert "identical" not in shown
    assert "wrote" not in shown


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (OutputCheck(True, 3e-7, 1e-4), "largest relative difference 3e-07, tolerance 0.0001"),
        (OutputCheck(None, note="needs a custom operator"), "not compared: needs a custom operator"),
        (OutputCheck(False, math.inf, 1e-4, "a runs, but b does not"), "a runs, but b does not"),
    ],
)
def test_outputs(check: OutputCheck, words: str) -> None:
    assert words in report_text(report([Row(site("a"), "split")], "apply", outputs=check), width=100)


def test_colour_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [Row(site("a", state="split"), "listed")]

    assert "\x1b[" in report_text(report(rows), width=80, color=True)
    assert "\x1b" not in report_text(report(rows), width=80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in report_text(report(rows), width=80, color=True)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (55_833_000, "55.8 MB"),
        (2.4e9, "2.4 GB"),
        (3e12, "3.0 TB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert text.size(count) == shown


@pytest.mark.parametrize(
    ("axis", "groups", "shown"), [(0, 1, "0"), (None, 1, "all"), ((0, 2), 1, "0,2"), ((0, 2), 4, "0,2 of 4 groups")]
)
def test_axes(axis: object, groups: int, shown: str) -> None:
    assert text.axis(axis, groups) == shown


def verdict(weights: Comparison, outputs: OutputCheck | None = None) -> Verdict:
    return Verdict("a.pt", "b.pt", ("torch", "torch"), weights, outputs)


SAME = Comparison(compared=3)
NEAR = Comparison(compared=3, differing=[Difference("w", 5, 1)])
FAR = Comparison(compared=3, differing=[Difference("w", 5, 2)])
SHAPE = Comparison(compared=2, differing=[Difference("w", 0, None)])
NAMES = Comparison(compared=2, only_a=["w"])
AGREE, DISAGREE, UNKNOWN = OutputCheck(True, 1e-7, 1e-4), OutputCheck(False, 0.5, 1e-4), OutputCheck(None, note="x")


@pytest.mark.parametrize(
    ("weights", "outputs", "same", "decided_by"),
    [
        (SAME, None, True, "weights"),
        (SAME, AGREE, True, "weights"),
        (SAME, UNKNOWN, True, "weights"),
        (SAME, DISAGREE, False, "outputs"),
        (NEAR, None, True, "weights"),
        (FAR, None, False, "weights"),
        (FAR, AGREE, False, "weights"),
        (SHAPE, None, False, "weights"),
        (SHAPE, AGREE, True, "outputs"),
        (NAMES, None, False, "weights"),
        (NAMES, UNKNOWN, False, "weights"),
        (NAMES, AGREE, True, "outputs"),
        (NAMES, DISAGREE, False, "outputs"),
        (Comparison(1, ["w"], [], [Difference("x", 1, 9)]), AGREE, False, "weights"),
    ],
)
def test_verdicts(weights: Comparison, outputs: OutputCheck | None, same: bool, decided_by: str) -> None:
    found = verdict(weights, outputs)

    assert (found.same, found.decided_by) == (same, decided_by)
    assert verdict_text(found, width=80).endswith(f"{'same function' if same else 'not the same'}, by {decided_by}\n")


def test_the_worst_tensors_come_first_and_are_counted() -> None:
    many = [Difference(f"w{i}", 1, i + 2) for i in range(40)]
    weights = Comparison(40, [f"a{i}" for i in range(15)], ["b"], many)

    shown = verdict_text(verdict(weights), width=80)

    assert re.search(r"TENSOR +DIFFERS\nw39 +in 1 value, by up to 41 ulp\nw38 ", shown)
    assert "and 30 more" in shown
    assert "only in A\n  a0\n" in shown
    assert "and 5 more" in shown
    assert "only in B\n  b\n" in shown
    assert "w0 " in verdict_text(verdict(weights), width=80, verbose=True)
