"""The zoo: what it concludes from records, what it does with an interrupted run, and one network through a trial.

The libraries themselves are tried by scripts/zoo.py, not here.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from zoo import conversion, outputs, report, results, trial, weights
from zoo.outputs import Inputs
from zoo.transformers_rules import Recipe, TokenIds, shrink


def _record(name: str, **more: Any) -> dict[str, Any]:
    empty = {"library": "timm", "name": name, "tool": "a", "built": True, "reason": None, "walker": "fx", "sites": 3}
    checks = {"equal": True, "parity": True, "identical": True, "pickled": True, "copied": True}
    return {**empty, **checks, "missed": [], "wrong": [], "skipped": {}, "seconds": 1.0, **more}


def test_summary_counts_what_was_tried() -> None:
    records = [
        _record("a"),
        _record("b", walker="export", pickled="plain too", equal=False, wrong=["outputs changed"], missed=["x.weight"]),
        _record("c", built=False, reason="too large", sites=0),
        _record("d", library="torchvision"),
    ]
    timm, torchvision, everything = report.summary(records)
    assert (timm["names"], timm["built"], timm["fx"], timm["export"], timm["weights split"]) == (3, 2, 1, 1, 6)
    assert (timm["outputs equal"], timm["pickled"], timm["missed"], timm["wrong"]) == ("1/2", "1/1", 1, 1)
    assert (torchvision["names"], everything["names"], everything["outputs equal"]) == (1, 4, "2/3")
    assert report.reasons(records) == {"timm: too large": 1}
    assert report.wrong(records) == ["timm b: outputs changed", "timm b: missed x.weight"]
    table = report.markdown(records, "scripts/zoo.py", 2)
    assert "| timm | 3 | 2 | 1 | 1 | 0 | 0 | 6 | 1/2 |" in table
    assert "- 1 x timm: too large" in table


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert results.load(path) == {}
    for record in (_record("a"), _record("b", wrong=["x"]), _record("old", tool="b"), _record("a", sites=7)):
        results.append(path, record)
    with path.open("a") as stream:
        stream.write('{"library": "timm", "na')
    done = results.load(path)
    assert done["timm", "a"]["sites"] == 7
    tasks = [("timm", name) for name in ("a", "b", "old", "new")]
    assert results.left(tasks, done, "a", retry=False) == [("timm", "old"), ("timm", "new")]
    assert results.left(tasks, done, "a", retry=True) == [("timm", "b"), ("timm", "new")]


def test_the_fingerprint_follows_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = results.fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert results.fingerprint(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert results.fingerprint(tmp_path) != before


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def _try(*models: nn.Module, inputs: Inputs) -> trial.Outcome:
    def attempts() -> Generator[trial.Attempt, Exception, None]:
        for model in models:
            yield trial.Attempt(model, inputs)

    outcome = trial.Outcome("test", "network")
    trial.attempt(outcome, attempts())
    return outcome


IMAGE = Inputs((torch.randn(1, 3, 8, 8),))


def test_a_network_passes_every_check() -> None:
    outcome = _try(nn.Linear(7, 7), _network(), inputs=IMAGE)  # the first does not take an image
    assert outcome.wrong == []
    assert outcome.missed == []
    checks = (outcome.equal, outcome.parity, outcome.identical, outcome.pickled, outcome.copied, outcome.moved)
    assert checks == (True,) * 6
    assert (outcome.walker, outcome.sites, outcome.kinds) == ("fx", 2, {"Conv2d": 1, "Linear": 1})


def test_what_does_not_run_is_not_built() -> None:
    outcome = _try(nn.Linear(7, 7), inputs=IMAGE)
    assert not outcome.built
    assert "shapes cannot be multiplied" in str(outcome.reason)


def test_a_fold_that_loses_a_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(model: nn.Module, **options: Any) -> Any:
        result = fold(model, **options)
        with torch.no_grad():
            result.model[0].weight[0, 0, 0, 0] *= 1 + 2**-23
        return result

    fold = conversion.wnconvert.fold
    monkeypatch.setattr(conversion.wnconvert, "fold", sloppy)
    outcome = _try(_network(), inputs=IMAGE)
    assert outcome.identical is False
    assert "apply and fold: 0.weight changed" in outcome.wrong


def test_outputs_are_compared_bit_by_bit_and_by_distance() -> None:
    a = [torch.tensor([1.0, float("nan"), -0.0]), torch.tensor([3])]
    assert outputs.same_bits(a, [a[0].clone(), a[1].clone()])
    assert not outputs.same_bits(a, [torch.tensor([1.0, float("nan"), 0.0]), a[1]])
    assert outputs.distance([torch.tensor([4.0, 1.0])], [torch.tensor([4.0, 2.0])]) == 0.25
    assert outputs.distance([torch.tensor([3])], [torch.tensor([4])]) == float("inf")


def test_weights_are_the_same_on_every_run_and_nothing_is_trivial() -> None:
    with weights.cheap_init():
        first = _network()
    with weights.cheap_init():
        second = _network()
    for model in (first, second):
        weights.fill(model)
    assert weights.differences(weights.digest(first), weights.digest(second)) == []
    norm = first[1]
    assert all(float(t.std()) > 0 for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))


def test_settings_shrink_in_proportion() -> None:
    ids, recipe = TokenIds(), Recipe(16)
    assert [shrink(key, 1024, recipe, None, ids) for key in ("hidden_size", "d_model", "mlp_dim")] == [64] * 3
    assert shrink("hidden_sizes", (64, 128), recipe, None, ids) == (4, 8)
    assert shrink("num_hidden_layers", 24, recipe, 2, ids) == 2
    assert shrink("num_attention_heads", 16, recipe, 2, ids) == 16
    assert shrink("patch_size", 16, recipe, 2, ids) == 16
    assert shrink("vocab_size", 30000, recipe, 2, ids) == 256
    assert shrink("image_token_id", 29000, recipe, 2, ids) == shrink("other_token_id", 29000, recipe, 2, ids) < 256


class Chaotic(nn.Module):
    """Amplifies the last bit a million times, and runs in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x).float() * 1e5).sin()


def test_a_network_that_amplifies_rounding_is_held_to_its_own_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs((torch.randn(2, 6),))
    monkeypatch.setattr(conversion.Conversion, "_measure_in_float64", lambda self: None)
    outcome = _try(Chaotic(), inputs=inputs)
    assert outcome.distance > conversion.TOLERANCE[torch.float32]
    assert outcome.distance <= conversion.AMPLIFIED * outcome.sensitivity
    assert outcome.parity
    monkeypatch.setattr(conversion, "AMPLIFIED", 0)
    assert not _try(Chaotic(), inputs=inputs).parity
