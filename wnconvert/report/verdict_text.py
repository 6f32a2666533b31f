"""The finding of `verify` as a person reads it."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wnconvert.report import text
from wnconvert.report.table import draw, fact_list, output_fact
from wnconvert.report.verdict import Comparison, Verdict

SHOWN = 10
"""Lines of differing tensors, and of names on one side only, unless all are asked for."""


def verdict_text(verdict: Verdict, *, width: int, color: bool = False, verbose: bool = False) -> str:
    """Draw the verdict: the facts, the worst tensors, and the answer last."""
    shown = max(SHOWN, len(verdict.weights.differing)) if verbose else SHOWN
    facts = [
        ("A", Text(f"{text.safe(verdict.a)}: {verdict.formats[0]}")),
        ("B", Text(f"{text.safe(verdict.b)}: {verdict.formats[1]}")),
        ("weights", Text(_weights(verdict.weights), "green" if verdict.weights.within(1) else "red")),
    ]
    if verdict.outputs is not None:
        facts.append(("outputs", output_fact(verdict.outputs)))
    facts += [("note", Text(text.safe(note))) for note in verdict.notes]
    parts: list[RenderableType] = [fact_list(facts)]
    if verdict.weights.differing:
        parts += ["", _worst(verdict.weights, shown)]
    for side, names in (("A", verdict.weights.only_a), ("B", verdict.weights.only_b)):
        if names:
            parts += ["", Text(f"only in {side}", "bold"), *(Text(f"  {text.safe(name)}") for name in names[:shown])]
            parts += [Text(f"  and {len(names) - shown} more")] if len(names) > shown else []
    return draw([*parts, "", _answer(verdict)], width, color)


def _weights(weights: Comparison) -> str:
    total = weights.compared
    equal = total - sum(d.comparable for d in weights.differing)
    lines = [f"identical bits in {equal:,} of {text.plural(total, 'tensor')}"]
    near = sum(d.ulp is not None and d.ulp <= 1 for d in weights.differing)
    if near:
        lines.append(f"within 1 ulp in {near:,}")
    far = len(weights.differing) - near
    if far:
        lines.append(f"{far:,} differ")
    if not weights.same_names:
        lines.append(f"{len(weights.only_a) + len(weights.only_b):,} on one side only")
    return ", ".join(lines)


def _worst(weights: Comparison, shown: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("TENSOR", overflow="fold")
    table.add_column("DIFFERS", overflow="fold")
    for difference in weights.worst(shown):
        table.add_row(Text(text.safe(difference.name)), Text(str(difference)))
    if len(weights.differing) > shown:
        table.add_row(Text(f"and {len(weights.differing) - shown} more"), Text(""))
    return table


def _answer(verdict: Verdict) -> Text:
    by = f", by {verdict.decided_by}"
    return Text("same function" + by, "bold green") if verdict.same else Text("not the same" + by, "bold red")
