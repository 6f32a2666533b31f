"""What every file format promises, run over the table of formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import FORMATS, Format, assert_same_contents, document, flat, state
from wnconvert import convert, jobs
from wnconvert.names import spell

EVERY = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
WEIGHTS = (
    "conv.weight",
    "ups.0.weight",
    "ups.1.weight",
    "image.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hr_l0_reverse",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "head.weight",
)


def _job(command: str, **options: object) -> jobs.Job:
    return jobs.Job(command, **options)  # type: ignore[arg-type]


@EVERY
def test_apply_then_fold_gives_the_same_file_contents(form: Format, tmp_path: Path) -> None:
    source, split, back = (tmp_path / f"{step}{Path(form.file).suffix}" for step in ("in", "split", "back"))
    form.write(source, state())
    before = form.read(source)

    applied = jobs.convert_file(source, split, _job("apply"))
    folded = jobs.convert_file(split, back, _job("fold"))

    assert applied.weights_verified
    assert folded.weights_verified
    assert applied.count("split") == folded.count("folded") > 0
    assert_same_contents(before, form.read(back))
    assert_same_contents(before, form.read(source))


@EVERY
def test_rename_and_back_moves_nothing(form: Format, tmp_path: Path) -> None:
    source, split, other, back = (tmp_path / f"{step}{Path(form.file).suffix}" for step in ("in", "a", "b", "c"))
    form.write(source, state())
    jobs.convert_file(source, split, _job("apply"))

    jobs.convert_file(split, other, _job("rename", names="parametrized"))
    jobs.convert_file(other, back, _job("rename", names="legacy"))

    keys = "\n".join(flat(form.read(other)))
    assert "parametrizations.weight.original0" in keys
    assert "weight_g" not in keys
    assert_same_contents(form.read(split), form.read(back))


@EVERY
def test_every_layer_is_found_and_nothing_else_is_split(form: Format, tmp_path: Path) -> None:
    source = tmp_path / form.file
    form.write(source, state())

    report = convert.apply(document(source).carrier, dry_run=True)

    split = {row.site.name for row in report.rows if row.action == "split"}
    for weight in WEIGHTS:
        assert any(name.endswith(weight) for name in split)
    assert not any("embed" in name or "norm" in name or "bias" in name for name in split)
    assert {row.reason for row in report.rows if row.site.kind == "Norm"} == {
        "a norm layer's scale is one value per channel"
    }


@EVERY
def test_pair_stands_where_the_weight_stood(form: Format, tmp_path: Path) -> None:
    source = tmp_path / form.file
    form.write(source, state())
    opened = document(source)
    before = [entry.name for entry in opened.carrier.entries()]
    report = convert.apply(opened.carrier)

    expected = []
    split = {name for row in report.rows if row.action == "split" for name in (row.site.name, *row.site.tied)}
    for name in before:
        expected += spell(name, "legacy") if name in split else [name]

    assert [entry.name for entry in opened.carrier.entries()] == expected


@EVERY
def test_magnitudes_are_those_of_the_file(form: Format, tmp_path: Path) -> None:
    source, split = tmp_path / f"in{Path(form.file).suffix}", tmp_path / f"out{Path(form.file).suffix}"
    weights = state()
    form.write(source, weights)
    jobs.convert_file(source, split, _job("apply"))

    found = document(split).magnitudes()

    norms = weights["head.weight"].double().pow(2).sum(1).sqrt().float()
    head = next(value for name, value in found.items() if name.endswith("head.weight"))
    assert (head.minimum, head.maximum) == (norms.min().item(), norms.max().item())
    assert (head.negative, head.zero) == (0, 0)


@EVERY
def test_tensors_are_the_stored_ones(form: Format, tmp_path: Path) -> None:
    source = tmp_path / form.file
    weights = state()
    form.write(source, weights)

    found = document(source).tensors()

    for name, weight in weights.items():
        stored = next(tensor for key, tensor in found.items() if key.endswith(name))
        assert torch.equal(stored, weight)
